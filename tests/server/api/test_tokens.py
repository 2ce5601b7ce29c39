"""Tokens of texts, and texts of tokens."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from asgi_transport import AsgiTransport
from fake_engine import FakeEngine
from gateway import assert_error, make_app
from images import image
from wire import until

from server.api.tokens import LONGEST_BYTES
from server.settings import Settings

pytestmark = pytest.mark.anyio


async def test_tokens_of_texts_and_conversations(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    answer = (await client.post("/tokenize", json={"prompt": "one two", "return_token_strs": True})).json()
    assert answer == {"count": 2, "max_model_len": 99, "tokens": [0, 1], "token_strs": ["one", "two"]}
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    assert (await client.post("/tokenize", json={"messages": messages})).status_code == 200
    assert engine.calls[-1] == ("/tokenize", {"messages": messages})
    assert (await client.post("/detokenize", json={"tokens": [1, 2]})).json() == {"prompt": "word word "}


@pytest.mark.parametrize(
    ("path", "fields", "param", "words"),
    [
        ("/tokenize", {}, "prompt", "either"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt", "either"),
        ("/tokenize", {"prompt": "a", "tools": []}, "tools", "messages"),
        ("/tokenize", {"prompt": "a", "chat_template": "b"}, "chat_template", "cannot be set"),
        ("/tokenize", {"prompt": "a", "mm_processor_kwargs": {}}, "mm_processor_kwargs", "cannot be set"),
        (
            "/tokenize",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": image()}}]}]},
            "messages[0].content[0]",
            "/v1/visual_tokens/count",
        ),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]", "greater"),
        ("/detokenize", {"tokens": "a"}, "tokens", "list"),
        ("/detokenize", {"tokens": [1], "x": 1}, "x", "unknown field"),
    ],
)
async def test_bad_token_requests_get_a_sentence(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, fields: dict[str, Any], param: str, words: str
) -> None:
    assert_error(await client.post(path, json=fields), 400, param, words)
    assert not engine.calls


@pytest.mark.parametrize(("path", "body"), [("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})])
async def test_the_header_that_a_client_sends_everywhere_must_be_a_budget(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, body: dict[str, Any]
) -> None:
    for value in ("0", "lots"):
        response = await client.post(path, json=body, headers={"X-Visual-Token-Budget": value})
        assert_error(response, 400, "X-Visual-Token-Budget", "at least 32")
    assert not engine.calls
    assert (await client.post(path, json=body, headers={"X-Visual-Token-Budget": "64"})).status_code == 200


async def test_a_conversation_is_tokenized_as_chat_sends_it(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    part = {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}, "name": "a"}
    body = {"messages": [{"role": "user", "content": [part]}], "add_generation_prompt": False}
    assert (await client.post("/tokenize", json=body)).status_code == 200
    plain = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    assert engine.calls == [("/tokenize", {**body, "messages": plain})]


async def test_failures_of_the_engine_are_passed_on(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.refusal = (500, {"error": {"message": "CUDA"}})
    assert (await client.post("/tokenize", json={"prompt": "a"})).status_code == 502


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/tokenize", {"prompt": "x" * LONGEST_BYTES}),
        ("/tokenize", {"messages": [{"role": "user", "content": "x" * LONGEST_BYTES}]}),
        ("/detokenize", {"tokens": [10] * (LONGEST_BYTES // 2)}),
    ],
)
async def test_what_would_hold_up_the_tokenizer_for_seconds_is_refused(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, fields: dict[str, Any]
) -> None:
    response = await client.post(path, json=fields)
    assert_error(response, 413, None, f"a request to {path} has at most 1048576 bytes")
    assert not engine.calls


async def test_large_texts_go_to_the_tokenizer_a_few_at_a_time_and_small_ones_pass(engine: FakeEngine) -> None:
    """vLLM tokenizes one after another, for generating requests as well."""
    engine.hold_before_answer = True
    app = make_app(Settings(), engine)
    async with (
        httpx.AsyncClient(transport=AsgiTransport(app, "192.0.2.1"), base_url="http://gateway") as busy,
        httpx.AsyncClient(transport=AsgiTransport(app, "192.0.2.2"), base_url="http://gateway") as quiet,
    ):
        texts = [asyncio.ensure_future(busy.post("/tokenize", json={"prompt": "x" * 200_000})) for _ in range(5)]
        small = asyncio.ensure_future(quiet.post("/tokenize", json={"prompt": "x"}))
        await until(lambda: {"prompt": "x"} in engine.bodies)
        assert len(engine.bodies) == 2
        engine.hold_before_answer = False
        for request in (texts[0], small):
            request.cancel()
        assert [answer.status_code for answer in await asyncio.gather(*texts[1:])] == [200] * 4
