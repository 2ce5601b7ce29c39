"""Bodies that are small enough to be read, and would keep the server from everybody else."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest

from server.errors import InvalidRequestError, PayloadTooLargeError
from server.schemas.chat import ChatRequest
from server.schemas.completions import CompletionRequest
from server.schemas.parse import MAX_MEMBERS, MAX_VALUES
from server.schemas.responses import ResponsesRequest
from server.schemas.tokens import DetokenizeRequest, TokenizeRequest

MANY = MAX_VALUES // 4


def repeated(around: str, item: str, number: int) -> bytes:
    return around.replace("...", ",".join([item] * number)).encode()


@pytest.mark.parametrize(
    "body",
    [
        repeated('{"messages": [...]}', '{"role": ""}', MAX_MEMBERS // 2),
        repeated('{"messages": [{"role": "user", "content": [...]}]}', "{}", MAX_MEMBERS),
        repeated('{"messages": [{"role": "user", "x": [...]}]}', "[]", MAX_MEMBERS),
        repeated('{"messages": [{"role": "user", "x": [...]}]}', "0", MAX_VALUES + 1),
    ],
)
def test_a_body_of_very_many_values_is_refused_unread(body: bytes) -> None:
    with pytest.raises(PayloadTooLargeError) as caught:
        ChatRequest.parse(body)
    assert (caught.value.status, caught.value.code) == (413, "too_many_values")


def test_names_of_megabytes_cost_no_more_than_their_reading() -> None:
    name = "k" * 8_000_000
    image = '{"type": "image_url", "image_url": {"url": "data:"}}'
    tools = json.dumps([{"function": {"name": "f", "parameters": {name: {name: [0] * 20_000}}}}])
    started = time.process_time()
    ChatRequest.parse(f'{{"messages": [{{"role": "user", "content": [{image}]}}], "tools": {tools}}}'.encode())
    for body in (
        f'{{"{name}": 1}}',
        f'{{"messages": [{{"role": "user", "content": [{{"type": "text", "{name}": 1}}]}}]}}',
    ):
        with pytest.raises(InvalidRequestError) as caught:
            ChatRequest.parse(body.encode())
        assert len(json.dumps(caught.value.body())) < 2000
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    ("parse", "around", "item", "param"),
    [
        (ChatRequest.parse, '{"messages": [...]}', "0", "messages[0]"),
        (ChatRequest.parse, '{"messages": [{"role": "user", "content": [...]}]}', "0", "messages[0].content[0]"),
        (
            ChatRequest.parse,
            '{"messages": [{"role": "assistant", "tool_calls": [...]}]}',
            "0",
            "messages[0].tool_calls[0]",
        ),
        (ChatRequest.parse, '{"messages": [{"role": "assistant"}], "documents": [...]}', "0", "documents[0]"),
        (ResponsesRequest.parse, '{"input": [...]}', "0", "input[0]"),
        (ResponsesRequest.parse, '{"input": [{"role": "user", "content": [...]}]}', "0", "input[0].content[0]"),
        (CompletionRequest.parse, '{"prompt": [...]}', "-1", "prompt[0]"),
        (TokenizeRequest.parse, '{"messages": [...]}', "0", "messages[0]"),
        (TokenizeRequest.parse, '{"messages": [{"role": "assistant"}], "tools": [...]}', "0", "tools[0]"),
        (DetokenizeRequest.parse, '{"tokens": [...]}', "-1", "tokens[0]"),
    ],
)
def test_the_first_wrong_value_ends_the_reading(
    parse: Callable[[bytes], object], around: str, item: str, param: str
) -> None:
    body = repeated(around, item, MANY)
    started = time.process_time()
    with pytest.raises(InvalidRequestError) as caught:
        parse(body)
    assert caught.value.param == param
    assert time.process_time() - started < 2  # a complaint for each would take ten seconds


@pytest.mark.parametrize(
    ("parse", "param"),
    [(ChatRequest.parse, "messages"), (CompletionRequest.parse, "prompt"), (ResponsesRequest.parse, "input")],
    ids=["chat", "completions", "responses"],
)
def test_the_field_that_is_missing_is_named_before_one_that_is_wrong(
    parse: Callable[[bytes], object], param: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse(b'{"temperature": 9}')
    assert caught.value.param == param
