"""Text completions and tokens: checked, passed through, with usage in our shape."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from fake_engine import MODEL, FakeEngine, sse_data
from gateway import assert_error

pytestmark = pytest.mark.anyio

ROUTE = "/v1/completions"
NO_IMAGES = {"images": 0, "full": 0, "kept": 0, "saved": 0, "per_image": []}


async def test_fields_reach_the_engine_as_they_were_sent(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    body = {"model": MODEL, "prompt": ["a", "b"], "n": 2, "temperature": 1, "logit_bias": {"5": 1}, "stop": "x"}
    response = await client.post(ROUTE, json={**body, "seed": None, "priority": None})

    assert response.status_code == 200, response.text
    assert engine.calls == [(ROUTE, body)]
    assert json.dumps(engine.calls[0][1]["temperature"]) == "1"
    usage = response.json()["usage"]
    assert usage["visual_tokens"] == NO_IMAGES
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0, "image_tokens": 0, "text_tokens": 4}
    assert response.headers["x-visual-tokens-full"] == "0"


@pytest.mark.parametrize("asked", [True, False])
async def test_a_stream_ends_with_usage_if_asked(client: httpx.AsyncClient, engine: FakeEngine, asked: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if asked else {}
    async with client.stream("POST", ROUTE, json={"prompt": "a", "stream": True, **options}) as response:
        *events, done = await sse_data(response.aiter_bytes())
    assert done == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) == "a b"
    assert [chunk["usage"]["visual_tokens"] for chunk in chunks if "usage" in chunk] == [NO_IMAGES] * asked
    assert engine.calls[0][1]["stream_options"]["include_usage"] is True


@pytest.mark.parametrize("prompt", ["a", ["a", "b"], [1, 2], [[1], [2, 3]]])
async def test_prompts_have_four_forms(client: httpx.AsyncClient, engine: FakeEngine, prompt: Any) -> None:
    assert (await client.post(ROUTE, json={"prompt": prompt})).status_code == 200
    assert engine.calls[0][1] == {"prompt": prompt}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({}, "prompt", "required"),
        ({"prompt": ""}, "prompt", "at least 1"),
        ({"prompt": []}, "prompt", "list of token ids"),
        ({"prompt": {"a": 1}}, "prompt", "list of token ids"),
        ({"prompt": [1, "a"]}, "prompt[1]", "integer"),
        ({"prompt": [-1]}, "prompt[0]", "greater"),
        ({"prompt": [[1], []]}, "prompt[1]", "at least 1"),
        ({"prompt": ["a"] * 9, "n": 128}, "n", "at most 1024"),
        ({"prompt": "a", "n": 129}, "n", "128"),
        ({"prompt": "a", "min_pixels": 3}, "min_pixels", "takes no images"),
        ({"prompt": "a", "prompt_embeds": "AAAA"}, "prompt_embeds", "cannot be set"),
        ({"prompt": "a", "suffix": "b"}, "suffix", "no effect"),
        ({"prompt": "a", "best_of": 2}, "best_of", "use 'n'"),
        ({"prompt": "a", "tools": []}, "tools", "/v1/chat/completions has them"),
        ({"prompt": "a", "functions": []}, "functions", "/v1/chat/completions has them"),
        ({"prompt": "a", "messages": []}, "messages", "use 'prompt'"),
        ({"prompt": "a", "max_completion_tokens": 3}, "max_completion_tokens", "use 'max_tokens'"),
        ({"prompt": "a", "store": True}, "store", "keeps no answers"),
        ({"prompt": "a", "logprobs": True, "temprature": 1}, "temprature", "'temperature'"),
        ({"prompt": "a", "top_k": 2**31}, "top_k", "less than"),
        ({"prompt": "a", "length_penalty": 100}, "length_penalty", "less than"),
    ],
)
async def test_bad_requests_get_a_sentence(
    client: httpx.AsyncClient, engine: FakeEngine, fields: dict[str, Any], param: str, words: str
) -> None:
    assert_error(await client.post(ROUTE, json=fields), 400, param, words)
    assert not engine.calls


async def test_nobody_is_sent_to_the_budget_which_has_no_effect_here(client: httpx.AsyncClient) -> None:
    response = await client.post(ROUTE, json={"prompt": "a", "visual_tokens_budget": 64})
    assert response.json()["error"]["message"] == "unknown field 'visual_tokens_budget'"
