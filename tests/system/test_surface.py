"""OpenAI's surface on the real engine: what it answers where the gateway only passes on, and that no request breaks it.

One engine. The random model's words mean nothing; its counts, formats and refusals do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from engines import draw
from served import Server, data_url, served_model

from vd_plugin.schedule import Geometry, resolve

pytestmark = [pytest.mark.engine, pytest.mark.slow]

SCHEMA = {
    "type": "object",
    "properties": {"x": {"type": "boolean"}},
    "required": ["x"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "look", "description": "Look.", "parameters": SCHEMA}}


@pytest.fixture(scope="module")
def server(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served_model(random_model, tmp_path_factory.mktemp("surface")) as server:
        yield server


@pytest.fixture(scope="module")
def geometry(random_model: Path) -> Geometry:
    from transformers import AutoConfig

    from vd_plugin.options import read_geometry

    return read_geometry(AutoConfig.from_pretrained(random_model))


@pytest.fixture(autouse=True)
def _still_serving(server: Server) -> Iterator[None]:
    """After each test, whatever it sent."""
    yield
    assert server.ask(question="Hi?", max_tokens=1).choices


IMAGE = draw(336, 336)


def pruned(server: Server, **fields: Any) -> Any:
    extra = {"visual_token_budget": "low", **fields.pop("extra_body", {})}
    return server.ask(IMAGE, extra_body=extra, **fields)


def visual_tokens(answer: Any) -> dict[str, Any]:
    found: dict[str, Any] = answer.usage.model_dump()["visual_tokens"]
    return found


def post(server: Server, path: str, **fields: Any) -> httpx.Response:
    return httpx.post(server.url + path, json={"model": server.model, **fields}, timeout=60)


def refused(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in error["message"]
    return error


def test_choices_and_seeds(server: Server) -> None:
    options = {"n": 2, "temperature": 1, "seed": 3}
    first, second = (pruned(server, **options) for _ in range(2))
    assert [choice.index for choice in first.choices] == [0, 1]
    assert [a.message.content for a in first.choices] == [b.message.content for b in second.choices]
    assert visual_tokens(first)["images"] == 1
    assert first.usage.completion_tokens == 8


def test_stop_ends_an_answer(server: Server) -> None:
    whole = pruned(server, max_tokens=6).choices[0].message.content
    answer = pruned(server, max_tokens=6, stop=[whole[3]]).choices[0]
    assert answer.message.content == whole[: whole.index(whole[3])]
    assert answer.finish_reason == "stop"


def test_logprobs(server: Server) -> None:
    answer = pruned(server, max_tokens=2, logprobs=True, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    assert len(content) == 2
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in content)


def test_formats_bind_the_answer(server: Server) -> None:
    """A choice of words: an object of the random model would be white space for ever."""
    schema = {"name": "colour", "schema": {"enum": ["red", "green"]}}
    answer = pruned(server, max_tokens=12, response_format={"type": "json_schema", "json_schema": schema})
    assert json.loads(answer.choices[0].message.content) in ("red", "green")
    for outputs in ({"choice": ["yes", "no"]}, {"regex": "yes|no"}):
        answer = pruned(server, max_tokens=12, extra_body={"structured_outputs": outputs})
        assert answer.choices[0].message.content in ("yes", "no")


@pytest.mark.parametrize(
    "choice", [None, "auto", "required", {"type": "function", "function": {"name": "look"}}], ids=str
)
def test_tools_need_a_parser_in_the_engine(server: Server, choice: Any) -> None:
    """The template shows no tools, so that no parser is chosen; the refusal names the option (docs/api.md#tools)."""
    options = {} if choice is None else {"tool_choice": choice}
    with pytest.raises(openai.BadRequestError, match="tool-call-parser"):
        pruned(server, tools=[TOOL], **options)


def test_tools_may_be_in_the_history(server: Server) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    messages: list[Any] = [
        {"role": "user", "content": "Look!"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "A square."},
    ]
    options: dict[str, Any] = {"tools": [TOOL], "tool_choice": "none", "max_tokens": 2}
    answer = server.client.chat.completions.create(model=server.model, messages=messages, **options)
    assert answer.choices[0].message.content


def test_beams_share_a_pruned_image(server: Server, geometry: Geometry) -> None:
    answer = pruned(server, n=2, extra_body={"use_beam_search": True})
    assert len({choice.message.content for choice in answer.choices}) == 2
    assert visual_tokens(answer)["kept"] == resolve(geometry, 336, 336, 160).kept


def test_a_prompt_is_not_cut_through_a_image(server: Server) -> None:
    for side in ("left", "right"):
        with pytest.raises(openai.BadRequestError, match="image item") as error:
            pruned(server, extra_body={"truncate_prompt_tokens": 20, "truncation_side": side})
        assert error.value.param == "truncate_prompt_tokens"
    assert pruned(server, extra_body={"truncate_prompt_tokens": 1000}).choices


@pytest.mark.parametrize("fields", [{"echo": True}, {"prompt_logprobs": 0}], ids=str)
def test_prompts_are_scored_with_whole_images_only(server: Server, fields: dict[str, Any]) -> None:
    """The engine has no logits of rows that it dropped; asked for them it fails."""
    with pytest.raises(openai.BadRequestError, match="pruned"):
        pruned(server, extra_body=fields)
    text = server.ask(question="Hi?", extra_body=fields)
    assert text.choices[0].message.content


def test_token_ids_are_of_the_pruned_prompt(server: Server, geometry: Geometry) -> None:
    answer = pruned(server, max_tokens=2, extra_body={"return_token_ids": True}).model_dump()
    assert len(answer["prompt_token_ids"]) == answer["usage"]["prompt_tokens"]
    assert answer["usage"]["prompt_tokens_details"]["image_tokens"] == resolve(geometry, 336, 336, 160).num_placeholders
    assert len(answer["choices"][0]["token_ids"]) == 2


def test_a_marker_in_text_takes_no_images_place(server: Server) -> None:
    assert server.ask(question="What is <image> in SVG?").choices
    with pytest.raises(openai.BadRequestError, match="stands for an image"):
        pruned(server, question="What is <image> in SVG?")


def test_values_of_wrong_range_do_not_reach_the_engine(server: Server) -> None:
    """Those that its sampler takes but cannot compute with."""
    for fields in ({"top_k": 2**40}, {"repetition_penalty": 1e300}, {"length_penalty": 1e9, "use_beam_search": True}):
        assert refused(post(server, "/v1/chat/completions", messages=[{"role": "user", "content": "Hi"}], **fields))
    extremes = {"top_k": 2**31 - 1, "repetition_penalty": 1000, "temperature": 2, "min_p": 1, "max_tokens": 3}
    logit_bias = {"5": 1e308, "6": -1e308}
    for fields in (extremes, {**extremes, "repetition_penalty": 0.001, "logit_bias": logit_bias, "top_p": 1e-300}):
        response = post(server, "/v1/chat/completions", messages=[{"role": "user", "content": "Hi"}], **fields)
        assert response.status_code == 200, response.text
    beams = {"use_beam_search": True, "n": 2, "length_penalty": 10, "max_tokens": 3, "prompt": "a b"}
    assert post(server, "/v1/completions", **beams).status_code == 200


def test_completions(server: Server) -> None:
    answer = server.client.completions.create(model=server.model, prompt=["a", "b"], n=2, max_tokens=3, logprobs=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert visual_tokens(answer)["images"] == 0
    echoed = server.client.completions.create(model=server.model, prompt="a b", echo=True, max_tokens=0, logprobs=0)
    assert echoed.choices[0].text == "a b"
    stream = server.client.completions.create(
        model=server.model,
        prompt=[1, 5, 6],
        max_tokens=3,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = stream
    whole = server.client.completions.create(model=server.model, prompt=[1, 5, 6], max_tokens=3, temperature=0)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert last.usage.prompt_tokens == 3
    assert visual_tokens(last)["images"] == 0
    assert "vocabulary" in refused(post(server, "/v1/completions", prompt=[10**6]))["message"]


def test_tokens_there_and_back(server: Server) -> None:
    ids = post(server, "/tokenize", prompt="A red square", add_special_tokens=False).json()
    assert ids["count"] == len(ids["tokens"])
    assert post(server, "/detokenize", tokens=ids["tokens"]).json() == {"prompt": "A red square"}
    messages = [{"role": "user", "content": "Hi?"}]
    chat = post(server, "/tokenize", messages=messages, return_token_strs=True).json()
    answer = server.client.chat.completions.create(model=server.model, messages=messages, max_tokens=1)  # type: ignore[arg-type]
    assert chat["count"] == len(chat["token_strs"]) == answer.usage.prompt_tokens  # type: ignore[union-attr]
    assert post(server, "/detokenize", tokens=[2**31 - 1]).status_code == 200


def image_input() -> list[Any]:
    parts = [{"type": "input_image", "image_url": data_url(IMAGE)}, {"type": "input_text", "text": "What is this?"}]
    return [{"role": "user", "content": parts}]


def test_responses_with_a_pruned_image(server: Server, geometry: Geometry) -> None:
    options: dict[str, Any] = {
        "model": server.model,
        "input": image_input(),
        "max_output_tokens": 16,
        "temperature": 0,
        "extra_body": {"visual_token_budget": "low"},
    }
    answer = server.client.responses.create(**options)
    chat = pruned(server, max_tokens=16)
    assert answer.output_text == chat.choices[0].message.content
    assert visual_tokens(answer) == visual_tokens(chat)
    usage = answer.usage.model_dump()
    assert usage["input_tokens"] == chat.usage.prompt_tokens
    assert usage["input_tokens_details"]["image_tokens"] == resolve(geometry, 336, 336, 160).num_placeholders
    events = list(server.client.responses.create(stream=True, **options))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == answer.output_text
    assert events[-1].type == "response.completed"
    assert visual_tokens(events[-1].response) == visual_tokens(chat)


def test_responses_in_several_turns(server: Server, geometry: Geometry) -> None:
    first = server.client.responses.create(model=server.model, input=image_input(), max_output_tokens=16)
    said = [item.model_dump() for item in first.output]
    answer = server.client.responses.create(
        model=server.model,
        input=[*image_input(), *said, *image_input()],
        instructions="Be kind.",
        max_output_tokens=16,
    )
    assert visual_tokens(answer)["images"] == 2
    with pytest.raises(openai.BadRequestError, match="keeps no responses"):
        server.client.responses.create(model=server.model, input="Hi", previous_response_id=first.id)


def test_no_planned_count_was_wrong(server: Server) -> None:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    assert [float(line.split()[-1]) for line in lines if line.startswith("visiondrop_schedule_mismatch_total")] == [0]
