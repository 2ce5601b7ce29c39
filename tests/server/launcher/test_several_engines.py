"""`visiondrop gateway` with several engines, each a real process: one that answers and fits is enough to begin."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from gateway_process import HERE, ROOT, Start, gateways, wait_for
from images import ask, image


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with gateways(tmp_path) as start_gateway:
        yield start_gateway


@pytest.fixture
def engines(tmp_path: Path) -> Iterator[dict[str, str]]:
    """URLs of an engine that fits and of one that does not."""
    with ExitStack() as stack:
        urls = {}
        for mode in ("serve", "other_rule"):
            folder = tmp_path / mode
            folder.mkdir()
            urls[mode] = f"unix:{folder}/engine.sock"
            command = [sys.executable, str(HERE / "engine_process.py"), mode, "--uds", f"{folder}/engine.sock"]
            guarded = [sys.executable, str(ROOT / "server" / "launcher" / "guard.py"), "1", *command]
            process = stack.enter_context(
                subprocess.Popen(
                    guarded,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    env={"PYTHONPATH": str(ROOT)},
                    start_new_session=True,
                )
            )
            stack.callback(process.terminate)
            wait_for(Path(folder, "engine.sock").exists)
        yield urls


def test_one_engine_is_enough_and_the_others_are_told(start: Start, engines: dict[str, str], tmp_path: Path) -> None:
    missing = f"unix:{tmp_path}/missing.sock"
    options = [option for url in (engines["serve"], missing, engines["other_rule"]) for option in ("--engine", url)]
    gateway = start("gateway", *options)
    url = gateway.wait_url()
    assert f"the engine {missing} does not answer yet" in gateway.said
    assert f"the engine {engines['other_rule']} cannot be used: the engine (VisionDrop 0.1.0) has" in gateway.said
    assert httpx.get(f"{url}/health").status_code == 200
    gateway.process.send_signal(signal.SIGTERM)
    assert gateway.process.wait(timeout=10) == 0


def test_engines_that_do_not_fit_are_no_start(start: Start, engines: dict[str, str]) -> None:
    gateway = start("gateway", "--engine", engines["other_rule"])
    assert gateway.process.wait(timeout=10) == 1
    assert "of the budget rule" in gateway.said.splitlines()[-1]


def test_requests_reach_an_engine(start: Start, engines: dict[str, str]) -> None:
    gateway = start("gateway", "--engine", engines["serve"])
    answer = httpx.post(f"{gateway.wait_url()}/v1/chat/completions", json=ask(image()))
    assert answer.status_code == 200
