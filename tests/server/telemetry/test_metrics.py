"""One record feeds usage, metrics and the log line."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from typing import Any

import httpx
import pytest
from fake_engine import GEOMETRY, TEXT_TOKENS, WORDS, FakeEngine
from images import ask, image
from metric_text import metric, metrics_of

from vd_plugin.schedule import FULL, PRESETS, prefill_flops, resolve

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"


async def test_record_feeds_metrics_and_log(
    client: httpx.AsyncClient, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="visiondrop.requests")
    url = image(800, 600)
    await client.post(CHAT, json=ask(url, visual_token_budget="low"), headers={"X-Request-Id": "abc-1"})

    text = await metrics_of(client)
    plan, stock = resolve(GEOMETRY, 600, 800, 160), resolve(GEOMETRY, 600, 800, FULL)
    assert metric(text, f'visiondrop_requests_total{{budget_class="low",code="200",route="{CHAT}"}}') == 1
    assert metric(text, 'visiondrop_images_total{budget_class="low"}') == 1
    assert metric(text, 'visiondrop_visual_tokens_full_total{budget_class="low"}') == plan.full
    assert metric(text, 'visiondrop_visual_tokens_kept_total{budget_class="low"}') == plan.kept
    assert metric(text, 'visiondrop_visual_tokens_saved_total{budget_class="low"}') == plan.saved
    flops = prefill_flops(GEOMETRY, TEXT_TOKENS, [stock]) - prefill_flops(GEOMETRY, TEXT_TOKENS, [plan])
    assert metric(text, "visiondrop_prefill_flops_saved_total") == float(flops) > 0
    assert metric(text, "visiondrop_request_seconds_count") == 1
    assert metric(text, "visiondrop_time_to_first_token_seconds_count") == 0
    assert metric(text, "visiondrop_schedule_mismatch_total") == 0
    assert metric(text, 'visiondrop_engine_up{engine="0"}') == 1

    line = json.loads(caplog.messages[-1])
    assert line["request_id"] == "abc-1" == engine.request_ids[0]
    assert (line["status"], line["budget_class"], line["error"]) == (200, "low", None)
    assert line["visual_tokens"]["saved"] == plan.saved
    assert line["completion_tokens"] == len(WORDS)
    assert "What is it?" not in caplog.text
    assert url[40:80] not in caplog.text


@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"visual_token_budget": ["my secret"]}, "invalid_request_error", "visual_token_budget"),
        ({"my secret": 1}, "invalid_request_error", None),
        ({"temperature": 1}, "BadRequestError", None),  # refused by the engine
    ],
)
async def test_log_of_a_refused_request_does_not_quote_it(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    caplog: pytest.LogCaptureFixture,
    fields: dict[str, Any],
    error: str,
    param: str | None,
) -> None:
    caplog.set_level("INFO", logger="visiondrop.requests")
    engine.refusal = (400, {"error": {"message": "not 'my secret'", "type": "BadRequestError", "param": None}})
    response = await client.post(CHAT, json={**ask(image()), **fields})
    assert "my secret" in response.json()["error"]["message"]
    line = json.loads(caplog.messages[-1])
    assert (line["status"], line["error"], line["param"]) == (400, error, param)
    assert "my secret" not in caplog.text


async def test_streams_feed_metrics_though_the_client_asked_for_no_usage(client: httpx.AsyncClient) -> None:
    await client.post(CHAT, json=ask(image(800, 600), stream=True))
    text = await metrics_of(client)
    assert metric(text, "visiondrop_prefill_flops_saved_total") > 0
    assert metric(text, "visiondrop_time_to_first_token_seconds_count") == 1


async def test_every_series_exists_before_the_first_request(client: httpx.AsyncClient) -> None:
    text = await metrics_of(client)
    for name in ("images", "visual_tokens_full", "visual_tokens_kept", "visual_tokens_saved"):
        for label in (*PRESETS, FULL):
            assert metric(text, f'visiondrop_{name}_total{{budget_class="{label}"}}') == 0
    assert metric(text, f'visiondrop_requests_total{{budget_class="none",code="502",route="{CHAT}"}}') == 0
    assert "visiondrop_build_info{" in text
    await client.get("/v1/%d0%b0/b?c")
    text = await metrics_of(client)
    assert metric(text, 'visiondrop_requests_total{budget_class="none",code="404",route="other"}') == 1


async def test_engine_that_counts_otherwise_is_noticed(
    client: httpx.AsyncClient, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.extra_image_tokens = 5
    usage = (await client.post(CHAT, json=ask(image()))).json()["usage"]
    assert usage["prompt_tokens_details"]["image_tokens"] == resolve(GEOMETRY, 50, 100, 640).num_placeholders + 5
    assert usage["prompt_tokens_details"]["text_tokens"] == TEXT_TOKENS
    assert metric(await metrics_of(client), "visiondrop_schedule_mismatch_total") == 1
    assert "visual tokens" in caplog.text


async def test_engine_without_token_details_is_taken_at_its_word(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.reports_details = False
    usage = (await client.post(CHAT, json=ask(image()))).json()["usage"]
    tokens = resolve(GEOMETRY, 50, 100, 640).num_placeholders
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0, "image_tokens": tokens, "text_tokens": TEXT_TOKENS}
    assert metric(await metrics_of(client), "visiondrop_schedule_mismatch_total") == 0


async def test_prometheus_own_linter_has_no_complaint(client: httpx.AsyncClient) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool, which comes with Prometheus, is not installed")
    await client.post("/v1/chat/completions", json=ask(image()))
    text = await metrics_of(client)
    command = [promtool, "check", "metrics"]
    lint = await asyncio.to_thread(subprocess.run, command, input=text, capture_output=True, text=True, check=False)
    assert (lint.returncode, lint.stdout + lint.stderr) == (0, "")
    assert "_created" not in text
