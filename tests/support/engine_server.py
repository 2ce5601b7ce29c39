"""One real engine as a process of its own on a fixed port, which can be killed, stopped and started again."""

from __future__ import annotations

import os
import re
import signal
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
from served import START_SECONDS, free_port, process, wait_until_ready

SHUTDOWN_TIMEOUT = 60

_FAST = ("--enforce-eager", "--skip-mm-profiling", "--max-model-len", "6144", "--max-num-seqs", "8")
EXACT = ("--dtype", "float32")
"""In float32 an answer is the same alone and in a batch."""

_ONE_PROCESS = ("--distributed-executor-backend", "uni")
"""The worker in the engine core's own process saves ten seconds a start. On a CPU this needs the variable below."""

_ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


class EngineServer:
    """`options` are vLLM's. `folder` gets a log for each run, which has every request that the engine took up."""

    def __init__(self, model: Path, folder: Path, *options: str) -> None:
        folder.mkdir()
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._folder, self._stack = folder, ExitStack()
        self._num_runs = 0
        limits = ("--shutdown-timeout", str(SHUTDOWN_TIMEOUT), "--enable-log-requests")
        address = ("--host", "127.0.0.1", "--port", str(self.port))
        fast = (*_FAST, *EXACT, *(options or _ONE_PROCESS))
        self._command = ("-m", "vd_plugin.engine", str(model), *address, *limits, *fast)

    @property
    def log(self) -> Path:
        """That of the present run."""
        return self._folder / f"{self._num_runs}.log"

    def start(self) -> None:
        """Returns at once; see `wait_ready`."""
        self._num_runs += 1
        self.child = self._stack.enter_context(process(*self._command, log=self.log, **_ENVIRONMENT))

    def wait_ready(self) -> None:
        wait_until_ready(f"{self.url}/health", self.child, self.log)

    def kill(self) -> None:
        """The whole process group, without a word."""
        os.killpg(self.child.pid, signal.SIGKILL)
        self.child.wait()

    def stop(self) -> int:
        """As an orchestrator does: SIGTERM to the process that it has started. Returns the exit status."""
        self.child.send_signal(signal.SIGTERM)
        return self.child.wait(timeout=SHUTDOWN_TIMEOUT + START_SECONDS)

    def request_ids(self) -> list[str]:
        """Of the chat and text completions that this run has taken up, as steady_load.py numbers them.

        vLLM gives /v1/responses ids of its own.
        """
        return re.findall(r"Received request \S*?(load-\d+)", self.log.read_text())

    def num_taken(self) -> int:
        """Requests that this run has taken up, canaries not counted."""
        return len(re.findall(r"Received request (?!\S*canary-)", self.log.read_text()))

    def num_answered(self) -> int:
        """Requests that this run has finished, by vLLM's own count. Canaries, prompts of one token, are left out."""
        text = self._metrics()

        def read(pattern: str) -> int:
            return sum(int(float(value)) for value in re.findall(rf"^{pattern} (\S+)$", text, re.MULTILINE))

        canaries = read(r'vllm:request_prompt_tokens_bucket\{[^}]*le="1\.0"[^}]*\}')
        return read(r"vllm:request_prompt_tokens_count\{[^}]*\}") - canaries

    def wait_idle(self, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not re.search(r"^vllm:num_requests_running\{[^}]*\} 0\.0$", self._metrics(), re.MULTILINE):
            assert time.monotonic() < deadline, "the engine is still busy"
            time.sleep(0.2)

    def close(self) -> None:
        self._stack.close()

    def _metrics(self) -> str:
        return httpx.get(f"{self.url}/metrics").text
