"""What vLLM can do with an answer works with pruned images: several answers, stop strings, structure, streaming."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import VOCABULARY, Engine, draw, request, within
from staged import SAME, Stepper, greedy, start_large
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from vd_plugin import request_checks

pytestmark = [pytest.mark.engine, pytest.mark.slow]

ASKED = request("USER: <image>\nWhat is it? ASSISTANT:", [draw(640, 320)], visual_token_budget=100)
TEXT = request("USER: What is it? ASSISTANT:")


@pytest.fixture(scope="module")
def engine(random_model: Path) -> Engine:
    return start_large(random_model)


def outputs(engine: Engine, params: SamplingParams, *asked: dict[str, Any]) -> list[Any]:
    engine.forget()
    return engine.llm.generate(list(asked or [ASKED]), params, use_tqdm=False)


def sample(seed: int, n: int = 1) -> SamplingParams:
    return SamplingParams(n=n, temperature=1, seed=seed, max_tokens=6, ignore_eos=True, logprobs=VOCABULARY)


def logprobs_of(completion: Any) -> torch.Tensor:
    return torch.tensor([[step[token].logprob for token in range(VOCABULARY)] for step in completion.logprobs])


def test_each_of_several_answers_equals_one_alone(engine: Engine) -> None:
    """vLLM gives the i-th answer the seed + i."""
    together = outputs(engine, sample(seed=5, n=3))[0].outputs
    assert len({tuple(completion.token_ids) for completion in together}) == 3
    for number, completion in enumerate(together):
        (alone,) = outputs(engine, sample(seed=5 + number))[0].outputs
        assert list(completion.token_ids) == list(alone.token_ids)
        assert float((logprobs_of(completion) - logprobs_of(alone)).abs().max()) <= within(SAME)


def test_logprobs_are_those_of_the_most_likely_tokens(engine: Engine) -> None:
    every = outputs(engine, greedy(4))[0].outputs[0]
    few = outputs(engine, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=5))[0].outputs[0]
    for most, step in zip(logprobs_of(every), few.logprobs, strict=True):
        top = most.topk(5)
        assert {token for token, entry in step.items() if entry.rank <= 5} == set(top.indices.tolist())
        assert sorted((e.logprob for e in step.values()), reverse=True)[:5] == pytest.approx(
            top.values.tolist(), abs=SAME
        )


SCHEDULE = [[8, 2], [9, 3], [6, 2], [4, 1]]
PROMPT_LOGPROBS = [{"prompt_logprobs": 1}, {"prompt_logprob_token_ids": [[5, 6]] * 20}]


@pytest.mark.parametrize("fields", PROMPT_LOGPROBS, ids=lambda fields: next(iter(fields)))
def test_prompt_logprobs_are_refused_for_pruned_images(engine: Engine, fields: dict[str, Any]) -> None:
    (name,) = fields
    rows = len(engine.ask(**_arguments(ASKED), num_tokens=1).prompt_token_ids) - 1
    if name == "prompt_logprob_token_ids":
        fields = {name: np.full((rows, 2), 5)}
    with pytest.raises(VLLMValidationError, match=f"{name} are not available for prompts with pruned images") as caught:
        outputs(engine, SamplingParams(temperature=0, max_tokens=2, **fields))
    assert caught.value.parameter == name


def test_prompt_logprobs_are_there_for_text(engine: Engine) -> None:
    (output,) = outputs(engine, SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=1), TEXT)
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)


def test_the_scheduler_ends_what_went_past_the_front_end(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_checks, "check_request", lambda *_: None)
    (output,) = outputs(engine, SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=1))
    assert output.outputs[0].finish_reason == "error"
    assert not output.outputs[0].token_ids
    stepper = Stepper(engine)
    assert not stepper.scheduler.requests
    assert stepper.free_blocks == stepper.pool.num_gpu_blocks - 1


def test_an_image_serves_again_after_a_refusal(engine: Engine) -> None:
    """Wherever a request ends before the engine core gets its image, the next one with that image is answered."""
    expected = engine.generate(ASKED)[0].token_ids
    few = len(engine.generate(TEXT)[0].prompt_token_ids)
    refused: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
        "parameters": (ASKED, {"prompt_logprobs": 1}, "not available for prompts with pruned images"),
        "length": (
            {**ASKED, "prompt": ASKED["prompt"] + TEXT["prompt"] * (4000 // few)},
            {},
            "longer than the maximum model length",
        ),
        "places": (
            {**ASKED, "multi_modal_data": {"image": ASKED["multi_modal_data"]["image"] * 2}},
            {},
            r"1 image token\(s\) for 2 image",
        ),
    }
    for asked, fields, says in refused.values():
        engine.forget()
        with pytest.raises(VLLMValidationError, match=says):
            engine.llm.generate([asked], SamplingParams(temperature=0, max_tokens=2, **fields), use_tqdm=False)
        assert engine.generate(ASKED)[0].token_ids == expected


def test_a_request_may_overtake_another_one_with_the_same_image(engine: Engine) -> None:
    """Both are processed, and the second one comes first, or alone: the first one's client may have left."""
    expected = engine.generate(ASKED)[0].token_ids
    engine.forget()
    renderer = engine.llm.llm_engine.renderer
    _, second = (renderer.render_cmpl([ASKED], renderer.default_cmpl_tok_params)[0] for _ in range(2))
    assert engine.generate(second)[0].token_ids == expected


def test_an_image_of_another_size_under_one_uuid_ends_nothing(engine: Engine) -> None:
    """The client's fault, but only its own: whatever it gets, the next requests are answered."""
    expected = engine.generate(ASKED)[0].token_ids
    engine.forget()
    small, large = draw(60, 60), draw(640, 640)
    for image in (small, large, small):
        named = request("USER: <image> ASSISTANT:", [image], uuids=["name"], visual_token_schedule=SCHEDULE)
        with contextlib.suppress(VLLMValidationError):
            engine.generate(named)
        with pytest.raises(VLLMValidationError, match="not available"):
            engine.llm.generate([named], SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=1), use_tqdm=False)
    assert len(engine.generate(named)[0].token_ids) == 4
    assert engine.generate(ASKED)[0].token_ids == expected


def test_images_of_a_streaming_session_are_refused(engine: Engine) -> None:
    """Text, and images in full, pass: only pruned images would be looked for in vain where a session has grown."""
    processor = engine.llm.llm_engine.input_processor
    render = engine.llm.llm_engine.renderer.render_cmpl

    def process(asked: dict[str, Any]) -> Any:
        (prompt,) = render([asked], engine.llm.llm_engine.renderer.default_cmpl_tok_params)
        return processor.process_inputs("session", prompt, greedy(2), supported_tasks=("generate",), resumable=True)

    assert process(TEXT).resumable
    assert process({**ASKED, "mm_processor_kwargs": {"visual_token_budget": "full"}}).resumable
    with pytest.raises(VLLMValidationError, match="streaming-input sessions cannot be pruned"):
        process(ASKED)
    engine.forget()


def test_a_stop_string_ends_the_answer(engine: Engine) -> None:
    whole = outputs(engine, greedy(12))[0].outputs[0]
    stop = whole.text[len(whole.text) // 2 :][:3]
    stopped = outputs(engine, greedy(12, stop=[stop]))[0].outputs[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == whole.text[: whole.text.index(stop)]


def test_streamed_pieces_make_up_the_answer(engine: Engine) -> None:
    whole = outputs(engine, greedy(6))[0].outputs[0]
    engine.forget()
    stepper = Stepper(engine)
    stepper.add("streamed", ASKED, greedy(6, output_kind=RequestOutputKind.DELTA))
    stepper.run()
    pieces = [output.outputs[0] for output in stepper.outputs["streamed"]]
    assert len(pieces) == 6
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [token for piece in pieces for token in piece.token_ids] == list(whole.token_ids)


STRUCTURES: dict[str, tuple[dict[str, Any], Any]] = {
    "choice": ({"choice": ["cat", "dog"]}, lambda text: text in ("cat", "dog")),
    "regex": ({"regex": r"[0-9]{3}-[a-f]{2}"}, lambda text: re.fullmatch(r"[0-9]{3}-[a-f]{2}", text)),
    "json": (
        {
            "json": {
                "type": "object",
                "properties": {"red": {"type": "boolean"}, "size": {"enum": ["small", "large"]}},
                "required": ["red", "size"],
                "additionalProperties": False,
            }
        },
        lambda text: set(json.loads(text)) == {"red", "size"},
    ),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_an_answer_has_the_structure_that_was_asked_for(engine: Engine, name: str) -> None:
    """Beside requests that are free."""
    wanted, is_right = STRUCTURES[name]
    structured = SamplingParams(temperature=0, max_tokens=60, structured_outputs=StructuredOutputsParams(**wanted))
    (alone,) = outputs(engine, greedy(4))
    engine.forget()
    made, free, text = engine.llm.generate([ASKED, ASKED, TEXT], [structured, greedy(4), greedy(4)], use_tqdm=False)
    assert made.outputs[0].finish_reason == "stop"
    assert is_right(made.outputs[0].text)
    assert list(free.outputs[0].token_ids) == list(alone.outputs[0].token_ids)
    assert len(text.outputs[0].token_ids) == 4


def _arguments(asked: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": asked["prompt"], "images": asked["multi_modal_data"]["image"], **asked["mm_processor_kwargs"]}
