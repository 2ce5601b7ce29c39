"""How fast engines work."""

from __future__ import annotations

import math
from typing import Final

_MEMORY_SECONDS: Final = 30.0
"""How fast it forgets: what is older by this much counts a third."""


class WorkRate:
    """How fast the engines work off cost. Seen only while a queue stands: else it would be how fast requests come."""

    def __init__(self) -> None:
        self._last = 0.0
        self._tokens = 0.0  # both sums decay alike, so that their ratio is a weighted mean from the first moment
        self._seconds = 0.0

    def observe(self, now: float, tokens: int, *, is_busy: bool) -> None:
        """`tokens` were done at `now`; `is_busy` is about the time since the last call."""
        if is_busy:
            decay = math.exp((self._last - now) / _MEMORY_SECONDS)
            self._tokens = self._tokens * decay + tokens
            self._seconds = self._seconds * decay + _MEMORY_SECONDS * (1 - decay)
        self._last = now

    @property
    def tokens_per_second(self) -> float:
        """0 if nothing was done yet."""
        return self._tokens / max(self._seconds, 1.0)  # within the first second, chance rules
