"""The supervisor: a real gateway process, a fake engine as its child, and every way in which one of them may end."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from pictures import ask, picture

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


class Gateway:
    """A gateway process and what it said."""

    def __init__(self, folder: Path, mode: str, port: int = 0) -> None:
        self.said_path = folder / "stderr"
        self.temp = folder / "tmp"
        self.temp.mkdir()
        environment = {**os.environ, "TMPDIR": str(self.temp), "PYTHONPATH": str(ROOT)}
        with self.said_path.open("wb") as said, (folder / "stdout").open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "serve_fake.py"), mode, str(port)],
                stdout=out,
                stderr=said,
                env=environment,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        return self.said_path.read_text()

    @property
    def engine_log(self) -> str:
        return "".join(path.read_text() for path in self.temp.glob("*/engine.log"))

    def wait_url(self) -> str:
        wait_for(lambda: "serving fake-llava at" in self.said, self)
        found = re.search(r"at (http://\S+)/v1", self.said)
        assert found
        return found.group(1)

    def grandchild(self) -> int:
        """The process that stands for vLLM's EngineCore."""
        wait_for(lambda: "GRANDCHILD" in self.engine_log, self)
        found = re.search(r"GRANDCHILD (\d+)", self.engine_log)
        assert found
        return int(found.group(1))

    def members(self) -> list[int]:
        """All processes below the gateway that are alive."""
        pids = _children(self.process.pid)
        for pid in pids:
            pids += _children(pid)
        return pids


def _children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False).stdout
    return [int(text) for text in found.split()]


def is_alive(pid: int) -> bool:
    try:
        return not Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0].startswith("Z")
    except FileNotFoundError:
        return False


def wait_for(condition: Callable[[], bool], gateway: Gateway | None = None, seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, gateway.said if gateway else "it did not happen"
        time.sleep(0.02)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Gateway]]:
    started: list[Gateway] = []

    def start_gateway(mode: str, port: int = 0) -> Gateway:
        folder = tmp_path / str(len(started))
        folder.mkdir()
        started.append(Gateway(folder, mode, port))
        return started[-1]

    yield start_gateway
    for gateway in started:
        if gateway.process.poll() is None:
            gateway.process.kill()
            gateway.process.wait()


Start = Callable[..., Gateway]


def test_serves_and_stops_cleanly(start: Start) -> None:
    gateway = start("serve")
    url = gateway.wait_url()
    usage = httpx.post(f"{url}/v1/chat/completions", json=ask(picture(800, 600))).json()["usage"]
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
    line = json.loads((gateway.said_path.parent / "stdout").read_text())
    assert line["visual_tokens"] == usage["visual_tokens"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
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
    wait_for(lambda: "stopping" in gateway.said, gateway)
    began = time.monotonic()
    gateway.process.send_signal(signal.SIGINT)
    assert gateway.process.wait(timeout=10) == 130
    assert time.monotonic() - began < 2
    wait_for(lambda: not [pid for pid in members if is_alive(pid)])


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


def test_killed_guard_takes_the_engine_along(start: Start) -> None:
    gateway = start("serve")
    gateway.wait_url()
    members = gateway.members()
    os.kill(members[0], signal.SIGKILL)
    assert gateway.process.wait(timeout=10) == 1
    wait_for(lambda: not [pid for pid in members if is_alive(pid)])


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


def test_engine_that_dies_while_serving_ends_the_gateway(start: Start) -> None:
    gateway = start("slow")
    url = gateway.wait_url()
    members = gateway.members()
    body = ask(picture(), stream=True)
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=10) as response:
        lines = (line for line in response.iter_lines() if line)
        assert "choices" in next(lines)
        os.kill(members[1], signal.SIGKILL)
        assert "error" in json.loads(next(lines).removeprefix("data: "))
        assert list(lines) == []
    assert gateway.process.wait(timeout=10) == 1
    assert "the engine stopped (killed by SIGKILL)" in gateway.said.splitlines()[-1]
    assert not [pid for pid in members if is_alive(pid)], "the engine's own child should be gone, too"


def test_taken_port_is_told_before_the_engine_is_started(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        gateway = start("serve", port)
        assert gateway.process.wait(timeout=10) == 1
    assert gateway.said == (
        f"visiondrop: error: http://127.0.0.1:{port} is already in use; choose another port with --port\n"
    )
    assert not list(gateway.temp.iterdir())
