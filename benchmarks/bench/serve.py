"""Through the gateway, with clients that are not ours: `vllm bench serve` on a whole server, and what the gateway adds.

The server is `visiondrop serve` with the demo model; vLLM's client sends it random images at a budget and in full. The
gateway's own share comes from `benchmarks/gateway_overhead.py`, before an engine that answers at once: beside a real
one, milliseconds drown.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from benchmarks.bench.figures import Mark
from benchmarks.bench.settings import Settings
from vd_plugin.demo import MODEL_NAME, find_model
from vd_plugin.schedule import FULL, Budget

ROOT: Final = Path(__file__).parents[2]
BUDGETS: Final[tuple[Budget, ...]] = (FULL, 320)
GATEWAY_SECONDS: Final = 0.010
CONCURRENCY: Final = 4
START_SECONDS: Final = 300


def count(settings: Settings) -> int:
    return 1 + len(BUDGETS)


def num_prompts(settings: Settings) -> int:
    return 200 if settings.on_gpu else 24


def measure(settings: Settings, advance: Callable[[], None]) -> dict[str, Any]:
    """Raises:
    RuntimeError: the server or a client failed; the message is what it said.
    """
    gateway = _run(sys.executable, "benchmarks/gateway_overhead.py", "--requests", "100")
    rows = json.loads(gateway.splitlines()[-1])["rows"]
    advance()
    served = {}
    with tempfile.TemporaryDirectory() as folder, _server(Path(folder), settings) as url:
        for budget in BUDGETS:
            served[str(budget)] = _bench_serve(url, budget, Path(folder), settings)
            advance()
    return {
        "gateway": rows,
        "measured": "cpu_seconds" if settings.clock == "process_time" else "added_seconds",
        "served": served,
    }


def bench_serve_command(url: str, budget: Budget, result: Path, prompts: int) -> list[str]:
    """The arguments of vLLM's client."""
    return [
        "bench", "serve",
        "--backend", "openai-chat",
        "--endpoint", "/v1/chat/completions",
        "--base-url", url,
        "--model", MODEL_NAME,
        "--tokenizer", str(find_model()),
        "--dataset-name", "random-mm",
        "--random-mm-bucket-config", "{(448, 448, 1): 1.0}",
        "--random-mm-base-items-per-request", "1",
        "--random-input-len", "24",
        "--random-output-len", "8",
        "--ignore-eos",
        "--num-prompts", str(prompts),
        "--num-warmups", "2",
        "--max-concurrency", str(CONCURRENCY),
        "--extra-body", json.dumps({"visual_token_budget": budget}),
        "--percentile-metrics", "ttft",
        "--metric-percentiles", "50,99",
        "--disable-tqdm",
        "--save-result",
        "--result-dir", str(result.parent),
        "--result-filename", result.name,
    ]  # fmt: skip


def _bench_serve(url: str, budget: Budget, folder: Path, settings: Settings) -> dict[str, Any]:
    result = folder / f"{budget}.json"
    command = bench_serve_command(url, budget, result, num_prompts(settings))
    said = _run(sys.executable, "-m", "vllm.entrypoints.cli.main", *command)
    if not result.exists():
        raise RuntimeError(f"vllm bench serve left no result: {said[-2000:]}")
    found = json.loads(result.read_text())
    names = ("completed", "failed", "request_throughput", "p50_ttft_ms", "p99_ttft_ms")
    figures = {name: found[name] for name in names}
    if figures["completed"] != num_prompts(settings):
        raise RuntimeError(f"vllm bench serve: {figures}; {found.get('errors')}")
    return figures


@contextmanager
def _server(folder: Path, settings: Settings) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, log = f"http://127.0.0.1:{port}", folder / "server.log"
    command = [sys.executable, "-m", "server.cli", "serve", "--port", str(port), "--", "--max-num-seqs", "8"]
    if settings.eager:
        command.append("--enforce-eager")
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", **os.environ}
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, start_new_session=True
        )
    try:
        _wait_until_ready(url, server, log)
        yield url
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _wait_until_ready(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        with suppress(urllib.error.URLError, ConnectionError), urllib.request.urlopen(f"{url}/ready", timeout=5):
            return
        time.sleep(0.5)
    raise RuntimeError(f"the server did not start: {log.read_text()[-2000:]}")


def _run(*command: str) -> str:
    """What a command prints.

    Raises:
        RuntimeError: it fails.
    """
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} ended with status {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def marks(result: dict[str, Any]) -> list[Mark]:
    share = max(row[result["measured"]] - row["check_seconds"] for row in result["gateway"])
    name = "seconds that the gateway adds to a first token, the image's check apart"
    return [Mark(name, share, GATEWAY_SECONDS, at_least=False)]


def table(result: dict[str, Any]) -> str:
    lines = ["| request | the gateway adds | its CPU time | of it the image's check |", "|---|---|---|---|"]
    for row in result["gateway"]:
        figures = (f"{row[name] * 1e3:.1f} ms" for name in ("added_seconds", "cpu_seconds", "check_seconds"))
        lines.append(f"| {' | '.join((row['request'], *figures))} |")
    lines += [
        "",
        "| `vllm bench serve`, demo model | requests per second | first token, p50 and p99 | answered |",
        "|---|---|---|---|",
    ]
    for budget, figures in result["served"].items():
        lines.append(
            f"| {budget} | {figures['request_throughput']:.2f} "
            f"| {figures['p50_ttft_ms']:.0f} ms, {figures['p99_ttft_ms']:.0f} ms | {figures['completed']} |"
        )
    return "\n".join(lines)
