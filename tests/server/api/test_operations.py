"""Probes and metrics."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from asgi_transport import AsgiTransport
from fake_engine import FakeEngine
from gateway import assert_error, bearer, make_app
from images import ask, image
from metric_text import metric

from server.app import metrics_app_of
from server.settings import Settings

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"


async def test_ready_follows_the_engine_and_health_does_not(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    assert (await client.get("/ready")).status_code == 200
    engine.is_up = False
    assert_error(await client.get("/ready"), 503, None)
    assert (await client.get("/health")).status_code == 200


async def test_operators_port_has_metrics_and_probes_without_a_key_and_nothing_else(
    engine: FakeEngine, keys: Path
) -> None:
    app = make_app(Settings(api_keys_file=keys, metrics_port=1), engine)
    async with (
        httpx.AsyncClient(transport=AsgiTransport(app), base_url="http://gateway") as clients,
        httpx.AsyncClient(transport=AsgiTransport(metrics_app_of(app)), base_url="http://metrics") as operators,
    ):
        for path in ("/metrics", "/metrics/engines", "/metrics/engine/0", "/health", "/ready"):
            response = await operators.get(path)
            assert response.status_code == 200, path
            assert response.headers["x-request-id"]
        for path in ("/v1/models", CHAT, "/metrics/engine/1", "/metrics/engine/../0"):
            response = await operators.get(path)
            assert response.status_code == 404, path
            assert response.json()["error"]["code"] == "unknown_url"
        response = await clients.get("/metrics", headers=bearer("shop-secret"))
        assert response.status_code == 404, "there is a port for it"


async def test_engines_are_listed_for_prometheus_to_discover(client: httpx.AsyncClient) -> None:
    response = await client.get("/metrics/engines")
    assert response.headers["content-type"] == "application/json"  # Prometheus insists on it
    (group,) = response.json()
    assert group == {"targets": ["0"], "labels": {}}
    for name in group["targets"]:
        assert (await client.get(f"/metrics/engine/{name}")).status_code == 200


async def test_probe_that_finds_no_engine_is_no_client_turned_away(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.is_up = False
    assert (await client.get("/ready")).status_code == 503
    assert (await client.post(CHAT, json=ask(image()))).status_code == 503
    text = (await client.get("/metrics")).text
    assert metric(text, 'visiondrop_rejections_total{reason="engine_down"}') == 1
