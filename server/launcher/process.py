"""One run of the engine as a child process: started, watched, and gone when the gateway is."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from server.launcher import guard, log
from server.launcher.folder import EngineFolder

_STOP_SECONDS: Final = 5.0
"""What vLLM gets between SIGTERM and SIGKILL."""


class EngineProcess:
    """One run of an engine."""

    def __init__(self, process: asyncio.subprocess.Process, folder: EngineFolder, log_path: Path) -> None:
        self._process = process
        self._folder = folder
        self.log_path = log_path
        self._exit = asyncio.ensure_future(process.wait())

    @classmethod
    async def start(cls, command: Sequence[str], folder: EngineFolder) -> EngineProcess:
        """Start `command --uds SOCKET`, in its own process group.

        The options that are added go to the end. Socket and log are in `folder`.

        Raises:
            OSError: the log cannot be written.
        """
        log_path = folder.prepare_run()
        with log_path.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", guard.__file__, str(_STOP_SECONDS)),
                *(guard.REMOVE_OPTION, str(folder.path)),
                *command,
                *("--uds", str(folder.socket_path)),
                stdin=asyncio.subprocess.PIPE,  # the guard's life line, see guard.py
                stdout=output,
                stderr=output,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )
        return cls(process, folder, log_path)

    def has_exited(self) -> bool:
        return self._exit.done()

    async def wait_exit(self) -> None:
        """Return when the engine is gone."""
        await asyncio.shield(self._exit)

    def describe_exit(self, *, while_loading: bool) -> str:
        """Why the engine is gone, as one sentence. From here on its log is kept."""
        sentence = log.last_words(self.log_path) if while_loading else None
        if sentence is not None:
            return sentence
        self._folder.keep_logs = True
        error = log.last_error(self.log_path)
        cause = f": {error}" if error else ""
        when = " while it was loading" if while_loading else ""
        how = _describe_status(self._process.returncode, log.has_lost_its_core(self.log_path))
        return f"the engine stopped{when} ({how}){cause}. Its log: {self.log_path}"

    async def stop(self) -> None:
        """Stop the engine and all its processes, kindly at first."""
        if not self.has_exited():
            with suppress(ProcessLookupError):
                self._process.terminate()
            await asyncio.wait((self._exit,), timeout=_STOP_SECONDS)
        self.kill()
        await self._exit

    def kill(self) -> None:
        """Kill the whole group at once. Processes of the group may be left when its leader has gone."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


def _describe_status(status: int | None, has_lost_its_core: bool) -> str:
    if status is None:
        return "no exit status"
    if has_lost_its_core and status >= 0:  # vLLM's API server then ends as if it had been asked to
        return "its process EngineCore ended unexpectedly"
    if status == 0:
        return "without an error"
    number = -status if status < 0 else status - 128
    if number > 0:
        with suppress(ValueError):
            return f"killed by {signal.Signals(number).name}"
    return f"exit status {status}"
