"""A real gateway process, a fake engine as its child, and every way in which both may end."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from gateway_process import Start, gateways, is_alive, wait_for
from images import ask, image

from server.launcher import serve
from server.launcher.process import _describe_status


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with gateways(tmp_path) as start_gateway:
        yield start_gateway


def test_serves_and_stops_cleanly(start: Start) -> None:
    gateway = start("serve")
    url = gateway.wait_url()
    usage = httpx.post(f"{url}/v1/chat/completions", json=ask(image(800, 600))).json()["usage"]
    assert usage["visual_tokens"]["saved"] > 0
    (folder,) = gateway.temp.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    members = gateway.members()
    assert gateway.grandchild() in members

    began = time.monotonic()
    gateway.process.send_signal(signal.SIGINT)
    assert gateway.process.wait(timeout=10) == 0, gateway.said
    assert time.monotonic() - began < 6
    assert not [pid for pid in members if is_alive(pid)]
    assert not list(gateway.temp.iterdir()), "the private folder should be gone"
    assert "Traceback" not in gateway.said
    assert f"visiondrop: open to everybody who can reach {url}\n" in gateway.said
    line = json.loads((gateway.said_path.parent / "stdout").read_text())
    assert line["visual_tokens"] == usage["visual_tokens"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_can_be_stopped_while_the_engine_loads(start: Start, number: signal.Signals) -> None:
    gateway = start("loading")
    gateway.grandchild()
    members = gateway.members()
    wait_for(lambda: "loading the model" in gateway.said, gateway)
    gateway.process.send_signal(number)
    assert gateway.process.wait(timeout=10) == 0, gateway.said
    assert len(members) == 3
    assert not [pid for pid in members if is_alive(pid)]


def test_second_signal_kills_at_once(start: Start) -> None:
    gateway = start("stubborn")
    wait_for(lambda: "loading the model" in gateway.said, gateway)
    members = gateway.members()
    gateway.process.send_signal(signal.SIGINT)
    wait_for(lambda: "shutting down" in gateway.said, gateway)
    began = time.monotonic()
    gateway.process.send_signal(signal.SIGINT)
    assert gateway.process.wait(timeout=10) == 130
    assert time.monotonic() - began < 2
    wait_for(lambda: not [pid for pid in members if is_alive(pid)])


def test_engine_that_ignores_the_signal_is_killed_after_a_while(start: Start) -> None:
    gateway = start("stubborn")
    wait_for(lambda: "loading the model" in gateway.said, gateway)
    members = gateway.members()
    assert len(members) == 3
    gateway.process.send_signal(signal.SIGTERM)
    assert gateway.process.wait(timeout=20) == 0, gateway.said
    wait_for(lambda: not [pid for pid in members if is_alive(pid)])


def test_engine_that_takes_too_long_is_stopped_and_its_log_is_named(start: Start) -> None:
    gateway = start("loading", "--engine-start-timeout", "0.5")
    assert gateway.process.wait(timeout=20) == 1
    last = gateway.said.splitlines()[-1]
    assert "not ready after 0.5 s" in last
    assert Path(last.rpartition("Its log: ")[2]).is_file()


@pytest.mark.parametrize("mode", ["serve", "loading"])
def test_killed_gateway_leaves_no_orphan(start: Start, mode: str) -> None:
    gateway = start(mode)
    gateway.grandchild()
    if mode == "serve":
        gateway.wait_url()
    members = gateway.members()
    assert len(members) == 3, "guard, engine and the engine's own child"
    gateway.process.kill()
    wait_for(lambda: not [pid for pid in members if is_alive(pid)])
    assert not list(gateway.temp.iterdir()), "the guard should have removed the private folder"


def test_engine_that_refuses_its_input_has_the_last_word(start: Start) -> None:
    gateway = start("sentence")
    assert gateway.process.wait(timeout=10) == 1
    assert gateway.said.splitlines()[-1] == "visiondrop: error: there is no model 'nowhere'"
    assert not list(gateway.temp.iterdir())


def test_engine_that_crashes_while_loading_is_explained(start: Start) -> None:
    gateway = start("traceback")
    assert gateway.process.wait(timeout=10) == 1
    last = gateway.said.splitlines()[-1]
    assert "while it was loading (exit status 1): ValueError: heads do not divide." in last
    log = Path(last.rpartition(" ")[2])
    assert "Traceback" in log.read_text()
    assert "Traceback" not in gateway.said


def test_engine_with_another_rule_is_refused(start: Start) -> None:
    gateway = start("other_rule")
    members = gateway.members()
    assert gateway.process.wait(timeout=15) == 1
    assert "version 2 of the budget rule" in gateway.said.splitlines()[-1]
    assert not [pid for pid in members if is_alive(pid)]


def test_taken_port_is_told_before_the_engine_is_started(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        gateway = start("serve", "--port", str(port))
        assert gateway.process.wait(timeout=10) == 1
    assert gateway.said == (
        f"visiondrop: error: http://127.0.0.1:{port} is already in use; choose another port with --port\n"
    )
    assert not list(gateway.temp.iterdir())


def test_taken_metrics_port_is_told_before_the_engine_is_started(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        gateway = start("serve", "--metrics-port", str(port))
        assert gateway.process.wait(timeout=10) == 1
    assert gateway.said == (
        f"visiondrop: error: http://127.0.0.1:{port} is already in use; choose another port with --metrics-port\n"
    )
    assert not list(gateway.temp.iterdir())


def test_metrics_have_a_port_of_their_own(start: Start) -> None:
    gateway = start("serve", "--metrics-port", "0", api_key="a-secret")
    gateway.wait_url()
    assert "visiondrop: open to holders of 1 API key\n" in gateway.said
    found = re.search(r"metrics at (http://\S+)/metrics", gateway.said)
    assert found
    assert "visiondrop_" in httpx.get(f"{found.group(1)}/metrics").text
    answer = httpx.post(f"{found.group(1)}/v1/chat/completions", json=ask(image()))
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_url")
    gateway.process.send_signal(signal.SIGTERM)
    assert gateway.process.wait(timeout=10) == 0


def test_hangup_that_is_ignored_stays_ignored() -> None:
    """As `nohup` starts a program."""

    async def hang_up() -> bool:
        stop = serve._stop_on_signals(lambda: None)
        os.kill(os.getpid(), signal.SIGHUP)
        await asyncio.sleep(0.05)
        return stop.is_set()

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert not asyncio.run(hang_up())
    finally:
        signal.signal(signal.SIGHUP, before)


def test_status_of_an_engine_that_ended_by_itself_is_no_success() -> None:
    assert _describe_status(0, False) == "without an error"
    assert _describe_status(137, False) == _describe_status(-9, True) == "killed by SIGKILL"
    assert _describe_status(1, True) == _describe_status(0, True) == "its process EngineCore ended unexpectedly"
