"""Tools on the demo model's engine. Its template shows it none, so that no parser is chosen for it; but a call can be
forced where there is a parser: the engine lets the model write nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from served import Server, served_model

from vd_plugin.demo import find_model
from vd_plugin.demo.scenes import draw
from vd_plugin.demo.split import evaluation_split

pytestmark = [pytest.mark.engine, pytest.mark.slow]

COLORS = ["red", "blue"]
TOOL = {
    "type": "function",
    "function": {
        "name": "paint",
        "description": "Paint it.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"color": {"enum": COLORS}},
            "required": ["color"],
            "additionalProperties": False,
        },
    },
}
NAMED = {"type": "function", "function": {"name": "paint"}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
    with served_model(None, tmp_path_factory.mktemp("tools"), *options) as server:
        yield server


@pytest.fixture(scope="module")
def no_spaces() -> dict[str, int]:
    """A `logit_bias`: JSON may have any number of spaces, and a small model may write them for ever."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(find_model())
    return {str(token): -100 for token in range(len(tokenizer)) if tokenizer.decode([token]).isspace()}


def ask(server: Server, choice: Any, no_spaces: dict[str, int], **options: Any) -> Any:
    image = draw(evaluation_split(1)[0].scene)
    fixed = {"tools": [TOOL], "tool_choice": choice, "parallel_tool_calls": False, "logit_bias": no_spaces}
    return server.ask(image, max_tokens=200, extra_body={"visual_token_budget": "low"}, **fixed, **options)


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_forced_call_is_a_call(server: Server, no_spaces: dict[str, int], choice: Any) -> None:
    answer = ask(server, choice, no_spaces)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "paint"
    assert json.loads(call.function.arguments)["color"] in COLORS
    assert answer.usage.model_dump()["visual_tokens"]["saved"] > 0


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_forced_call_comes_in_a_stream(server: Server, no_spaces: dict[str, int], choice: Any) -> None:
    name = arguments = text = ""
    for chunk in ask(server, choice, no_spaces, stream=True):
        for part in chunk.choices:
            text += part.delta.content or ""
            for call in part.delta.tool_calls or []:
                name += call.function.name or ""
                arguments += call.function.arguments or ""
    assert name == "paint"
    assert json.loads(arguments)["color"] in COLORS
    assert not text.strip()


def test_the_result_of_a_call_can_be_sent_back(server: Server, no_spaces: dict[str, int]) -> None:
    message = ask(server, NAMED, no_spaces).choices[0].message
    messages = [
        {"role": "user", "content": "Paint it."},
        message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "Done."},
    ]
    options: dict[str, Any] = {"tools": [TOOL], "tool_choice": "none", "max_tokens": 2}
    assert server.client.chat.completions.create(model=server.model, messages=messages, **options).choices


def test_a_call_of_no_tool_is_refused(server: Server, no_spaces: dict[str, int]) -> None:
    with pytest.raises(openai.BadRequestError, match="does not match"):
        ask(server, {"type": "function", "function": {"name": "sing"}}, no_spaces)
