"""A server of this machine's own engine, for the length of a step: the whole stack, or the engine alone."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx

from benchmarks.gpu.engine_log import facts_of
from benchmarks.gpu.processes import running
from benchmarks.gpu.step import StepError
from server.launcher.log import last_error, last_words

_POLL_SECONDS: Final = 0.2
_SECONDS: Final = 600
"""A request may wait for as long as its step may take."""


@dataclass(frozen=True, slots=True)
class Server:
    client: httpx.Client
    """With the server's address, and without limits of its own."""
    model: str
    """The name by which requests ask for it."""
    log: Path
    """The engine's."""
    pid: int
    start_seconds: float

    def facts(self) -> dict[str, object]:
        """What vLLM made of its options."""
        return {"start_seconds": round(self.start_seconds, 1), **facts_of(self.log)}


@contextlib.contextmanager
def serve(
    model: str, log: Path, options: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> Generator[Server]:
    """`visiondrop serve`: gateway and engine.

    Args:
        log: for the engine's output; the gateway's goes beside it.
        options: of the engine.
        environment: of both; this process's own variables come besides, unless it has a PATH of its own.

    Raises:
        StepError: it did not start.
    """
    port = _free_port()
    command = [sys.executable, "-m", "server.cli", "serve", model, "--port", str(port), "--engine-log", str(log)]
    with _serving([*command, "--", *options], port, "/ready", log, log.with_suffix(".gateway"), environment) as server:
        yield server


@contextlib.contextmanager
def serve_engine(model: str, log: Path, options: Sequence[str] = ()) -> Generator[Server]:
    """vLLM's own server with the plugin, without a gateway: it has vLLM's metrics and fields.

    Raises:
        StepError: it did not start.
    """
    port = _free_port()
    command = [sys.executable, "-m", "vd_plugin.engine", model, "--host", "127.0.0.1", "--port", str(port), *options]
    with _serving(command, port, "/health", log, log) as server:
        yield server


@contextlib.contextmanager
def _serving(
    command: Sequence[str],
    port: int,
    ready_path: str,
    log: Path,
    output: Path,
    environment: Mapping[str, str] | None = None,
) -> Generator[Server]:
    given = environment or {}
    own = {"VISIONDROP_QUEUE_SECONDS": str(_SECONDS), "VLLM_LOGGING_LEVEL": "INFO"}  # the log's facts are read
    full = {**({} if "PATH" in given else os.environ), **given, **own}
    url = f"http://127.0.0.1:{port}"
    log.unlink(missing_ok=True)  # the runner may go into a folder of an earlier one
    start = time.monotonic()
    limits = httpx.Limits(max_connections=None)
    with (
        running(command, output, full) as process,
        httpx.Client(base_url=url, timeout=_SECONDS, limits=limits, trust_env=False) as client,
    ):
        _wait_ready(process, client, ready_path, log, output)
        seconds = time.monotonic() - start
        model = client.get("/v1/models").json()["data"][0]["id"]
        yield Server(client, model, log, process.pid, seconds)


def _wait_ready(process: subprocess.Popen[bytes], client: httpx.Client, path: str, log: Path, output: Path) -> None:
    """However long it takes: the step has a time limit.

    Raises:
        StepError: the process ended.
    """
    while process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if client.get(path, timeout=5).status_code == 200:
                return
        time.sleep(_POLL_SECONDS)
    raise StepError(f"the server did not start: {why_ended(log) or why_ended(output) or 'no error in its log'} ({log})")


def why_ended(log: Path) -> str | None:
    """The sentence or the error that an engine left in its log."""
    return last_words(log) or last_error(log)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
