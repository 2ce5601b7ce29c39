"""What browsers are told about pages of other origins (CORS). tests/clients/test_browser.py has a browser's side."""

from __future__ import annotations

import logging
from pathlib import Path

import httpx
import pytest
from asgi_transport import AsgiTransport
from fake_engine import FakeEngine
from gateway import bearer, gateway, make_app
from images import ask, image
from metric_text import metric

from server.api import openapi
from server.images.fetch import ImageFetcher
from server.settings import Settings

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
ORIGIN = "https://chat.example.com"
PREFLIGHT = {
    "Origin": ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os,x-visual-token-budget",
}


class BrokenFetcher(ImageFetcher):
    async def fetch(self, *_: object) -> bytes:
        raise RuntimeError("a defect")


async def test_preflight_needs_no_key_and_is_no_request(
    engine: FakeEngine, keys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "visiondrop.requests")
    async with gateway(engine, api_keys_file=keys, allowed_origins=ORIGIN) as client:
        response = await client.options(CHAT, headers=PREFLIGHT)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == ORIGIN
        assert response.headers["access-control-allow-headers"] == PREFLIGHT["Access-Control-Request-Headers"]
        assert "POST" in response.headers["access-control-allow-methods"]
        assert "access-control-allow-credentials" not in response.headers
        assert "Origin" in response.headers["vary"]
        text = (await client.get("/metrics", headers=bearer("lab-secret"))).text
        assert metric(text, f'visiondrop_requests_total{{budget_class="none",code="200",route="{CHAT}"}}') == 0
    assert not caplog.messages


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (
            {"Origin": "https://chat.example.com.evil.example"},
            "origin_not_allowed",
            "VISIONDROP_ALLOWED_ORIGINS lists those",
        ),
        ({"Origin": "null"}, "origin_not_allowed", "pages of null"),
        ({"Access-Control-Request-Method": "DELETE"}, "method_not_allowed", "not send DELETE"),
    ],
)
async def test_preflight_of_what_is_not_allowed_is_refused_for_that_reason(
    engine: FakeEngine, change: dict[str, str], code: str, words: str
) -> None:
    async with gateway(engine, allowed_origins=ORIGIN) as client:
        response = await client.options(CHAT, headers={**PREFLIGHT, **change})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == code
    assert words in error["message"]
    assert ("VISIONDROP_ALLOWED_ORIGINS" in error["message"]) is (code == "origin_not_allowed")
    assert "access-control-allow-origin" not in response.headers


async def test_page_on_the_web_may_use_a_server_on_its_own_machine(engine: FakeEngine) -> None:
    async with gateway(engine, allowed_origins=ORIGIN) as client:
        response = await client.options(CHAT, headers={**PREFLIGHT, "Access-Control-Request-Private-Network": "true"})
    assert (response.status_code, response.headers["access-control-allow-private-network"]) == (200, "true")


async def test_page_can_read_answers_errors_and_our_headers(engine: FakeEngine, keys: Path) -> None:
    settings = Settings(api_keys_file=keys, allowed_origins=f"http://localhost:3000, {ORIGIN}")
    app = make_app(settings, engine, fetcher=BrokenFetcher(settings))
    async with httpx.AsyncClient(transport=AsgiTransport(app), base_url="http://gateway") as client:
        for body, secret, status in [
            (ask(image()), "shop-secret", 200),
            (ask(image(), stream=True), "shop-secret", 200),
            (ask(image()), "wrong", 401),
            (ask("https://example.org/a.png"), "shop-secret", 500),
        ]:
            response = await client.post(CHAT, json=body, headers={"Origin": ORIGIN, **bearer(secret)})
            assert response.status_code == status
            assert response.headers["access-control-allow-origin"] == ORIGIN
            exposed = set(response.headers["access-control-expose-headers"].split(", "))
            assert exposed == set(openapi.HEADERS)
            assert {"X-Request-Id", "X-Visual-Tokens-Saved", "Retry-After"} <= exposed
        other = await client.get("/health", headers={"Origin": "https://elsewhere.example"})
        assert "access-control-allow-origin" not in other.headers
        assert other.headers["vary"] == "Origin"


async def test_all_origins_may_be_allowed(engine: FakeEngine) -> None:
    async with gateway(engine, allowed_origins="*") as client:
        for response in (await client.options(CHAT, headers=PREFLIGHT), await client.get("/health", headers=PREFLIGHT)):
            assert (response.status_code, response.headers["access-control-allow-origin"]) == (200, "*")


async def test_browsers_are_told_nothing_unless_the_operator_asks(engine: FakeEngine, keys: Path) -> None:
    for more, status in (({}, 405), ({"api_keys_file": keys}, 401)):
        async with gateway(engine, **more) as client:
            refused = await client.options(CHAT, headers=PREFLIGHT)
            assert refused.status_code == status
            for response in (refused, await client.get("/health", headers=PREFLIGHT)):
                assert not [name for name in response.headers if name.startswith("access-control")]
