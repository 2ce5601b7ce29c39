"""Stopping: at the first signal newcomers are turned away and what is in flight goes on; nothing goes on for ever."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from gateway_process import Gateway, Start, gateways, is_alive, wait_for
from images import ask

from server.admission.drain import Drain
from server.errors import OverloadedError


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with gateways(tmp_path) as start_gateway:
        yield start_gateway


@contextmanager
def events_of(url: str) -> Generator[Iterator[str], None, None]:
    """The data of a streamed answer's events, as they come."""
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=ask(stream=True), timeout=10) as response:

        def read() -> Iterator[str]:
            rest = b""
            for chunk in response.iter_raw():
                *whole, rest = (rest + chunk).split(b"\n\n")
                yield from (event.decode().removeprefix("data: ") for event in whole)

        yield read()


def stop(gateway: Gateway) -> None:
    gateway.process.send_signal(signal.SIGTERM)
    gateway.wait_said("shutting down")


@pytest.mark.anyio
async def test_drain_is_idle_when_the_last_work_has_ended() -> None:
    drain = Drain()
    await drain.wait_idle()
    with drain.work():
        with drain.work():
            drain.begin()
            assert drain.num_inflight == 2
        waiting = asyncio.ensure_future(drain.wait_idle())
        await asyncio.sleep(0)
        assert not waiting.done()
        with pytest.raises(OverloadedError) as refusal, drain.work():
            pass
        assert refusal.value.reason == "stopping"
        assert refusal.value.headers()["Retry-After"]
    await asyncio.wait_for(waiting, 1)


def test_stream_in_flight_finishes_while_newcomers_are_turned_away(start: Start) -> None:
    gateway = start("paced")
    url = gateway.wait_url()
    with events_of(url) as events:
        seen = [next(events)]
        stop(gateway)
        assert httpx.get(f"{url}/ready").status_code == 503
        assert httpx.get(f"{url}/health").status_code == 200
        refusal = httpx.post(f"{url}/v1/chat/completions", json=ask())
        assert refusal.status_code == 503
        assert int(refusal.headers["Retry-After"]) > 0
        assert refusal.json()["error"]["code"] == "stopping"
        seen += events
    assert seen[-1] == "[DONE]"
    words = [json.loads(event)["choices"][0]["delta"]["content"] for event in seen[:-1]]
    assert "".join(words) == "A red\u2028square."
    assert gateway.process.wait(timeout=5) == 0, gateway.said
    assert "waiting up to 30 s for 1 request" in gateway.said
    assert "Traceback" not in gateway.said
    assert not list(gateway.temp.iterdir())


def test_stream_is_cut_off_with_an_error_when_the_grace_time_is_over(start: Start) -> None:
    gateway = start("slow", "--shutdown-seconds", "0.5")
    url = gateway.wait_url()
    with events_of(url) as events:
        next(events)
        began = time.monotonic()
        stop(gateway)
        assert json.loads(next(events))["error"]["code"] == "stopping"
        assert 0.3 < time.monotonic() - began < 3
        assert list(events) == []
    assert gateway.process.wait(timeout=5) == 0, gateway.said
    assert "1 request cut off after 0.5 s" in gateway.said
    assert "Traceback" not in gateway.said
    assert "ERROR" not in gateway.said


def test_idle_gateway_stops_at_once(start: Start) -> None:
    gateway = start("serve")
    url = gateway.wait_url()
    with httpx.Client() as client:
        assert client.get(f"{url}/health").status_code == 200  # its connection stays open
        began = time.monotonic()
        stop(gateway)
        assert gateway.process.wait(timeout=5) == 0
        assert time.monotonic() - began < 3
    assert "cut off" not in gateway.said


def test_second_signal_ends_streams_and_engine_at_once(start: Start) -> None:
    gateway = start("slow")
    url = gateway.wait_url()
    members = gateway.members()
    with events_of(url) as events:
        next(events)
        stop(gateway)
        began = time.monotonic()
        gateway.process.send_signal(signal.SIGTERM)
        assert gateway.process.wait(timeout=5) == 130
        assert time.monotonic() - began < 2
    wait_for(lambda: not [pid for pid in members if is_alive(pid)])
    assert not list(gateway.temp.iterdir())
