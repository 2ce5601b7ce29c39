"""An engine that is stopped: what runs ends as it would have, what comes is refused untouched, and then it goes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from draining_server import TAKEN_BACK
from served import free_port, process, wait_until_ready

from vd_plugin.wire import DRAINING

ROOT = Path(__file__).parents[2]
BODY = b"x" * 5_000_000

Start = Callable[[int, float], "Draining"]


class Draining:
    def __init__(self, child: subprocess.Popen[bytes], url: str, log: Path, pool: ThreadPoolExecutor) -> None:
        self.child, self.url, self.log, self._pool = child, url, log, pool

    def work(self, seconds: float) -> httpx.Response:
        return httpx.post(f"{self.url}/work?seconds={seconds}", content=BODY, timeout=30)

    def begin(self, seconds: float) -> Future[httpx.Response]:
        future = self._pool.submit(self.work, seconds)
        time.sleep(0.3)
        return future

    def begin_whole(self, seconds: float) -> Future[httpx.Response]:
        """Work whose answer does not begin before it is done."""
        future = self._pool.submit(httpx.post, f"{self.url}/whole?seconds={seconds}", timeout=30)
        time.sleep(0.3)
        return future

    def stop(self) -> float:
        self.child.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        return time.monotonic()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with ExitStack() as stack:

        def start_server(shutdown_timeout: int, notice_seconds: float) -> Draining:
            port, log = free_port(), tmp_path / "log"
            script = str(ROOT / "tests" / "support" / "draining_server.py")
            arguments = (script, str(port), str(shutdown_timeout), str(notice_seconds))
            path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
            child = stack.enter_context(process(*arguments, log=log, PYTHONPATH=path))
            url = f"http://127.0.0.1:{port}"
            wait_until_ready(f"{url}/health", child, log)
            return Draining(child, url, log, stack.enter_context(ThreadPoolExecutor(4)))

        yield start_server


def test_running_requests_end_and_new_ones_are_refused_untouched(start: Start) -> None:
    server = start(30, 0.5)
    running = server.begin(2)
    server.stop()
    for refusal in (server.work(0), httpx.get(f"{server.url}/health")):
        assert refusal.status_code == 503
        assert refusal.json()["error"]["type"] == DRAINING
    assert httpx.get(f"{server.url}/metrics").status_code == 200
    assert running.result().text.strip() == str(len(BODY))
    assert server.child.wait(timeout=3) == 0


def test_refusal_waits_for_the_end_of_the_body(start: Start) -> None:
    """Else the rest of it, which nobody reads, would reset the connection, and the refusal could be lost."""
    server = start(30, 2)
    server.stop()
    address = httpx.URL(server.url)
    with socket.create_connection((address.host, address.port)) as client:
        client.sendall(b"POST /work HTTP/1.1\r\nHost: engine\r\nContent-Length: 1000\r\n\r\n" + bytes(500))
        client.settimeout(0.5)
        with pytest.raises(TimeoutError):
            client.recv(1)
        client.sendall(bytes(500))
        assert client.recv(100).startswith(b"HTTP/1.1 503 ")


def test_idle_server_stays_to_say_so(start: Start) -> None:
    server = start(30, 1.5)
    stopped_at = server.stop()
    while time.monotonic() < stopped_at + 1:
        assert server.work(0).status_code == 503
    assert server.child.wait(timeout=3) == 0
    assert time.monotonic() - stopped_at > 1


def test_requests_are_cut_off_after_the_timeout(start: Start) -> None:
    server = start(1, 0.1)
    running = server.begin(60)
    stopped_at = server.stop()
    whole = server.begin_whole(60)
    with pytest.raises(httpx.RemoteProtocolError):
        running.result()
    assert whole.result().status_code == 503, "it came too late"
    assert server.child.wait(timeout=3) == 0
    assert 0.5 < time.monotonic() - stopped_at < 4
    assert server.log.read_text().count(TAKEN_BACK) == 1


def test_second_signal_ends_the_wait(start: Start) -> None:
    server = start(60, 0.1)
    running = server.begin(60)
    server.stop()
    time.sleep(0.5)
    assert server.child.poll() is None
    server.stop()
    with pytest.raises(httpx.RemoteProtocolError):
        running.result()
    assert server.child.wait(timeout=3) == 0


def test_without_a_timeout_requests_are_cut_off_at_once(start: Start) -> None:
    server = start(0, 2)
    begun, whole = server.begin(60), server.begin_whole(60)
    stopped_at = server.stop()
    with pytest.raises(httpx.RemoteProtocolError):
        begun.result()
    refused = whole.result()
    assert refused.status_code == 500, "it may have been computed: not to be sent elsewhere"
    assert "stopped before the answer was complete" in refused.json()["error"]["message"]
    assert server.child.wait(timeout=3) == 0
    assert time.monotonic() - stopped_at < 2, "nobody is told first"
    assert server.log.read_text().count(TAKEN_BACK) == 2
