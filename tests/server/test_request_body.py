"""Bodies that are small enough to be read, and would keep the server from everybody else."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest

from server.completion_request import parse_completion_request
from server.errors import InvalidRequestError, PayloadTooLargeError
from server.request_body import MAX_MEMBERS, MAX_VALUES
from server.responses_request import parse_responses_request
from server.schemas import parse_chat_request
from server.tokenize_request import parse_detokenize_request, parse_tokenize_request

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
        parse_chat_request(body)
    assert (caught.value.status, caught.value.code) == (413, "too_many_values")


def test_names_of_megabytes_cost_no_more_than_their_reading() -> None:
    name = "k" * 8_000_000
    picture = '{"type": "image_url", "image_url": {"url": "data:"}}'
    tools = json.dumps([{"function": {"name": "f", "parameters": {name: {name: [0] * 20_000}}}}])
    started = time.process_time()
    parse_chat_request(f'{{"messages": [{{"role": "user", "content": [{picture}]}}], "tools": {tools}}}'.encode())
    for body in (
        f'{{"{name}": 1}}',
        f'{{"messages": [{{"role": "user", "content": [{{"type": "text", "{name}": 1}}]}}]}}',
    ):
        with pytest.raises(InvalidRequestError) as caught:
            parse_chat_request(body.encode())
        assert len(json.dumps(caught.value.body())) < 2000
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    ("parse", "around", "item", "param"),
    [
        (parse_chat_request, '{"messages": [...]}', "0", "messages[0]"),
        (parse_chat_request, '{"messages": [{"role": "user", "content": [...]}]}', "0", "messages[0].content[0]"),
        (parse_chat_request, '{"messages": [{"role": "a", "tool_calls": [...]}]}', "0", "messages[0].tool_calls[0]"),
        (parse_chat_request, '{"messages": [{"role": "user"}], "documents": [...]}', "0", "documents[0]"),
        (parse_responses_request, '{"input": [...]}', "0", "input[0]"),
        (parse_responses_request, '{"input": [{"role": "user", "content": [...]}]}', "0", "input[0].content[0]"),
        (parse_completion_request, '{"prompt": [...]}', "-1", "prompt[0]"),
        (parse_tokenize_request, '{"messages": [...]}', "0", "messages[0]"),
        (parse_tokenize_request, '{"messages": [{"role": "user"}], "tools": [...]}', "0", "tools[0]"),
        (parse_detokenize_request, '{"tokens": [...]}', "-1", "tokens[0]"),
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
