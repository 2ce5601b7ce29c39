"""Standard output and standard error of a server: one that nobody reads any more does not stop it.

A full pipe holds whoever writes to it, for ever, and here that would be the event loop. So lines go through a queue of
limited size, and a thread writes them. Lines that find no room are dropped, counted, and reported once the rest flows.
"""

from __future__ import annotations

import io
import logging
import os
import select
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from types import TracebackType
from typing import Final, TextIO, TypeAlias

_MAX_QUEUED_BYTES: Final = 4 * 1024 * 1024
"""For each stream; some 7,000 lines of the request log."""

_END_SECONDS: Final = 1.0
"""What the last lines get before the process ends without them."""

_ExcInfo: TypeAlias = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]

_log = logging.getLogger("visiondrop")


class QueuedStream(io.TextIOBase):
    """A text stream whose writers never wait.

    Args:
        stream: what it stands for; only its file is used from now on.
        name: for people.
    """

    def __init__(self, stream: TextIO, name: str, max_queued_bytes: int = _MAX_QUEUED_BYTES) -> None:
        self.num_dropped = 0
        """Lines, since the beginning."""
        self._stream = stream
        self._fd = stream.fileno()
        self._name = name
        self._max_queued_bytes = max_queued_bytes
        self._changed = threading.Condition()
        self._begun = ""
        self._queue: list[bytes] = []
        self._num_queued_bytes = 0
        self._num_unreported = 0
        self._is_writing = False
        threading.Thread(target=self._run, name=f"writer of {name}", daemon=True).start()

    def write(self, text: str) -> int:
        with self._changed:
            self._begun += text
            if "\n" in text:
                self._enqueue()
        return len(text)

    def flush(self) -> None:
        """Hand on a line that has only been begun. It does not wait for anything to be written."""
        with self._changed:
            if self._begun:
                self._enqueue()

    def wait_written(self, seconds: float) -> None:
        """Return when everything has been written, or when the time is up."""
        with self._changed:
            self._changed.wait_for(lambda: not self._queue and not self._is_writing, seconds)

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._fd

    def _enqueue(self) -> None:
        text, self._begun = self._begun, ""
        data = text.encode(self._stream.encoding, "backslashreplace")
        if self._queue and self._num_queued_bytes + len(data) > self._max_queued_bytes:
            num_lines = max(text.count("\n"), 1)
            self.num_dropped += num_lines
            self._num_unreported += num_lines
            return
        self._queue.append(data)
        self._num_queued_bytes += len(data)
        self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._is_writing = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._queue)
                lines, num_dropped = self._queue, self._num_unreported
                self._queue, self._num_queued_bytes, self._num_unreported = [], 0, 0
                self._is_writing = True
            for line in lines:  # one by one: what fits a pipe's buffer is not torn apart by other writers
                self._write(line)
            if num_dropped:
                _log.warning("%d lines for %s were dropped, because it was not read", num_dropped, self._name)

    def _write(self, data: bytes) -> None:
        while data:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:
                select.select((), (self._fd,), ())
            except OSError:  # nobody will ever read it, or there is no room on the disk
                with self._changed:
                    self.num_dropped += max(data.count(b"\n"), 1)
                return


@contextmanager
def queued_output() -> Generator[None, None, None]:
    """`sys.stdout` and `sys.stderr` are QueuedStreams meanwhile, where they are files."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _queued(sys.stdout, "standard output"), _queued(sys.stderr, "standard error")
    try:
        yield
    finally:
        deadline = time.monotonic() + _END_SECONDS
        for stream in _queued_streams():
            stream.wait_written(deadline - time.monotonic())
        sys.stdout, sys.stderr = before


def num_dropped_lines() -> int:
    """Of both streams, since they are queued."""
    return sum(stream.num_dropped for stream in _queued_streams())


def escaped(text: str) -> str:
    """`text` on one line, with nothing in it that steers a terminal (controls, direction of writing, separators)."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class LineFormatter(logging.Formatter):
    """One line for each message, whatever it quotes. The lines of a traceback are indented."""

    def __init__(self) -> None:
        super().__init__("visiondrop: %(levelname)s: %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
        return escaped(super().formatMessage(record))

    def formatException(self, ei: _ExcInfo) -> str:  # noqa: N802  # logging's name
        return "\n".join(f"  {escaped(line)}" for line in super().formatException(ei).split("\n"))


def _queued(stream: TextIO, name: str) -> TextIO:
    try:
        return QueuedStream(stream, name)  # type: ignore[return-value]  # a TextIO is what has its methods
    except (OSError, ValueError, AttributeError):  # no file behind it, or none at all (`>&-`)
        return stream


def _queued_streams() -> list[QueuedStream]:
    return [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, QueuedStream)]
