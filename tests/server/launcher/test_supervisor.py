"""The engine dies, hangs, or comes back: the gateway stays, says so, and serves again by itself."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from gateway_process import Gateway, Start, gateways, is_alive, wait_for
from images import ask, image

from server.launcher.folder import EngineFolder
from server.launcher.supervisor import Backoff


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with gateways(tmp_path) as start_gateway:
        yield start_gateway


def is_ready(url: str) -> bool:
    return httpx.get(f"{url}/ready", timeout=10).status_code == 200


def assert_stops_cleanly(gateway: Gateway) -> None:
    members = gateway.members()
    gateway.process.send_signal(signal.SIGTERM)
    assert gateway.process.wait(timeout=10) == 0, gateway.said
    assert not [pid for pid in members if is_alive(pid)]
    assert "Traceback" not in gateway.said


def test_killed_engine_ends_its_streams_with_an_error_and_comes_back(start: Start) -> None:
    gateway = start("first_slow")
    url = gateway.wait_url()
    members = gateway.members()
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=ask(image(), stream=True), timeout=10) as response:
        lines = (line for line in response.iter_lines() if line)
        assert "choices" in next(lines)
        os.kill(members[1], signal.SIGKILL)
        assert "error" in json.loads(next(lines).removeprefix("data: "))
        assert list(lines) == []
    gateway.wait_said("the engine stopped (killed by SIGKILL)")
    assert not is_ready(url)
    refusal = httpx.post(f"{url}/v1/chat/completions", json=ask(image()))
    assert refusal.status_code == 503
    assert refusal.headers["content-type"] == "application/json"
    wait_for(lambda: is_ready(url), gateway)
    assert httpx.post(f"{url}/v1/chat/completions", json=ask(image())).status_code == 200
    gateway.wait_said("engine ready again after")
    assert not [pid for pid in members if is_alive(pid)], "the first engine's own child should be gone, too"
    assert_stops_cleanly(gateway)


def test_engine_whose_core_is_killed_is_explained(start: Start) -> None:
    gateway = start("loses_its_core")
    gateway.wait_url()
    os.kill(gateway.grandchild(), signal.SIGKILL)
    gateway.wait_said("the engine stopped (its process EngineCore ended unexpectedly). Its log: ")
    gateway.wait_said("engine ready again after")
    assert_stops_cleanly(gateway)


def test_killed_guard_takes_the_engine_along_and_both_come_back(start: Start) -> None:
    gateway = start("serve")
    url = gateway.wait_url()
    members = gateway.members()
    os.kill(members[0], signal.SIGKILL)
    gateway.wait_said("engine ready again after")
    assert not [pid for pid in members if is_alive(pid)]
    wait_for(lambda: is_ready(url), gateway)
    assert_stops_cleanly(gateway)


def test_stopped_engine_is_not_ready_until_it_goes_on(start: Start) -> None:
    gateway = start("serve", engine_probe_seconds=0.2, engine_stall_seconds=1)
    url = gateway.wait_url()
    assert is_ready(url)
    engine = gateway.members()[1]
    os.kill(engine, signal.SIGSTOP)
    began = time.monotonic()
    wait_for(lambda: not is_ready(url), gateway)
    assert time.monotonic() - began < 8
    os.kill(engine, signal.SIGCONT)
    wait_for(lambda: is_ready(url), gateway)
    assert "started again" not in gateway.said
    assert_stops_cleanly(gateway)


def test_engine_that_never_comes_back_is_tried_again_and_again_and_its_logs_are_kept(start: Start) -> None:
    gateway = start("dies_again")
    url = gateway.wait_url()
    os.kill(gateway.members()[1], signal.SIGKILL)
    gateway.wait_said("while it was loading (exit status 1): ValueError: no second life", times=7)
    assert httpx.get(f"{url}/health").status_code == 200
    assert not is_ready(url)
    pauses = re.findall(r"started again in (\S+) s", gateway.said)
    assert pauses[:5] == ["0.1", "0.2", "0.4", "0.4", "0.4"]
    logs = re.findall(r"Its log: (\S+)", gateway.said)
    assert [Path(log).name for log in logs[:3]] == ["engine.log", "engine.1.log", "engine.2.log"]
    began = time.monotonic()
    assert_stops_cleanly(gateway)
    assert time.monotonic() - began < 4
    (folder,) = gateway.temp.iterdir()
    kept = sorted(path.name for path in folder.glob("*.log"))
    assert len(kept) in (5, 6)
    assert Path(logs[-1]).name in kept
    assert "engine.log" not in kept
    assert "no second life" in Path(logs[-1]).read_text()


def test_second_signal_between_two_runs_ends_at_once(start: Start) -> None:
    gateway = start("dies_again")
    gateway.wait_url()
    os.kill(gateway.members()[1], signal.SIGKILL)
    gateway.wait_said("started again", times=3)
    gateway.process.send_signal(signal.SIGTERM)
    gateway.process.send_signal(signal.SIGINT)
    assert gateway.process.wait(timeout=5) == 130


def test_pauses_double_up_to_a_limit() -> None:
    backoff = Backoff()
    pauses = [backoff.pause_seconds(number) for number in (1, 2, 3, 6, 7, 8, 5000)]
    assert pauses == [1, 2, 4, 32, 60, 60, 60]


def test_given_log_path_gets_numbers(tmp_path: Path) -> None:
    folder = EngineFolder(tmp_path / "vllm.out")
    try:
        folder.socket_path.touch()
        paths = [folder.prepare_run() for _ in range(3)]
        assert [path.name for path in paths] == ["vllm.out", "vllm.1.out", "vllm.2.out"]
        assert not folder.socket_path.exists()
    finally:
        folder.remove()
    assert not folder.path.exists()
