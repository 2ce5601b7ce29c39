"""One record feeds usage, metrics and the log line."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import GEOMETRY, TEXT_TOKENS, WORDS, FakeEngine
from gateway import bearer, gateway, write_keys
from images import ask, image
from metric_text import metric, metrics_of, until_metric

from server.settings import Settings
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
    assert metric(text, 'visiondrop_request_seconds_count{budget_class="low"}') == 1
    assert metric(text, 'visiondrop_request_seconds_count{budget_class="none"}') == 0
    assert metric(text, 'visiondrop_time_to_first_token_seconds_count{budget_class="low"}') == 0
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
    assert metric(text, 'visiondrop_time_to_first_token_seconds_count{budget_class="high"}') == 1


async def test_every_series_exists_before_the_first_request(client: httpx.AsyncClient) -> None:
    text = await metrics_of(client)
    for name in ("images", "visual_tokens_full", "visual_tokens_kept", "visual_tokens_saved"):
        for label in (*PRESETS, FULL):
            assert metric(text, f'visiondrop_{name}_total{{budget_class="{label}"}}') == 0
    for code in (422, 431, 502):
        assert metric(text, f'visiondrop_requests_total{{budget_class="none",code="{code}",route="{CHAT}"}}') == 0
    for label in ("none", *PRESETS, FULL):
        assert metric(text, f'visiondrop_time_to_first_token_seconds_count{{budget_class="{label}"}}') == 0
    assert "visiondrop_build_info{" in text
    await client.get("/v1/%d0%b0/b?c")
    text = await metrics_of(client)
    assert metric(text, 'visiondrop_requests_total{budget_class="none",code="404",route="other"}') == 1


async def test_load_is_reported_beside_its_limits(engine: FakeEngine) -> None:
    engine.hold_before_answer = True
    ask_medium = ask(image(800, 600), visual_token_budget="medium")
    async with gateway(engine, max_inflight_tokens=600, max_queued_requests=7) as client:
        requests = [asyncio.ensure_future(client.post(CHAT, json=ask_medium)) for _ in range(2)]
        await until_metric(client, "visiondrop_queue_depth", 1)
        text = await metrics_of(client)
        tokens = metric(text, "visiondrop_inflight_tokens")
        assert 320 <= tokens <= 600
        await until_metric(client, 'visiondrop_engine_inflight_tokens{engine="0"}', tokens)
        assert metric(text, "visiondrop_inflight_tokens_limit") == 600
        assert metric(text, "visiondrop_queue_limit") == 7
        sent = len(httpx.Request("POST", "http://gateway", json=ask_medium).content)
        assert metric(text, "visiondrop_buffered_bytes") == 2 * sent
        assert metric(text, "visiondrop_buffered_bytes_limit") == Settings().max_buffered_bytes
        for request in requests:
            request.cancel()
        await asyncio.wait(requests)
        for name in ("queue_depth", "inflight_tokens", 'engine_inflight_tokens{engine="0"}', "buffered_bytes"):
            await until_metric(client, f"visiondrop_{name}", 0)


async def test_keys_have_series_of_their_own_only_if_the_operator_asks(engine: FakeEngine, tmp_path: Path) -> None:
    keys = write_keys(tmp_path, '[keys.shop]\nsecret = "open-sesame"\n[keys.lab]\nsecret = "abracadabra"\n')
    for asked in (False, True):
        async with gateway(engine, api_keys_file=keys, key_metrics=asked) as client:
            body = ask(image(800, 600), visual_token_budget="low")
            answer = await client.post(CHAT, json=body, headers=bearer("open-sesame"))
            await client.post(CHAT, json=body, headers=bearer("a guess"))
            text = (await client.get("/metrics", headers=bearer("abracadabra"))).text
        if not asked:
            assert "shop" not in text
            continue
        usage = answer.json()["usage"]
        assert metric(text, 'visiondrop_key_requests_total{code="200",key="shop"}') == 1
        assert metric(text, 'visiondrop_key_requests_total{code="200",key="lab"}') == 0
        for kind, tokens in {
            "prompt": usage["prompt_tokens"],
            "completion": usage["completion_tokens"],
            "visual_kept": usage["visual_tokens"]["kept"],
            "visual_saved": usage["visual_tokens"]["saved"],
        }.items():
            assert metric(text, f'visiondrop_key_tokens_total{{key="shop",kind="{kind}"}}') == tokens > 0
            assert metric(text, f'visiondrop_key_tokens_total{{key="lab",kind="{kind}"}}') == 0
        assert 'code="401",key' not in text


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
