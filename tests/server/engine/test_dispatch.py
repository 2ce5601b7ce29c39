"""Places in the queue, as a client meets them."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from asgi_transport import AsgiTransport
from fake_engine import GEOMETRY, FakeEngine
from gateway import assert_error, bearer, gateway, make_app, write_keys
from images import ask, image
from metric_text import metric, metrics_of, until_metric
from wire import Wire, make_pool, until

from server.app import create_app
from server.engine.client import HttpEngineClient
from server.settings import Settings

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"

LONG = "a lot " * 100


def say(text: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **fields}


TEXT = say("Hello")


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
        gateway(engine, max_inflight_tokens=200, queue_seconds=0.1) as client,
        client.stream("POST", CHAT, json=say(LONG, stream=True)) as response,
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


def tell_limits(engine: FakeEngine, **limits: int) -> None:
    assert engine.geometry is not None
    engine.geometry["limits"] = {"max_model_len": 6000, "max_chars_per_token": 16, "max_num_seqs": 8, **limits}


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (say("x" * 600_000), "messages", "600000 characters (more than 96000 characters"),
        (ask(*[image(1344, 1344)] * 3, visual_token_budget="full"), "messages", "at least 8785 input tokens"),
        ({**TEXT, "max_tokens": 6001}, "max_tokens", "max_tokens=6001 cannot be greater than max_model_len=6000"),
    ],
)
async def test_what_can_never_fit_is_refused_before_it_waits(
    engine: FakeEngine, body: dict[str, Any], param: str, words: str
) -> None:
    tell_limits(engine)
    engine.hold = True
    async with gateway(engine, max_inflight_tokens=1, max_queued_requests=0) as client:
        async with client.stream("POST", CHAT, json=ask(stream=True)) as response:
            await anext(response.aiter_bytes())
            refused = await client.post(CHAT, json=body)
        assert_error(refused, 400, param, words)
        assert refused.json()["error"]["code"] == "context_length_exceeded"
        assert "retry-after" not in refused.headers
        assert len(engine.bodies) == 1
        assert metric(await metrics_of(client), 'visiondrop_rejections_total{reason="too_long"}') == 1


async def test_text_that_only_might_be_too_long_costs_no_more_than_the_context_and_goes_on(engine: FakeEngine) -> None:
    tell_limits(engine)
    engine.hold = True
    async with gateway(engine) as client:
        body = say("x" * 90_000, stream=True)
        async with client.stream("POST", CHAT, json=body) as response:
            await anext(response.aiter_bytes())
            assert metric(await metrics_of(client), "visiondrop_inflight_tokens") == 6000


async def test_engine_gets_as_many_answers_as_run_in_it_and_an_eighth_to_prepare(engine: FakeEngine) -> None:
    tell_limits(engine, max_num_seqs=8)
    engine.hold_before_answer = True
    async with gateway(engine) as client:
        most = asyncio.ensure_future(client.post(CHAT, json={**TEXT, "n": 7}))
        await asyncio.wait_for(engine.asked.wait(), 5)
        more = [asyncio.ensure_future(client.post(CHAT, json=TEXT)) for _ in range(4)]
        await until_metric(client, "visiondrop_queue_depth", 2)
        assert len(engine.bodies) == 3
        engine.hold_before_answer = False
        for request in (most, *more[:2]):
            request.cancel()
        assert [answer.status_code for answer in await asyncio.gather(*more[2:])] == [200, 200]


async def test_request_larger_than_the_room_holds_as_much_in_the_queue_as_on_its_engine(engine: FakeEngine) -> None:
    """Else the room of the others would be wrong when the engine is down: what is there takes none of theirs."""
    tell_limits(engine, max_num_seqs=8)
    engine.hold = True
    wire = Wire(engine)
    settings = Settings(max_inflight_tokens=100)
    pool = make_pool(settings, wire)
    transport = AsgiTransport(create_app(settings, pool))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        body = {**say(LONG), "n": 128, "stream": True}
        async with client.stream("POST", CHAT, json=body) as response:
            await anext(response.aiter_bytes())
            assert metric(await metrics_of(client), "visiondrop_inflight_tokens") == 87
            wire.is_cut = True
            assert (await client.get("/ready")).status_code == 503
            assert (pool.away_cost, pool.away_sequences) == (87, 7)


KEYS = """
[keys.busy]
secret = "busy"
max_parallel_requests = 3
[keys.quiet]
secret = "quiet"
"""


async def test_keys_share_the_queue_and_a_limit_of_parallel_requests_holds(engine: FakeEngine, tmp_path: Path) -> None:
    keys = write_keys(tmp_path, KEYS)
    engine.hold_before_answer = True
    async with gateway(engine, api_keys_file=keys, key_metrics=True, max_queued_requests=4) as client:
        asked = [asyncio.ensure_future(client.post(CHAT, json=TEXT, headers=bearer("busy"))) for _ in range(7)]
        await asyncio.wait_for(engine.asked.wait(), 5)
        client.headers.update(bearer("quiet"))
        await until_metric(client, "visiondrop_queue_depth", 4)
        assert len(engine.bodies) == 3, "there would be room for all"
        quiet = asyncio.ensure_future(client.post(CHAT, json=TEXT, headers=bearer("quiet")))
        await until(lambda: len(engine.bodies) == 4)
        engine.hold_before_answer = False
        for request in (*asked[:3], quiet):
            request.cancel()
        assert [answer.status_code for answer in await asyncio.gather(*asked[3:])] == [200] * 4
        text = await metrics_of(client)
        assert metric(text, 'visiondrop_key_queue_seconds_count{key="busy"}') == 7
        assert metric(text, 'visiondrop_key_queue_seconds_count{key="quiet"}') == 1


async def test_full_queue_turns_away_the_newest_of_the_client_with_the_most_places(engine: FakeEngine) -> None:
    """Without keys, clients are told apart by their addresses."""
    engine.hold_before_answer = True
    app = make_app(Settings(max_inflight_tokens=1, max_queued_requests=2), engine)
    async with (
        httpx.AsyncClient(transport=AsgiTransport(app, "192.0.2.1"), base_url="http://gateway") as busy,
        httpx.AsyncClient(transport=AsgiTransport(app, "192.0.2.2"), base_url="http://gateway") as quiet,
    ):
        first = asyncio.ensure_future(busy.post(CHAT, json=TEXT))
        await asyncio.wait_for(engine.asked.wait(), 5)
        waiting = []
        for depth in (1, 2):
            waiting.append(asyncio.ensure_future(busy.post(CHAT, json=TEXT)))
            await until_metric(busy, "visiondrop_queue_depth", depth)
        other = asyncio.ensure_future(quiet.post(CHAT, json=TEXT))
        refused = await waiting[1]
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "queue_full")
        assert refused.headers["retry-after"]
        engine.hold_before_answer = False
        first.cancel()
        assert [answer.status_code for answer in await asyncio.gather(other, waiting[0])] == [200, 200]
        assert metric(await metrics_of(busy), 'visiondrop_rejections_total{reason="queue_share"}') == 1
