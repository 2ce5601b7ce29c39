"""Keys, rates and places in the queue, as a client meets them."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from asgi_transport import AsgiTransport
from fake_engine import GEOMETRY, FakeEngine
from gateway import make_app
from images import ask, picture
from metric_text import metric, metrics_of, until_metric
from wire import Wire

from server.admission.drain import Drain
from server.app import metrics_app_of
from server.engine.client import HttpEngineClient
from server.settings import Settings

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
TEXT = {"messages": [{"role": "user", "content": "Hi"}]}

KEYS = """
[keys.shop]
secret = "shop-secret"
max_budget = "low"
images_per_minute = 3

[keys.lab]
secret = "lab-secret"
requests_per_minute = 2
"""


@asynccontextmanager
async def gateway(
    *engines: FakeEngine, drain: Drain | None = None, **settings: Any
) -> AsyncIterator[httpx.AsyncClient]:
    app = make_app(Settings(**settings), *engines, drain=drain)
    async with httpx.AsyncClient(transport=AsgiTransport(app), base_url="http://gateway") as client:
        yield client


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys.toml"
    path.write_text(KEYS)
    path.chmod(0o600)
    return path


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


async def test_all_routes_but_liveness_need_a_key(engine: FakeEngine, keys: Path) -> None:
    async with gateway(engine, api_keys_file=keys) as client:
        for method, path in [
            ("POST", CHAT),
            ("POST", "/v1/visual_tokens/count"),
            ("POST", "/v1/completions"),
            ("POST", "/tokenize"),
            ("GET", "/v1/models"),
            ("GET", "/v1/models/fake-llava"),
            ("GET", "/ready"),
            ("GET", "/metrics"),
            ("GET", "/metrics/engine/0"),
            ("GET", "/openapi.json"),
            ("GET", "/nothing"),
            ("GET", "/health/"),
        ]:
            for headers in ({}, bearer("shop-secreT"), {"Authorization": "Basic c2hvcDo="}):
                response = await client.request(method, path, headers=headers)
                assert response.status_code == 401, (method, path)
                assert response.json()["error"]["code"] in ("missing_api_key", "invalid_api_key")
                assert response.headers["www-authenticate"] == "Bearer"
                assert response.headers["x-request-id"]
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/ready", headers=bearer("shop-secret"))).status_code == 200
        assert not engine.bodies
        text = (await client.get("/metrics", headers=bearer("lab-secret"))).text
        assert metric(text, 'visiondrop_rejections_total{reason="invalid_api_key"}') == 36


async def test_keys_ceiling_lowers_budgets(engine: FakeEngine, keys: Path) -> None:
    async with gateway(engine, api_keys_file=keys) as client:
        body = ask(picture(800, 600), visual_token_budget="full")
        response = await client.post(CHAT, json=body, headers=bearer("shop-secret"))
        assert response.headers["x-visual-token-budget"] == "160"
        response = await client.post(CHAT, json=body, headers=bearer("lab-secret"))
        assert response.headers["x-visual-token-budget"] == "full"
        (card,) = (await client.get("/v1/models", headers=bearer("shop-secret"))).json()["data"]
        assert card["visual_token_budget"]["maximum"] == 160


async def test_rates_are_per_key_and_tell_when_to_come_back(engine: FakeEngine, keys: Path) -> None:
    async with gateway(engine, api_keys_file=keys) as client:
        for remaining in ("1", "0"):
            response = await client.post(CHAT, json=TEXT, headers=bearer("lab-secret"))
            assert response.status_code == 200
            assert response.headers["x-ratelimit-remaining-requests"] == remaining
        response = await client.post(CHAT, json=TEXT, headers=bearer("lab-secret"))
        assert response.status_code == 429
        assert 1 <= int(response.headers["retry-after"]) <= 60
        assert response.json()["error"]["code"] == "rate_limit_exceeded"
        assert response.headers["x-ratelimit-limit-requests"] == "2"

        shop = bearer("shop-secret")
        assert (await client.post(CHAT, json=TEXT, headers=shop)).status_code == 200, "the other key has its own rate"
        assert (await client.post(CHAT, json=ask(*[picture()] * 2), headers=shop)).status_code == 200
        response = await client.post(CHAT, json=ask(*[picture()] * 2), headers=shop)
        assert response.status_code == 429
        assert (await client.post(CHAT, json=ask(picture()), headers=shop)).status_code == 200, "one was left"
        response = await client.post(CHAT, json=ask(*[picture()] * 4), headers=shop)
        assert response.status_code == 400, "four can never pass"
        text = (await client.get("/metrics", headers=shop)).text
        assert metric(text, 'visiondrop_rejections_total{reason="requests_per_minute"}') == 1
        assert metric(text, 'visiondrop_rejections_total{reason="images_per_minute"}') == 1


async def test_log_names_the_key_and_never_shows_it(
    engine: FakeEngine, keys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "visiondrop.requests")
    async with gateway(engine, api_keys_file=keys) as client:
        await client.post(CHAT, json=ask(picture()), headers=bearer("shop-secret"))
        await client.post(CHAT, json=ask(picture()), headers=bearer("wrong-secret"))
    lines = [json.loads(item.message) for item in caplog.records if item.name == "visiondrop.requests"]
    assert [line["key"] for line in lines] == ["shop", None]
    assert [line["status"] for line in lines] == [200, 401]
    for word in ("secret", "base64", "What is it"):
        assert word not in caplog.text


async def test_requests_above_capacity_wait_and_then_run_in_order(engine: FakeEngine) -> None:
    engine.hold_before_answer = True
    async with gateway(engine, max_inflight_tokens=100, max_queued_requests=2) as client:
        body = {**ask(picture(800, 600), visual_token_budget=90), "stream": False}
        first = asyncio.ensure_future(client.post(CHAT, json=body))
        await asyncio.wait_for(engine.asked.wait(), 5)
        waiting = [asyncio.ensure_future(client.post(CHAT, json=body)) for _ in range(2)]
        await until_metric(client, "visiondrop_queue_depth", 2)
        refused = await client.post(CHAT, json=body)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "queue_full"
        assert 1 <= int(refused.headers["retry-after"]) <= 120
        assert len(engine.bodies) == 1

        waiting[0].cancel()  # this client leaves the queue
        await until_metric(client, "visiondrop_queue_depth", 1)
        engine.hold_before_answer = False
        first.cancel()  # ... and this one the engine, which makes a place
        assert (await waiting[1]).status_code == 200
        text = await metrics_of(client)
        assert metric(text, "visiondrop_queue_depth") == 0
        assert metric(text, "visiondrop_inflight_requests") == 0
        assert metric(text, 'visiondrop_rejections_total{reason="queue_full"}') == 1
        assert metric(text, "visiondrop_queue_seconds_count") == 3, "the refused one has not waited"
        assert len(engine.bodies) == 2


LONG = "a lot " * 100


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function", "function": {"name": "f", "description": LONG}}]},
        {"documents": [{"text": LONG}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": LONG}}]}]},
        {"messages": [{"role": "assistant", "content": [{"type": "refusal", "refusal": LONG}]}]},
    ],
)
async def test_all_text_of_a_prompt_has_its_cost(engine: FakeEngine, fields: dict[str, Any]) -> None:
    engine.hold = True
    async with (
        gateway(engine, max_inflight_tokens=100, queue_seconds=0.1) as client,
        client.stream("POST", CHAT, json=ask(stream=True)) as response,
    ):
        await anext(response.aiter_bytes())
        late = await client.post(CHAT, json={**ask(), **fields})
        assert (late.status_code, late.json()["error"]["code"]) == (503, "queue_timeout")


async def test_stream_keeps_its_place_until_its_last_byte(engine: FakeEngine) -> None:
    engine.hold = True
    async with gateway(engine, max_inflight_tokens=100, queue_seconds=0.1) as client:
        body = ask(picture(800, 600), visual_token_budget=90, stream=True)
        async with client.stream("POST", CHAT, json=body) as response:
            await anext(response.aiter_bytes())
            late = await client.post(CHAT, json=body)
            assert late.status_code == 503
            assert late.json()["error"]["code"] == "queue_timeout"
            assert metric(await metrics_of(client), "visiondrop_queue_seconds_sum") >= 0.1
        engine.hold = False
        assert (await client.post(CHAT, json={**body, "stream": False})).status_code == 200


async def test_request_planned_for_an_engine_that_was_replaced_meanwhile_is_told_to_come_again(
    engine: FakeEngine,
) -> None:
    engine.hold = True
    wire = Wire(engine)
    app = make_app(Settings(max_inflight_tokens=100), HttpEngineClient(wire))
    body = ask(picture(800, 600), visual_token_budget=90)
    async with httpx.AsyncClient(transport=AsgiTransport(app), base_url="http://gateway") as client:
        async with client.stream("POST", CHAT, json={**body, "stream": True}) as response:
            await anext(response.aiter_bytes())
            waiting = asyncio.ensure_future(client.post(CHAT, json=body))
            await until_metric(client, "visiondrop_queue_depth", 1)
            wire.is_cut = True
            assert (await client.get("/ready")).status_code == 503
            wire.is_cut = False
            engine.geometry = {"geometry": replace(GEOMETRY, boundaries=(4, 8, 12)).to_dict()}
            assert (await client.get("/ready")).status_code == 200
        answer = await waiting
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unreachable")
        assert answer.headers["retry-after"]
        assert len(engine.bodies) == 1
        engine.hold = False
        assert (await client.post(CHAT, json=body)).json()["usage"]["visual_tokens"]["full"]


async def test_bodies_in_memory_are_bounded(engine: FakeEngine) -> None:
    engine.hold_before_answer = True
    body = ask(picture())
    size = len(httpx.Request("POST", "http://x", json=body).content)
    async with gateway(
        engine, max_buffered_bytes=int(size * 1.5), max_body_bytes=size, max_image_bytes=size // 2
    ) as client:
        first = asyncio.ensure_future(client.post(CHAT, json=body))
        await asyncio.wait_for(engine.asked.wait(), 5)
        second = await client.post(CHAT, json=body)
        assert second.status_code == 503
        assert second.json()["error"]["code"] == "memory_full"
        engine.hold_before_answer = False
        first.cancel()
        await asyncio.wait((first,))
        assert (await client.post(CHAT, json=body)).status_code == 200, "the memory should have been given back"


async def test_stream_gives_its_bodys_memory_back_when_the_engine_has_it(engine: FakeEngine) -> None:
    engine.hold = True
    body = {**ask(picture()), "stream": True}
    size = len(httpx.Request("POST", "http://x", json=body).content)
    limits = {"max_body_bytes": size, "max_image_bytes": size // 2, "max_buffered_bytes": int(size * 1.5)}
    async with gateway(engine, **limits) as client, AsyncExitStack() as streams:
        for _ in range(3):
            response = await streams.enter_async_context(client.stream("POST", CHAT, json=body))
            assert response.status_code == 200
            await anext(response.aiter_bytes())


async def test_stopping_gateway_turns_newcomers_away_and_finishes_the_rest(engine: FakeEngine) -> None:
    drain = Drain()
    engine.hold = True
    async with gateway(engine, drain=drain) as client:
        async with client.stream("POST", CHAT, json=ask(picture(), stream=True)) as response:
            chunks = response.aiter_bytes()
            await anext(chunks)
            drain.begin()
            ready = await client.get("/ready")
            assert ready.status_code == 503
            refused = await client.post(CHAT, json=TEXT)
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "stopping"
            assert refused.headers["retry-after"]
            assert (await client.get("/health")).status_code == 200
            assert drain.num_inflight == 1
        await asyncio.wait_for(drain.wait_idle(), 5)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "multipart/form-data; boundary=x"}, 415),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, 415),
        ({"Content-Type": "Application/JSON; charset=utf-8"}, 200),
    ],
)
async def test_bodies_are_json_by_their_own_account(
    client: httpx.AsyncClient, headers: dict[str, str], status: int
) -> None:
    response = await client.post(CHAT, content=json.dumps(TEXT), headers=headers)
    assert response.status_code == status
    if status == 415:
        assert response.json()["error"]["code"] == "unsupported_media_type"


async def test_declared_length_is_judged_before_the_body_is_read(engine: FakeEngine) -> None:
    async with gateway(engine, max_body_bytes=1000) as client:
        headers = {"Content-Type": "application/json", "Content-Length": "2000"}
        response = await client.post(CHAT, content=b"{", headers=headers)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "body_too_large"


async def test_one_model_can_be_asked_for(client: httpx.AsyncClient) -> None:
    (card,) = (await client.get("/v1/models")).json()["data"]
    assert (await client.get(f"/v1/models/{card['id']}")).json() == card
    response = await client.get("/v1/models/org/nothing")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


async def test_trace_context_reaches_the_engine(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    await client.post(CHAT, json=TEXT, headers={"traceparent": parent, "tracestate": "a=1"})
    assert engine.headers[-1]["traceparent"] == parent
    assert engine.headers[-1]["tracestate"] == "a=1"
    await client.post(CHAT, json=TEXT, headers={"traceparent": "nonsense", "tracestate": "a=1"})
    assert "traceparent" not in engine.headers[-1]


async def test_operators_port_has_metrics_and_probes_without_a_key_and_nothing_else(
    engine: FakeEngine, keys: Path
) -> None:
    app = make_app(Settings(api_keys_file=keys, metrics_port=1), engine)
    async with (
        httpx.AsyncClient(transport=AsgiTransport(app), base_url="http://gateway") as clients,
        httpx.AsyncClient(transport=AsgiTransport(metrics_app_of(app)), base_url="http://metrics") as operators,
    ):
        for path in ("/metrics", "/metrics/engine/0", "/health", "/ready"):
            response = await operators.get(path)
            assert response.status_code == 200, path
            assert response.headers["x-request-id"]
        for path in ("/v1/models", CHAT, "/metrics/engine/1", "/metrics/engine/../0"):
            response = await operators.get(path)
            assert response.status_code == 404, path
            assert response.json()["error"]["code"] == "unknown_url"
        response = await clients.get("/metrics", headers=bearer("shop-secret"))
        assert response.status_code == 404, "there is a port for it"
