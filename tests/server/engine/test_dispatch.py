"""Places in the queue, as a client meets them."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import httpx
import pytest
from asgi_transport import AsgiTransport
from fake_engine import GEOMETRY, FakeEngine
from gateway import gateway, make_app
from images import ask, image
from metric_text import metric, metrics_of, until_metric
from wire import Wire

from server.engine.client import HttpEngineClient
from server.settings import Settings

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"

LONG = "a lot " * 100


async def test_requests_above_capacity_wait_and_then_run_in_order(engine: FakeEngine) -> None:
    engine.hold_before_answer = True
    async with gateway(engine, max_inflight_tokens=100, max_queued_requests=2) as client:
        body = {**ask(image(800, 600), visual_token_budget=90), "stream": False}
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
        body = ask(image(800, 600), visual_token_budget=90, stream=True)
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
    body = ask(image(800, 600), visual_token_budget=90)
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
