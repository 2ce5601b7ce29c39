"""Two keys on the real engine: one floods it with images, sends giants and leaves; the other is served all the same."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from engines import draw
from gateway import assert_error, bearer, write_keys
from metric_text import metric
from served import data_url, free_port, process, wait_until_ready

pytestmark = [pytest.mark.engine, pytest.mark.slow]

CHAT = "/v1/chat/completions"
NUM_FLOODING = 320
NUM_TEXTS = 21


class Served:
    """A gateway with two keys; `operator` has its metrics, `log` a line for every request."""

    def __init__(self, url: str, operator: str, log: Path) -> None:
        self.url, self.operator, self.log = url, operator, log

    def records(self, key: str) -> list[dict[str, Any]]:
        lines = (json.loads(line) for line in self.log.read_text().splitlines() if line.startswith('{"time"'))
        return [line for line in lines if line["key"] == key]

    def metric(self, series: str) -> float:
        return metric(httpx.get(f"{self.operator}/metrics").text, series)


@pytest.fixture(scope="module")
def served(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder, port, metrics_port = tmp_path_factory.mktemp("fairness"), free_port(), free_port()
    keys = write_keys(folder, '[keys.flood]\nsecret = "flood"\n[keys.quiet]\nsecret = "quiet"\n')
    # Slow steps are no stall here.
    settings = {
        "VISIONDROP_API_KEYS_FILE": str(keys),
        "VISIONDROP_METRICS_PORT": str(metrics_port),
        "VISIONDROP_ENGINE_STALL_SECONDS": "120",
    }
    options = ("--", "--max-model-len", "6144", "--max-num-seqs", "4", "--enforce-eager", "--skip-mm-profiling")
    log, operator = folder / "log", f"http://127.0.0.1:{metrics_port}"
    command = ("-m", "server.cli", "serve", str(random_model), "--port", str(port), *options)
    with process(*command, log=log, **settings) as child:
        wait_until_ready(f"{operator}/ready", child, log)
        yield Served(f"http://127.0.0.1:{port}", operator, log)


def image_request(seed: int) -> dict[str, Any]:
    part = {"type": "image_url", "image_url": {"url": data_url(draw(336, 336, seed))}}
    return {"messages": [{"role": "user", "content": [part]}], "max_tokens": 4, "visual_token_budget": "low"}


def text_request(text: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 4, **fields}


async def send_texts(client: httpx.AsyncClient) -> list[int]:
    answers = []
    for number in range(NUM_TEXTS):
        answers.append(await client.post(CHAT, json=text_request(f"Hello {number}"), headers=bearer("quiet")))
    return [answer.status_code for answer in answers]


async def flood(client: httpx.AsyncClient, number: int) -> None:
    """Images without end. Every third client leaves after two seconds, and comes back."""
    body, patience = image_request(number % 8), 2 if number % 3 == 0 else 240
    while True:
        with suppress(httpx.ReadTimeout):
            answer = await client.post(CHAT, json=body, headers=bearer("flood"), timeout=patience)
            await asyncio.sleep(answer.status_code == 503)


def p95(values: list[float]) -> float:
    return statistics.quantiles(values, n=20)[-1]


def test_quiet_key_is_served_under_a_flood_of_another(served: Served) -> None:
    async def attack() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=served.url, timeout=240, limits=limits) as client:
            assert await send_texts(client) == [200] * NUM_TEXTS
            floods = [asyncio.ensure_future(flood(client, number)) for number in range(NUM_FLOODING)]
            await asyncio.sleep(20)
            giant = asyncio.ensure_future(
                client.post(CHAT, json=text_request("a lot " * 600, n=4), headers=bearer("flood"))
            )
            too_long = await client.post(CHAT, json=text_request("x" * 600_000), headers=bearer("flood"))
            assert_error(too_long, 400, "messages", "maximum context length is 6144 tokens")
            assert await send_texts(client) == [200] * NUM_TEXTS
            for task in (*floods, giant):
                task.cancel()
            await asyncio.gather(*floods, giant, return_exceptions=True)

    asyncio.run(attack())
    deadline = time.monotonic() + 60
    while served.metric("visiondrop_inflight_requests") or len(served.records("quiet")) < 2 * NUM_TEXTS:
        assert time.monotonic() < deadline
        time.sleep(0.2)

    waits = [record["queue_seconds"] for record in served.records("quiet")]
    alone, flooded = waits[:NUM_TEXTS], waits[NUM_TEXTS:]
    done = [record for record in served.records("flood") if record["status"] == 200]
    service_seconds = max(record["total_seconds"] - record["queue_seconds"] for record in done)
    assert len(flooded) == NUM_TEXTS
    assert p95(flooded) <= 3 * p95(alone) + service_seconds
    assert len(done) >= 4, "the flood is served, too"
    assert served.metric("visiondrop_queue_depth") == served.metric("visiondrop_inflight_tokens") == 0
    assert served.metric('visiondrop_rejections_total{reason="too_long"}') == 1
