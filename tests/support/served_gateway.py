"""`visiondrop gateway` as a process, before a fake engine that is a process, too."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from metric_text import metric

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class ServedGateway:
    """Addresses of a running gateway and its engine, and what can be read off them from outside."""

    url: str
    """Without the `/v1`."""
    engine_socket: Path
    process: psutil.Process

    def rss_bytes(self) -> int:
        return int(self.process.memory_info().rss)

    def metric(self, series: str) -> float:
        return metric(httpx.get(f"{self.url}/metrics", timeout=5).text, series)

    def seen(self, name: str) -> int:
        """A counter of the engine's own: `requests` or `abandoned`."""
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(self.engine_socket))) as client:
            return int(client.get("http://engine/seen").json()[name])


@contextmanager
def serve(engine_seconds: float = 0.0, **settings: object) -> Iterator[ServedGateway]:
    """Args: settings: by their names in lower case, as in server/settings.py."""
    foreign = {name: value for name, value in os.environ.items() if not name.startswith("VISIONDROP_")}
    environment = {
        **foreign,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}",
        **{f"VISIONDROP_{name.upper()}": str(value) for name, value in settings.items()},
    }
    # Not pytest's folder: a socket's path may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="vd-clients-") as name:
        folder = Path(name)
        socket = folder / "engine.sock"
        engine = [sys.executable, str(HERE / "client_engine.py"), str(socket), str(engine_seconds)]
        gateway = [sys.executable, "-m", "server.cli", "gateway", "--engine", f"unix:{socket}", "--port", "0"]
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for label, command in (("engine", engine), ("gateway", gateway)):
                with (folder / f"{label}.out").open("wb") as out, (folder / f"{label}.err").open("wb") as said:
                    processes.append(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=out, stderr=said))
            url = _wait_url(folder / "gateway.err", processes[1])
            yield ServedGateway(url, socket, psutil.Process(processes[1].pid))
        finally:
            for process in reversed(processes):
                process.terminate()
                try:
                    process.wait(timeout=5)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            said_by_gateway = (folder / "gateway.err").read_text()
        assert "Traceback" not in said_by_gateway, said_by_gateway


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 5) -> None:
    """Fail with `what` unless the condition comes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def _wait_url(said_path: Path, process: subprocess.Popen[bytes]) -> str:
    deadline = time.monotonic() + 30
    while (found := re.search(r"at (http://\S+)/v1", said_path.read_text())) is None:
        assert process.poll() is None, said_path.read_text()
        assert time.monotonic() < deadline, f"the gateway did not start: {said_path.read_text()}"
        time.sleep(0.02)
    return found.group(1)
