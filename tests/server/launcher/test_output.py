"""What a server writes: nobody who stops reading it stops the server, and no line of it is more than a line."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import httpx
import pytest
from asgi_transport import AsgiTransport
from fake_engine import FakeEngine
from gateway import make_app
from gateway_process import ROOT, wait_for
from images import ask
from metric_text import metric, metrics_of
from served import free_port

from server.launcher.output import LineFormatter, QueuedStream, escaped, queued_output
from server.settings import Settings

SPLITTERS = "\n\r\v\f\x1c\x85\u2028\u2029"
STEERING = "\x00\x07\x08\x1b\x7f\x9b\u061c\u200e\u202e\u2066\ufeff\U000e0041"


class Pipe:
    """A pipe whose reader reads when a test does."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        self.stream: TextIO = open(self.writer, "w", encoding="utf-8", closefd=False)  # noqa: SIM115  # kept open for the test

    def fill(self) -> None:
        os.set_blocking(self.writer, False)
        for size in (4096, 1):
            with suppress(BlockingIOError):
                while os.write(self.writer, b"." * size):
                    pass
        os.set_blocking(self.writer, True)

    def read_until(self, end: str) -> str:
        text = ""
        while not text.endswith(end):
            text += os.read(self.reader, 65536).decode()
        return text


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    os.close(pipe.writer)
    with suppress(OSError):  # closed by the test
        os.close(pipe.reader)


def test_lines_come_out_whole_and_in_order(pipe: Pipe) -> None:
    stream = QueuedStream(pipe.stream, "the log")
    for number in range(1000):
        stream.write(f"line {number}")
        stream.write("\n")
    stream.write("begun")
    stream.flush()
    expected = "".join(f"line {number}\n" for number in range(1000)) + "begun"
    assert pipe.read_until("begun") == expected


def test_writer_never_waits_for_a_pipe_that_nobody_reads(pipe: Pipe, caplog: pytest.LogCaptureFixture) -> None:
    pipe.fill()
    stream = QueuedStream(pipe.stream, "the log", max_queued_bytes=10_000)
    stream.write("first\n")
    wait_for(lambda: not stream._queue)  # the thread has it, and waits
    for number in range(10_000):
        stream.write(f"line {number}\n")
    assert 8000 < stream.num_dropped < 10_000
    began = time.monotonic()
    stream.wait_written(0.1)
    assert time.monotonic() - began < 5
    assert not caplog.messages

    num_kept = 10_000 - stream.num_dropped
    text = pipe.read_until(f"line {num_kept - 1}\n").lstrip(".")
    assert text.splitlines() == ["first", *(f"line {number}" for number in range(num_kept))], "the oldest are kept"
    wait_for(lambda: bool(caplog.messages))
    assert caplog.messages == [f"{stream.num_dropped} lines for the log were dropped, because it was not read"]
    stream.write("again\n")
    assert pipe.read_until("again\n") == "again\n"


def test_reader_that_is_gone_is_no_error(pipe: Pipe, caplog: pytest.LogCaptureFixture) -> None:
    os.close(pipe.reader)
    stream = QueuedStream(pipe.stream, "the log")
    stream.write("a\nb\n")
    wait_for(lambda: stream.num_dropped == 2)
    assert not caplog.messages


def test_only_files_are_queued_and_only_meanwhile(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with queued_output():
        assert (sys.stdout, sys.stderr) == before, "pytest's are none"
        print("seen")
    assert capsys.readouterr().out == "seen\n"


@pytest.mark.anyio
async def test_dropped_lines_are_counted() -> None:
    app = make_app(Settings(), FakeEngine(), num_dropped_lines=lambda: 3)
    async with httpx.AsyncClient(transport=AsgiTransport(app), base_url="http://gateway") as client:
        assert metric(await metrics_of(client), "visiondrop_log_lines_dropped_total") == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_gateway_serves_and_stops_although_nobody_reads_what_it_writes(
    pipe: Pipe, tmp_path: Path, number: signal.Signals
) -> None:
    pipe.fill()
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests/support/serve_fake.py"), "serve", "--port", str(port)],
        stdout=pipe.stream,
        stderr=pipe.stream,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: _is_ready(url), seconds=60)
        for _ in range(5):
            assert httpx.post(f"{url}/v1/chat/completions", json=ask(), timeout=20).status_code == 200
        process.send_signal(number)
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.wait()


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("character", SPLITTERS + STEERING)
def test_what_splits_lines_or_steers_terminals_is_escaped(character: str) -> None:
    text = escaped(f"a{character}b")
    assert text.isprintable()
    assert text.encode().decode("unicode_escape") == f"a{character}b"
    assert escaped("déjà vu 你好") == "déjà vu 你好"


def test_message_is_one_line_and_a_traceback_is_indented() -> None:
    forged = f"x\nvisiondrop: WARNING: forged {SPLITTERS}{STEERING}"
    try:
        raise ValueError(forged)
    except ValueError:
        record = logging.LogRecord("visiondrop", logging.ERROR, "", 0, "no %s", (forged,), sys.exc_info())
    first, *rest = LineFormatter().format(record).split("\n")
    assert first.startswith("visiondrop: ERROR: visiondrop: no x\\nvisiondrop: WARNING: forged")
    assert len(rest) >= 3
    assert all(line.startswith("  ") and line.isprintable() for line in rest)
