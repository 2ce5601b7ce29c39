"""What there is to share: as much as engines, threads or the like take at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Room(Protocol):
    """What the engines take at a time, queried anew at every decision; all 0 if none is up.

    What is away is in flight on engines that count for no capacity: they drain, stall or are down. It takes no room on
    the others.
    """

    @property
    def capacity(self) -> int:
        """Tokens."""

    @property
    def max_sequences(self) -> float:
        """Answers; infinite if it is not known."""

    @property
    def away_cost(self) -> int:
        """Tokens."""

    @property
    def away_sequences(self) -> int: ...


@dataclass(frozen=True, slots=True)
class FixedRoom:
    """A room that stays as it is, of which nothing is ever away."""

    capacity: int
    max_sequences: float
    away_cost: int = 0
    away_sequences: int = 0
