"""POST /v1/responses: stateless, images with budgets, usage in the body and in the last event."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from fake_engine import GEOMETRY, MODEL, WORDS, FakeEngine
from gateway import assert_error, gateway
from images import image

from server.schemas.responses import ResponsesRequest
from vd_plugin.schedule import resolve

pytestmark = pytest.mark.anyio

ROUTE = "/v1/responses"
LONG = "a lot " * 100


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


def ask(*urls: str, **fields: Any) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "input_image", "image_url": url} for url in urls]
    return {"input": [{"role": "user", "content": [*parts, {"type": "input_text", "text": "What?"}]}], **fields}


async def events_of(client: httpx.AsyncClient, body: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    async with client.stream("POST", ROUTE, json={**body, "stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        text = b"".join([chunk async for chunk in response.aiter_bytes()]).decode()
    events = []
    for block in text.split("\n\n")[:-1]:
        name, data = block.split("\n")
        events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return events


async def test_nothing_is_stored_and_values_are_left_as_they_came(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    text = {"format": {"type": "json_schema", "name": "a", "schema": {"type": "object"}}}
    fields = {"input": "Hi", "model": MODEL, "temperature": 1, "metadata": {"a": "b"}, "text": text}
    response = await client.post(ROUTE, json={**fields, "previous_response_id": None})
    assert response.status_code == 200, response.text
    assert engine.calls == [(ROUTE, {**fields, "store": False})]
    usage = response.json()["usage"]
    assert usage["visual_tokens"]["images"] == 0
    assert usage["input_tokens_details"] == {
        "cached_tokens": 2,
        "cache_write_tokens": 0,
        "image_tokens": 0,
        "text_tokens": 10,
    }


async def test_what_has_no_effect_is_accepted_and_kept_from_the_engine(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    sent_back = {
        "metadata": {"run": "7"},
        "prompt_cache_key": "k",
        "reasoning": {"effort": "low", "summary": "auto"},
        "service_tier": "default",
        "text": {"verbosity": "low"},
        "user": "eve",
    }
    fields = {
        "include": ["reasoning.encrypted_content", "web_search_call.results"],
        "prompt_cache_options": {"mode": "explicit"},
        "prompt_cache_retention": "24h",
        "safety_identifier": "s",
        "store": False,
        "stream_options": {"include_obfuscation": False},
    }
    part = {"type": "input_text", "text": "Hi"}
    marked = {**part, "cache_control": {"type": "ephemeral"}, "prompt_cache_breakpoint": {"mode": "explicit"}}
    body = {"input": [{"role": "user", "content": [marked]}], **sent_back}
    response = await client.post(ROUTE, json={**body, **fields})
    assert response.status_code == 200, response.text
    plain = [{"role": "user", "content": [part]}]
    assert engine.calls == [(ROUTE, {**body, "input": plain, "store": False})]


@pytest.mark.parametrize("part", [{"type": "output_text", "text": LONG}, {"type": "refusal", "refusal": LONG}])
def test_all_text_of_a_prompt_has_its_cost(part: dict[str, Any]) -> None:
    body = {"input": [{"role": "assistant", "content": [part]}]}
    assert ResponsesRequest.parse(json.dumps(body).encode()).text_tokens() == len(LONG) // 4


async def test_of_what_may_be_included_log_probabilities_are(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    wish = ["reasoning.encrypted_content", "message.output_text.logprobs"]
    assert (await client.post(ROUTE, json={"input": "a", "include": wish})).status_code == 200
    assert engine.calls[0][1]["include"] == ["message.output_text.logprobs"]


async def test_budgets_reach_the_engine_and_their_savings_the_client(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    body = ask(image(800, 600), visual_token_budget="low")
    body["input"] += [{"role": "assistant", "content": [{"type": "output_text", "text": "A."}]}]
    body["input"] += ask(image(1008, 336))["input"]
    response = await client.post(ROUTE, json=body)

    sent = engine.calls[0][1]
    plans = [resolve(GEOMETRY, 600, 800, 160), resolve(GEOMETRY, 336, 1008, 160)]
    assert sent["mm_processor_kwargs"] == {"visual_token_budget": [160, 160]}
    assert "visual_token_budget" not in sent
    assert sent["input"][1] == body["input"][1]
    assert [part["type"] for part in sent["input"][2]["content"]] == ["input_image", "input_text"]
    usage = response.json()["usage"]
    tokens = sum(plan.num_placeholders for plan in plans)
    assert usage["input_tokens_details"]["image_tokens"] == tokens
    assert usage["input_tokens"] == tokens + 10
    assert usage["visual_tokens"]["saved"] == sum(plan.saved for plan in plans)
    assert response.headers["x-visual-tokens-saved"] == str(usage["visual_tokens"]["saved"])


async def test_a_stream_has_named_events_and_ends_with_usage(client: httpx.AsyncClient) -> None:
    body = ask(image(800, 600), visual_token_budget="low")
    events = await events_of(client, body)
    assert all(name == event["type"] for name, event in events)
    assert "".join(event.get("delta", "") for _, event in events) == "".join(WORDS)
    name, last = events[-1]
    assert name == "response.completed"
    assert last["response"]["usage"] == (await client.post(ROUTE, json=body)).json()["usage"]


async def test_an_error_event_goes_on_with_the_numbers(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.break_after = 2
    name, last = (await events_of(client, ask(image())))[-1]
    assert name == last["type"] == "error"
    assert last["sequence_number"] == 2
    assert last["message"] == last["error"]["message"]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "input", "required"),
        ({"input": []}, "input", "at least 1"),
        ({"input": 3}, "input", "string or a list"),
        ({"input": "a", "store": True}, "store", "keeps no responses"),
        ({"input": "a", "background": True}, "background", "keeps no responses"),
        ({"input": "a", "previous_response_id": "r"}, "previous_response_id", "keeps no responses"),
        ({"input": "a", "tools": [{"type": "web_search"}]}, "tools", "chat/completions"),
        ({"input": "a", "tool_choice": "required"}, "tool_choice", ""),
        ({"input": "a", "prompt": {"id": "p"}}, "prompt", "stored prompts"),
        ({"input": "a", "include": ["everything"]}, "include[0]", "logprobs"),
        ({"input": "a", "functions": []}, "functions", "chat/completions"),
        ({"input": "a", "conversation": "c"}, "conversation", "keeps no responses"),
        ({"input": "a", "response_format": {}}, "response_format", "use 'text.format'"),
        ({"input": "a", "reasoning_effort": "low"}, "reasoning_effort", "use 'reasoning.effort'"),
        ({"input": "a", "verbosity": "low"}, "verbosity", "use 'text.verbosity'"),
        ({"input": "a", "messages": []}, "messages", "use 'input'"),
        ({"input": "a", "modalities": ["text"]}, "modalities", "unknown field"),
        (
            {"input": "a", "stream_options": {"continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
            "",
        ),
        ({"input": "a", "mm_processor_kwargs": {}}, "mm_processor_kwargs", "cannot be set"),
        ({"input": "a", "max_tokens": 3}, "max_tokens", "'max_output_tokens'"),
        ({"input": "a", "min_pixels": 3}, "min_pixels", "'visual_token_budget'"),
        ({"input": [{"type": "function_call_output", "call_id": "1", "output": "a"}]}, "input[0]", "only messages"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]},
            "input[0].content[0]",
            "files",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "a", "file_id": "f"}]}]},
            "input[0].content[0].file_id",
            "no files",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "a", "uuid": "f"}]}]},
            "input[0].content[0].uuid",
            "caches",
        ),
        (ask("data:image/png;base64,aGVsbG8="), "input[0].content[0].image_url", "not a JPEG"),
        (ask(image(), visual_token_budget=31), "visual_token_budget", "at least 32"),
        (ask(image(), instructions="an <image>"), "instructions", "<image>"),
    ],
)
async def test_bad_requests_get_a_sentence(
    client: httpx.AsyncClient, engine: FakeEngine, body: dict[str, Any], param: str, words: str
) -> None:
    response = await client.post(ROUTE, json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param, error
    assert words in error["message"]
    assert not engine.calls


async def test_too_many_images_for_any_minute_name_the_input(engine: FakeEngine) -> None:
    async with gateway(engine, images_per_minute=1) as client:
        response = await client.post(ROUTE, json=ask(image(), image()))
    assert_error(response, 400, "input", "never pass")
    assert not engine.calls
