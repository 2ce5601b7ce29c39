"""Keeps the child engine running: when it stops, for whatever reason, it is started again on the same socket.

    start -> ready -> stopped -> back-off -> started again -> ready -> ...

The gateway stays up meanwhile and turns requests away. The first start is different: an engine that does not come up
then has bad input, and another try would not fix that.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from server.launcher import log
from server.launcher.folder import EngineFolder
from server.launcher.process import EngineProcess

_POLL_SECONDS: Final = 0.3
_MAX_DOUBLINGS: Final = 30


@dataclass(frozen=True, slots=True)
class Backoff:
    """Pauses before an engine is started again: each is twice the one before, up to a limit.

    An engine that has been ready for `reset_seconds` gets the first pause again.
    """

    first_seconds: float = 1.0
    longest_seconds: float = 60.0
    reset_seconds: float = 60.0

    def pause_seconds(self, num_failures: int) -> float:
        """The pause after the `num_failures`-th failure in a row, counted from 1."""
        return min(self.first_seconds * float(2 ** min(num_failures - 1, _MAX_DOUBLINGS)), self.longest_seconds)


class Supervisor:
    """An engine that is kept running. `notify` takes the sentences for the person at the terminal."""

    def __init__(
        self,
        command: Sequence[str],
        folder: EngineFolder,
        process: EngineProcess,
        backoff: Backoff,
        notify: Callable[[str], None],
    ) -> None:
        self._command = command
        self._folder = folder
        self._process = process
        self._backoff = backoff
        self._notify = notify

    @classmethod
    async def start(
        cls, command: Sequence[str], log_path: Path | None, backoff: Backoff, notify: Callable[[str], None]
    ) -> Supervisor:
        """Start the engine for the first time.

        Raises:
            OSError: the log cannot be written.
        """
        folder = EngineFolder(log_path)
        try:
            process = await EngineProcess.start(command, folder)
        except BaseException:
            folder.remove()
            raise
        return cls(command, folder, process, backoff, notify)

    @property
    def url(self) -> str:
        """Where the engine is; the same for every run."""
        return self._folder.url

    @property
    def log_path(self) -> Path:
        """The log of the present run."""
        return self._process.log_path

    def activity(self) -> str:
        """What an engine that loads is doing."""
        return log.activity(self.log_path)

    def has_exited(self) -> bool:
        return self._process.has_exited()

    async def wait_exit(self) -> None:
        """Return when the present run of the engine is over."""
        await self._process.wait_exit()

    def describe_exit(self, *, while_loading: bool) -> str:
        """Why the engine is gone, as one sentence. From here on its log is kept."""
        return self._process.describe_exit(while_loading=while_loading)

    def keep_logs(self) -> None:
        self._folder.keep_logs = True

    async def run(self, is_ready: Callable[[], Awaitable[bool]], start_timeout_seconds: float) -> None:
        """Start the engine again whenever it stops; never returns. The engine must be ready.

        Args:
            is_ready: whether the engine answers now.
            start_timeout_seconds: an engine that is not ready by then is killed and started again.
        """
        num_failures = 0
        ready_at: float | None = time.monotonic()
        while True:
            await self._process.wait_exit()
            await is_ready()  # so that nobody is sent to it any more
            if ready_at is not None and time.monotonic() - ready_at >= self._backoff.reset_seconds:
                num_failures = 0
            num_failures += 1
            pause = self._backoff.pause_seconds(num_failures)
            self._notify(self.describe_exit(while_loading=ready_at is None))
            self._notify(f"the engine is started again in {pause:g} s")
            await self._process.stop()  # processes that it left behind
            await asyncio.sleep(pause)
            ready_at = await self._start_again(is_ready, start_timeout_seconds)

    async def _start_again(self, is_ready: Callable[[], Awaitable[bool]], timeout_seconds: float) -> float | None:
        """Returns when it was ready, on the monotonic clock, or None if it never was."""
        began = time.monotonic()
        try:
            self._process = await EngineProcess.start(self._command, self._folder)
        except OSError as error:
            self._notify(f"the engine cannot be started: {error}")
            return None
        while not self._process.has_exited():
            if await is_ready():
                now = time.monotonic()
                self._notify(f"engine ready again after {now - began:.0f} s, its log: {self.log_path}")
                return now
            if time.monotonic() - began > timeout_seconds:
                self._notify(f"the engine was not ready again after {timeout_seconds:g} s")
                await self._process.stop()
            await asyncio.sleep(_POLL_SECONDS)
        return None

    async def stop(self) -> None:
        """Stop the engine, kindly at first, and remove its folder."""
        await self._process.stop()
        self._folder.remove()

    def kill(self) -> None:
        """Kill the engine at once. Its folder goes, too, unless it holds the log of a failure."""
        self._process.kill()
        self._folder.remove()
