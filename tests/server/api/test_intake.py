"""What a request goes through before it is read: rates, memory, the drain, the shape of its body."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import pytest
from asgi_transport import AsgiTransport
from fake_engine import FakeEngine
from gateway import assert_error, bearer, gateway, make_app
from images import ask, image
from metric_text import metric, until_metric

from server.admission.drain import Drain
from server.settings import Settings

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
TEXT = {"messages": [{"role": "user", "content": "Hi"}]}
JSON = {"Content-Type": "application/json"}


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
        assert (await client.post(CHAT, json=ask(*[image()] * 2), headers=shop)).status_code == 200
        response = await client.post(CHAT, json=ask(*[image()] * 2), headers=shop)
        assert response.status_code == 429
        assert (await client.post(CHAT, json=ask(image()), headers=shop)).status_code == 200, "one was left"
        response = await client.post(CHAT, json=ask(*[image()] * 4), headers=shop)
        assert response.status_code == 400, "four can never pass"
        text = (await client.get("/metrics", headers=shop)).text
        assert metric(text, 'visiondrop_rejections_total{reason="requests_per_minute"}') == 1
        assert metric(text, 'visiondrop_rejections_total{reason="images_per_minute"}') == 1


async def test_bodies_in_memory_are_bounded(engine: FakeEngine) -> None:
    engine.hold_before_answer = True
    body = ask(image())
    size = len(httpx.Request("POST", "http://x", json=body).content)
    async with gateway(
        engine, max_buffered_bytes=int(size * 1.7), max_body_bytes=size, max_image_bytes=size // 2
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


async def test_client_that_holds_its_share_of_memory_locks_nobody_out(engine: FakeEngine) -> None:
    engine.hold_before_answer = True
    size = len(httpx.Request("POST", "http://x", json=TEXT).content)
    settings = Settings(max_buffered_bytes=5 * size, max_body_bytes=size, max_image_bytes=1)
    app = make_app(settings, engine)
    async with (
        httpx.AsyncClient(transport=AsgiTransport(app, "192.0.2.1"), base_url="http://gateway") as busy,
        httpx.AsyncClient(transport=AsgiTransport(app, "192.0.2.2"), base_url="http://gateway") as quiet,
    ):
        held = [asyncio.ensure_future(busy.post(CHAT, json=TEXT)) for _ in range(3)]
        await until_metric(busy, "visiondrop_buffered_bytes", 3 * size)
        refused = await busy.post(CHAT, json=TEXT)
        assert_error(refused, 503, None, "as much of the server's memory as they may")
        assert refused.json()["error"]["code"] == "memory_share"
        other = asyncio.ensure_future(quiet.post(CHAT, json=TEXT))
        await until_metric(busy, "visiondrop_buffered_bytes", 4 * size)
        for request in (*held, other):
            request.cancel()


async def test_stream_gives_its_bodys_memory_back_when_the_engine_has_it(engine: FakeEngine) -> None:
    engine.hold = True
    body = {**ask(image()), "stream": True}
    size = len(httpx.Request("POST", "http://x", json=body).content)
    limits = {"max_body_bytes": size, "max_image_bytes": size // 2, "max_buffered_bytes": int(size * 1.7)}
    async with gateway(engine, **limits) as client, AsyncExitStack() as streams:
        for _ in range(3):
            response = await streams.enter_async_context(client.stream("POST", CHAT, json=body))
            assert response.status_code == 200
            await anext(response.aiter_bytes())


async def test_stopping_gateway_turns_newcomers_away_and_finishes_the_rest(engine: FakeEngine) -> None:
    drain = Drain()
    engine.hold = True
    async with gateway(engine, drain=drain) as client:
        async with client.stream("POST", CHAT, json=ask(image(), stream=True)) as response:
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
