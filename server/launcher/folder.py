"""The private folder of an engine: its socket, and the logs of its runs."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Final

_LONGEST_SOCKET_PATH: Final = 100  # sun_path of unix(7) holds 108 bytes
_NUM_OLD_LOGS: Final = 5


class EngineFolder:
    """Only this user can enter it: whoever reaches the socket could set request-level mm kwargs.

    The log of the first run is `engine.log`, or `log_path` if that is given; those of later runs have a number in
    their name, and the last five are kept beside the newest.
    """

    def __init__(self, log_path: Path | None = None) -> None:
        self.path = _make()
        self.keep_logs = False
        self._first_log = log_path or self.path / "engine.log"
        self._num_runs = 0

    @property
    def socket_path(self) -> Path:
        return self.path / "engine.sock"

    @property
    def url(self) -> str:
        return f"unix:{self.socket_path}"

    def prepare_run(self) -> Path:
        """Make room for one more run of the engine; returns the path of its log."""
        self.socket_path.unlink(missing_ok=True)  # vLLM does not bind where a file is left
        run = self._num_runs
        self._num_runs += 1
        if run > _NUM_OLD_LOGS:
            self._log_of(run - _NUM_OLD_LOGS - 1).unlink(missing_ok=True)
        return self._log_of(run)

    def remove(self) -> None:
        """Remove the folder, but for logs that are to be kept."""
        if self.keep_logs and self._first_log.is_relative_to(self.path):
            self.socket_path.unlink(missing_ok=True)
        else:
            shutil.rmtree(self.path, ignore_errors=True)

    def _log_of(self, run: int) -> Path:
        first = self._first_log
        return first.with_name(f"{first.stem}.{run}{first.suffix}") if run else first


def _make() -> Path:
    path = Path(tempfile.mkdtemp(prefix="visiondrop-"))
    if len(str(path)) + len("/engine.sock") > _LONGEST_SOCKET_PATH:
        path.rmdir()
        path = Path(tempfile.mkdtemp(prefix="visiondrop-", dir="/tmp"))
    return path
