"""Tokens of texts, and texts of tokens."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine
from gateway import assert_error
from images import image

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


async def test_failures_of_the_engine_are_passed_on(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.refusal = (500, {"error": {"message": "CUDA"}})
    assert (await client.post("/tokenize", json={"prompt": "a"})).status_code == 502
