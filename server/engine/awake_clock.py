"""A clock for judging others by the time that they take: it stands still while the gateway itself is late."""

from __future__ import annotations

import asyncio
import time
from typing import Final

_BEAT_SECONDS: Final = 0.05
"""A step of the event loop that takes more than two of these counts as two."""


class AwakeClock:
    """Seconds in which the event loop was on time; `run` must be running.

    Whatever an engine sends is only seen some steps of the loop later. When thousands of clients come or leave at once
    a step takes seconds, and a healthy engine would seem not to answer.
    """

    def __init__(self) -> None:
        self._counted_seconds = 0.0
        self._beat_at = time.monotonic()

    def now(self) -> float:
        return self._counted_seconds + min(time.monotonic() - self._beat_at, 2 * _BEAT_SECONDS)

    async def run(self) -> None:
        """Never returns."""
        while True:
            self._counted_seconds, self._beat_at = self.now(), time.monotonic()
            await asyncio.sleep(_BEAT_SECONDS)
