"""Progress of something slow: one line that changes on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import shutil
import time
from typing import Final, TextIO

_PLAIN_INTERVAL_SECONDS: Final = 10.0


class Progress:
    """Call `show` as often as you like, and `clear` before anything else is printed."""

    def __init__(self, what: str, out: TextIO) -> None:
        self._what = what
        self._out = out
        self._is_terminal = out.isatty()
        self._started = time.monotonic()
        self._next_plain = 0.0
        self._last_detail = ""

    @property
    def elapsed_seconds(self) -> float:
        return time.monotonic() - self._started

    def show(self, detail: str) -> None:
        """Report what is going on. Elsewhere than on a terminal: when it is news, or after a while."""
        line = f"{self._what}: {self.elapsed_seconds:.0f} s, {detail}"
        if self._is_terminal:
            width = shutil.get_terminal_size().columns - 1
            self._write(f"\r\x1b[K{line[:width]}")
        elif detail != self._last_detail or self.elapsed_seconds >= self._next_plain:
            self._last_detail = detail
            self._next_plain = self.elapsed_seconds + _PLAIN_INTERVAL_SECONDS
            self._write(f"{line}\n")

    def clear(self) -> None:
        if self._is_terminal:
            self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()
