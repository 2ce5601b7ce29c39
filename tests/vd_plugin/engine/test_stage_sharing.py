"""Laws of staged pruning on the real engine: requests of one step may share the beginning of their prompts.

vLLM offers a block to the prefix cache when it schedules the step that will fill it. Attention may use such a block,
since every layer writes all keys of a step before it attends; pruning reads keys before the layer has run: it must not.

Blocks are small and full of other numbers before each batch: zeros, and keys that happen to be right, hide the fault.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engines
import pytest
import sabotage
from engines import Answer, Engine, draw, request
from staged import (
    LAYERS,
    SAME,
    Stepper,
    assert_same,
    checkpoint,
    difference,
    dirty,
    greedy,
    recorded_steps,
    wipe,
    words,
)
from vllm import SamplingParams

pytestmark = [pytest.mark.engine, pytest.mark.slow]

BLOCK = 32
SHARED = words(3 * BLOCK + 8)
"""Three whole blocks and the beginning of a fourth; the prompt begins with one token more."""
ALIGNED = words(2 * BLOCK - 1, 7)
"""With the token that every prompt begins with, two whole blocks."""
IMAGES = [draw(336, 336, seed=seed) for seed in range(4)]

BATCHES: dict[str, list[dict[str, Any]]] = {
    "two images": [
        request(f"{SHARED} <image> {words(4, 1)}", [IMAGES[0]], visual_token_budget=64),
        request(f"{SHARED} <image> {words(4, 2)}", [IMAGES[1]], visual_token_budget=48),
    ],
    "text first": [
        request(f"{SHARED} {words(30, 3)}"),
        request(f"{SHARED} {words(30, 3)} {words(5, 4)} <image> {words(4, 2)}", [IMAGES[1]], visual_token_budget=48),
    ],
    "the same picture": [
        request(f"{SHARED} <image> {words(4, number)}", [IMAGES[2]], visual_token_budget=64) for number in range(3)
    ],
    "the shared text ends with a block": [
        request(f"{ALIGNED} <image> {words(4, number)}", [IMAGES[number]], visual_token_budget=64)
        for number in range(3)
    ],
    "more text between": [
        request(f"{SHARED} {words(40, number)} <image> <image>", IMAGES[number : number + 2], visual_token_budget=48)
        for number in range(3)
    ],
    "a picture in full before": [
        request(f"{SHARED} <image> <image>", IMAGES[:2], visual_token_budget=["full", budget]) for budget in (48, 64)
    ],
    "images first, which share nothing": [
        request(f"<image> {SHARED}", [IMAGES[number]], visual_token_budget=64) for number in range(2)
    ],
}


@pytest.fixture(scope="module", params=[False, True], ids=["synchronous", "asynchronous"])
def engine(request: pytest.FixtureRequest, llava15: Path) -> Engine:
    """Both ways to schedule: vLLM's default on a GPU prepares a step while the one before it runs."""
    return engines.start(
        checkpoint("llava15_gqa8", llava15),
        layers=LAYERS,
        block_size=BLOCK,
        num_gpu_blocks_override=1 + 4 * 128,
        asynchronous=request.param,
    )


@pytest.fixture
def breakable(engine: Engine) -> Iterator[Engine]:
    yield engine
    wipe(engine)


@pytest.fixture(scope="module")
def alone(engine: Engine) -> dict[str, list[Answer]]:
    answers = {}
    for name, batch in BATCHES.items():
        answers[name] = []
        for asked in batch:
            engine.forget()
            answers[name] += engine.generate(asked)
    return answers


def test_the_engine_schedules_as_asked(engine: Engine, request: pytest.FixtureRequest) -> None:
    asynchronous = engine.llm.llm_engine.vllm_config.scheduler_config.async_scheduling
    assert asynchronous is ("asynchronous" in request.node.callspec.id)


@pytest.mark.parametrize("name", BATCHES)
def test_shared_beginnings_of_a_cold_batch(engine: Engine, alone: dict[str, list[Answer]], name: str) -> None:
    dirty(engine)
    for one, answer in zip(alone[name], engine.generate(*BATCHES[name]), strict=True):
        assert_same(one, answer)


@pytest.mark.parametrize("name", BATCHES)
def test_several_answers_to_a_cold_prompt(engine: Engine, alone: dict[str, list[Answer]], name: str) -> None:
    """`n = 2`: the second answer begins with the first one's prompt."""
    dirty(engine)
    answers = two_answers(engine, BATCHES[name][-1])
    assert len(answers) == 2
    for answer in answers:
        assert_same(alone[name][-1], answer)


def test_an_image_that_arrives_while_its_text_is_written(engine: Engine) -> None:
    """The block that a decoding request fills in this very step begins another request's prompt."""
    writer = request(words(BLOCK - 6, 11))
    written = engine.ask(**_prompt(writer), num_tokens=2 * BLOCK)
    text = [*written.prompt_token_ids, *written.token_ids]
    image = engine.llm.model_config.hf_config.image_token_index
    late = {
        "prompt_token_ids": [*text[: BLOCK + 4], image, *text[5:9]],
        "multi_modal_data": {"image": [IMAGES[3]]},
        "mm_processor_kwargs": {"visual_token_budget": 64},
    }
    engine.forget()
    (expected,) = engine.generate(late)
    for steps in range(4, 14):
        assert_same(expected, late_answer(engine, writer, late, steps))


def late_answer(engine: Engine, writer: dict[str, Any], late: dict[str, Any], steps: int) -> Answer:
    """To a request that arrives when another one has been running for some steps, in a dirty cache."""
    dirty(engine)
    stepper = Stepper(engine)
    stepper.add("writer", writer, greedy(2 * BLOCK))
    stepper.step(steps)
    stepper.add("late", late)
    stepper.run(lambda: stepper.is_done("late"))
    answer = stepper.answer("late")
    stepper.abort_all()
    stepper.run()
    return answer


def test_shared_text_is_computed_once_and_the_image_waits_for_one_step(engine: Engine) -> None:
    """What the law costs: nothing is computed twice, and only an image whose text was found in its own step waits."""
    batch = [
        request(f"{SHARED} <image> {words(4, number)}", [IMAGES[number]], visual_token_budget=64) for number in range(4)
    ]
    dirty(engine)
    with recorded_steps(engine) as chunks:
        answers = engine.generate(*batch)
    assert [answer.num_cached_tokens for answer in answers] == [0, *[3 * BLOCK] * 3]
    assert sum(chunk.end - chunk.start for chunk in chunks if chunk.step == 0) == len(
        answers[0].prompt_token_ids
    ) + 3 * (chunks[0].spans[0].offset - 3 * BLOCK)
    images = [
        [
            chunk.step
            for chunk in chunks
            if chunk.req_id.startswith(req) and chunk.start <= chunk.spans[0].offset < chunk.end
        ]
        for req in sorted({chunk.req_id for chunk in chunks}, key=lambda req_id: int(req_id.split("-")[0]))
    ]
    assert images == [[0], [1], [1], [1]]
    with recorded_steps(engine) as chunks:
        engine.generate(*batch)
    assert {chunk.step for chunk in chunks if chunk.start <= chunk.spans[0].offset < chunk.end} == {0}, "all are warm"


@pytest.mark.parametrize("name", ["two images", "text first", "a picture in full before"])
def test_the_law_of_sharing_can_fail(
    breakable: Engine, alone: dict[str, list[Answer]], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    sabotage.trust_blocks_of_this_step(monkeypatch)
    dirty(breakable)
    answers = breakable.generate(*BATCHES[name])
    assert max(difference(one, answer) for one, answer in zip(alone[name], answers, strict=True)) > 100 * SAME
    dirty(breakable)
    assert max(difference(alone[name][-1], answer) for answer in two_answers(breakable, BATCHES[name][-1])) > 100 * SAME


def two_answers(engine: Engine, asked: dict[str, Any]) -> list[Answer]:
    """`n = 2`, both of the likeliest tokens. Said without a temperature of 0: vLLM refuses to be greedy twice."""
    params = SamplingParams(n=2, top_k=1, max_tokens=engines.NUM_TOKENS, ignore_eos=True, logprobs=engines.VOCABULARY)
    (output,) = engine.llm.generate([asked], params, use_tqdm=False)
    return engines.answers_of(output)


def _prompt(asked: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": asked["prompt"]}
