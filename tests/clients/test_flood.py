"""A flood of image requests, by autocannon, against a gateway process with little room.

Accepted requests keep flowing, everything else is turned away with a time to come back, and afterwards nothing is left.
"""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from images import ask, image
from served_gateway import MIB, ServedGateway, serve, wait_for

CONNECTIONS = 64
SECONDS = 5
MOST_REQUESTS = 20_000

QUESTION = ask(image(100, 50), visual_token_budget="low")


@contextmanager
def watched(gateway: ServedGateway) -> Iterator[dict[str, float]]:
    """The slowest answer of /health, in seconds, and the largest RSS, while the block runs."""
    worst = {"health_seconds": 0.0, "rss_bytes": 0.0}
    stop = threading.Event()
    address = urlsplit(gateway.url).netloc

    def watch() -> None:
        while not stop.wait(0.1):
            # As probes do: a new connection each time. Nothing heavier, or it would measure itself.
            began = time.monotonic()
            with closing(HTTPConnection(address, timeout=5)) as probe:
                try:
                    probe.request("GET", "/health")
                    healthy = probe.getresponse().status == 200
                except OSError:
                    healthy = False
            seconds = time.monotonic() - began if healthy else float("inf")
            worst["health_seconds"] = max(worst["health_seconds"], seconds)
            worst["rss_bytes"] = max(worst["rss_bytes"], gateway.rss_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield worst
    finally:
        stop.set()
        watcher.join()


def flood(gateway: ServedGateway, node_folder: Path, seconds: int = SECONDS) -> dict[str, Any]:
    order = {
        "url": gateway.url,
        "seconds": seconds,
        "connections": CONNECTIONS,
        "most": MOST_REQUESTS,
        "bodies": [QUESTION, {**QUESTION, "stream": True}],
    }
    command = ["node", str(node_folder / "flood.mjs")]
    result = subprocess.run(
        command, input=json.dumps(order), capture_output=True, text=True, check=False, timeout=seconds + 20
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    print(report)
    assert isinstance(report, dict)
    return report


def assert_turned_away_politely(report: dict[str, Any]) -> None:
    assert set(report["statuses"]) <= {"200", "429", "503"}, report["strange"]
    assert report["errors"] == report["timeouts"] == 0, report
    assert all(value is not None and 1 <= int(value) <= 120 for value in report["retry_after"]), report


def assert_calm(gateway: ServedGateway) -> None:
    """Nothing is left of the flood, and the next request is served."""
    wait_for(lambda: gateway.metric("visiondrop_inflight_requests") == 0, "requests are still in flight")
    assert gateway.metric("visiondrop_queue_depth") == 0
    answer = httpx.post(f"{gateway.url}/v1/chat/completions", json=QUESTION, timeout=10)
    assert answer.status_code == 200, answer.text


def test_flood_beyond_capacity_keeps_accepted_requests_flowing(node_folder: Path) -> None:
    """Room for about ten requests of 0.1 s at a time, 64 connections that come back at once."""
    room = {"max_inflight_tokens": 2000, "max_queued_requests": 8, "queue_seconds": 1}
    with serve(engine_seconds=0.1, **room) as gateway:
        assert httpx.post(f"{gateway.url}/v1/chat/completions", json=QUESTION, timeout=10).status_code == 200
        rss_before = gateway.rss_bytes()
        with watched(gateway) as worst:
            report = flood(gateway, node_folder)
        print(worst)
        assert_turned_away_politely(report)
        assert all(report["ok_each_second"][:SECONDS]), "accepted requests should flow in every second"
        assert report["statuses"].get("503", 0) > report["statuses"]["200"] / 10, "that was no flood"
        assert worst["health_seconds"] < 1
        assert worst["rss_bytes"] < rss_before + 64 * MIB
        assert_calm(gateway)


def test_flood_beyond_the_rate_gets_429(node_folder: Path) -> None:
    rate, seconds = 120, 3
    with serve(requests_per_minute=rate) as gateway:
        with watched(gateway) as worst:
            report = flood(gateway, node_folder, seconds)
        assert_turned_away_politely(report)
        assert 0 < report["statuses"]["200"] <= rate * (1 + seconds / 60) + 1
        assert report["statuses"]["429"] > 0
        assert worst["health_seconds"] < 1
        wait_for(lambda: gateway.metric("visiondrop_inflight_requests") == 0, "requests are still in flight")


@pytest.mark.parametrize("status", [429, 503])
def test_clients_are_told_when_to_come_back(status: int) -> None:
    """A plain look at the error object that the flood's many got."""
    room: dict[str, object] = {"requests_per_minute": 1}
    if status == 503:
        room = {"max_inflight_tokens": 1, "max_queued_requests": 0}
    with serve(engine_seconds=0.5, **room) as gateway:
        answers: list[httpx.Response] = []

        def post() -> None:
            answers.append(httpx.post(f"{gateway.url}/v1/chat/completions", json=QUESTION, timeout=10))

        threads = [threading.Thread(target=post) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        refused = [answer for answer in answers if answer.status_code != 200]
        assert len(refused) == 2, "one is served, even where it costs more than there is room"
        for answer in refused:
            assert answer.status_code == status
            assert answer.json()["error"]["code"]
            assert 1 <= int(answer.headers["Retry-After"]) <= 120
