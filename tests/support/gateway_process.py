"""Real processes: a gateway, a fake engine as its child, and what they said."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


class Gateway:
    """A gateway process. `settings` are VISIONDROP_* variables, without the prefix.

    `mode` is one of engine_process.py's, or "gateway" for a gateway without an engine of its own.
    """

    def __init__(self, folder: Path, mode: str, *options: str, **settings: object) -> None:
        self.said_path = folder / "stderr"
        self.temp = Path(
            tempfile.mkdtemp(prefix="vd-")
        )  # a socket's path may have 107 bytes, pytest's folders are deep
        environment = {**os.environ, "TMPDIR": str(self.temp), "PYTHONPATH": str(ROOT)}
        environment |= {f"VISIONDROP_{name.upper()}": str(value) for name, value in settings.items()}
        serve = [sys.executable, str(HERE / "serve_fake.py"), mode]
        command = [sys.executable, "-m", "server.cli", "gateway", "--port", "0"] if mode == "gateway" else serve
        with self.said_path.open("wb") as said, (folder / "stdout").open("wb") as out:
            self.process = subprocess.Popen(
                [*command, *options],
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
        """That of the newest run."""
        paths = sorted(self.temp.glob("*/engine*.log"), key=lambda path: path.stat().st_mtime_ns)
        return paths[-1].read_text() if paths else ""

    def wait_said(self, words: str, times: int = 1) -> None:
        wait_for(lambda: self.said.count(words) >= times, self)

    def wait_url(self) -> str:
        self.wait_said("serving fake-llava at")
        found = re.search(r"serving \S+ at (http://\S+)/v1", self.said)
        assert found
        return found.group(1)

    def grandchild(self) -> int:
        """The process that stands for vLLM's EngineCore."""
        wait_for(lambda: "GRANDCHILD" in self.engine_log, self)
        found = re.search(r"GRANDCHILD (\d+)", self.engine_log)
        assert found
        return int(found.group(1))

    def members(self) -> list[int]:
        """All processes below the gateway that are alive: guard, engine, the engine's own child."""
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


Start = Callable[..., Gateway]


@contextmanager
def gateways(folder: Path) -> Generator[Start, None, None]:
    """Starts gateways, each in a folder of its own, and ends what is left of them."""
    started: list[Gateway] = []

    def start(mode: str, *options: str, **settings: object) -> Gateway:
        own = folder / str(len(started))
        own.mkdir()
        started.append(Gateway(own, mode, *options, **settings))
        return started[-1]

    try:
        yield start
    finally:
        for gateway in started:
            if gateway.process.poll() is None:
                gateway.process.kill()
                gateway.process.wait()
            shutil.rmtree(gateway.temp, ignore_errors=True)
