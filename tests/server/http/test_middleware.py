"""Keys, and the log line of every request, as a client meets them."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from asgi_transport import AsgiTransport
from fake_engine import FakeEngine, sse_data
from gateway import assert_error, bearer, gateway, make_app
from images import ask, image
from metric_text import metric, metrics_of

from server.api.plan import Planner
from server.engine.client import HttpEngineClient
from server.engine.dispatch import Dispatcher
from server.engine.pool import EnginePool
from server.images.fetch import ImageFetcher
from server.schemas.chat import ChatRequest
from server.settings import Settings
from server.telemetry.metrics import Metrics
from server.telemetry.record import RequestRecord

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"


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


async def test_log_names_the_key_and_never_shows_it(
    engine: FakeEngine, keys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "visiondrop.requests")
    async with gateway(engine, api_keys_file=keys) as client:
        await client.post(CHAT, json=ask(image()), headers=bearer("shop-secret"))
        await client.post(CHAT, json=ask(image()), headers=bearer("wrong-secret"))
    lines = [json.loads(item.message) for item in caplog.records if item.name == "visiondrop.requests"]
    assert [line["key"] for line in lines] == ["shop", None]
    assert [line["status"] for line in lines] == [200, 401]
    for word in ("secret", "base64", "What is it"):
        assert word not in caplog.text


@pytest.mark.parametrize("sent", [None, "", "a b", "x" * 129, "<script>"])
async def test_request_ids_are_made_where_none_is_usable(client: httpx.AsyncClient, sent: str | None) -> None:
    headers = {} if sent is None else {"X-Request-Id": sent}
    first = (await client.get("/health", headers=headers)).headers["x-request-id"]
    second = (await client.get("/health", headers=headers)).headers["x-request-id"]
    assert first.startswith("req-")
    assert first != second != sent


class BrokenFetcher(ImageFetcher):
    async def fetch(self, *_: object) -> bytes:
        raise RuntimeError("a secret")


async def test_defects_become_500_and_are_logged(engine: FakeEngine, caplog: pytest.LogCaptureFixture) -> None:
    app = make_app(Settings(), engine, fetcher=BrokenFetcher(Settings()))
    async with httpx.AsyncClient(transport=AsgiTransport(app), base_url="http://gateway") as client:
        response = await client.post(CHAT, json=ask("https://example.org/a.png"))
    assert_error(response, 500, None)
    assert "secret" not in response.text
    assert "a secret" in caplog.text


class DefectiveStream(AsgiTransport):
    """The first event comes through; then what reads it fails as no network does."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await super().handle_async_request(request)
        if request.url.path != CHAT:
            return response

        async def first() -> AsyncIterator[bytes]:
            try:
                yield await anext(response.aiter_raw())
                raise KeyError("a defect")
            finally:
                await response.aclose()

        return httpx.Response(200, headers=response.headers, content=first())


async def test_defect_in_mid_stream_ends_it_with_an_error_event(
    engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app(Settings(), HttpEngineClient(DefectiveStream(engine)))
    async with httpx.AsyncClient(transport=AsgiTransport(app), base_url="http://gateway") as client:
        async with client.stream("POST", CHAT, json=ask(stream=True)) as response:
            events = await sse_data(response.aiter_bytes())
        assert json.loads(events[-1])["error"]["code"] == "internal_error"
        assert "a defect" in caplog.text
        assert "a defect" not in events[-1]
        text = await metrics_of(client)
    assert metric(text, f'visiondrop_requests_total{{budget_class="none",code="500",route="{CHAT}"}}') == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "place",
    [
        (ChatRequest, "parse"),
        (Planner, "plan"),
        (ChatRequest, "engine_body"),
        (Dispatcher, "enter"),
        (EnginePool, "complete"),
        (EnginePool, "open_stream"),
        (RequestRecord, "headers"),
        (RequestRecord, "usage"),
        (RequestRecord, "mark_end"),
        (Metrics, "observe"),
    ],
    ids=lambda place: f"{place[0].__name__}.{place[1]}",
)
async def test_request_is_logged_once_and_not_in_flight_any_more_whatever_raises(
    engine: FakeEngine,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    place: tuple[type, str],
    stream: bool,
) -> None:
    caplog.set_level(logging.INFO, "visiondrop.requests")

    def fail(*_: object, **__: object) -> None:
        raise KeyError("a defect")

    async with gateway(engine) as client:
        await client.post(CHAT, json=ask(image()))
        caplog.clear()
        with monkeypatch.context() as patch, suppress(httpx.HTTPError):
            patch.setattr(*place, fail)
            await client.post(CHAT, json=ask(image(), stream=stream))
        lines = [item for item in caplog.records if item.name == "visiondrop.requests"]
        assert len(lines) == 1
        assert metric(await metrics_of(client), "visiondrop_inflight_requests") == 0


async def test_unknown_paths_and_methods_get_error_objects(client: httpx.AsyncClient) -> None:
    assert_error(await client.get("/v1/nothing"), 404, None, "/v1/nothing")
    response = await client.get(CHAT)
    assert_error(response, 405, None, "GET")
    assert response.headers["allow"] == "POST"


async def test_head_is_answered_wherever_get_is(engine: FakeEngine, keys: Path) -> None:
    async with gateway(engine, api_keys_file=keys) as client:
        for path in ("/health", "/ready", "/v1/models", "/v1/models/fake-llava", "/openapi.json", "/metrics/engines"):
            get, head = [await client.request(way, path, headers=bearer("shop-secret")) for way in ("GET", "HEAD")]
            assert (head.status_code, head.content) == (200, b"")
            same = {"content-type", "content-length"}
            assert {name: head.headers[name] for name in same} == {name: get.headers[name] for name in same}
        for path, status in (("/v1/models", 401), ("/nothing", 401), ("/health", 200)):
            assert (await client.head(path)).status_code == status
        assert (await client.head(CHAT, headers=bearer("shop-secret"))).status_code == 405
        refused = await client.post("/v1/models", headers=bearer("shop-secret"))
        assert (refused.status_code, refused.headers["allow"]) == (405, "GET, HEAD")


async def test_log_line_steers_no_terminal(client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "visiondrop.requests")
    model = "a\x7f\x85\x9b\u2028\u2029\u202e\u2066\ufeff\n\x1b[2Jb"
    await client.post(CHAT, json=ask(model=model))
    (line,) = caplog.messages
    assert line.isprintable()
    assert line.isascii()
    assert json.loads(line)["model"] == model
