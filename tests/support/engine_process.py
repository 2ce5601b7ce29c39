"""The fake engine as a process: `python engine_process.py MODE --uds PATH`. The modes are how an engine can behave."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import uvicorn
from fake_engine import FakeEngine

from vd_plugin.schedule import RULE_VERSION


def main(mode: str, uds: str) -> None:
    if mode == "sentence":
        print("visiondrop: error: there is no model 'nowhere'", file=sys.stderr)
        sys.exit(2)
    if mode == "traceback":
        print("Traceback (most recent call last):\n  File ...\nValueError: heads do not divide\n", file=sys.stderr)
        print("RuntimeError: Engine core initialization failed. See root cause above.", file=sys.stderr)
        sys.exit(1)
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    marker = Path(uds).with_name("started")  # in the folder that all runs of an engine share
    is_first = not marker.exists()
    marker.touch()
    if mode == "dies_again" and not is_first:
        print("ValueError: no second life", file=sys.stderr)
        sys.exit(1)
    # As vLLM's API server has its EngineCore: a process that does not notice when its parent is killed.
    grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(f"GRANDCHILD {grandchild.pid}", flush=True)
    if mode in ("loading", "stubborn"):
        print("INFO 01-01 00:00:00 [gpu_model_runner.py:1] Starting to load model x...", flush=True)
        time.sleep(600)

    if mode == "loses_its_core" and is_first:
        threading.Thread(target=_end_with, args=(grandchild,), daemon=True).start()

    engine = FakeEngine()
    if mode == "other_rule":
        assert engine.geometry is not None
        engine.geometry["geometry"]["rule_version"] = RULE_VERSION + 1
    if mode == "slow" or (mode == "first_slow" and is_first):
        engine.hold = True
    uvicorn.run(_paced(engine) if mode == "paced" else engine, uds=uds, log_level="warning")


def _end_with(core: subprocess.Popen[bytes]) -> None:
    """As vLLM's API server does."""
    core.wait()
    words = "[shutdown] MPClient: engine core exited unexpectedly; starting cleanup"
    print(f"(APIServer pid=7) WARNING 01-01 00:00:00 [core_client.py:817] {words}", flush=True)
    os._exit(0)


def _paced(engine: FakeEngine) -> Callable[..., Awaitable[None]]:
    """The same answers, each part of a chat completion 0.3 s after the one before."""

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        async def send_late(message: dict[str, Any]) -> None:
            if scope.get("path") == "/v1/chat/completions" and message["type"] == "http.response.body":
                await asyncio.sleep(0.3)
            await send(message)

        await engine(scope, receive, send_late)

    return app


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[sys.argv.index("--uds") + 1])
