"""Medians with their spread, ratios within one run, and the marks that they are held to."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles of some samples."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Raises:
        ValueError: no samples.
        """
        if not samples:
            raise ValueError("a median needs samples")
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], 1)
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high, len(samples))

    def to_dict(self) -> dict[str, float]:
        return {name: round(getattr(self, name), 6) for name in ("median", "low", "high", "count")}


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """The spread of ratios between samples of the same round, which saw the same machine.

    Raises:
        ValueError: another number of rounds, or none.
    """
    return Spread.of([above / below for above, below in zip(numerators, denominators, strict=True)])


def percentile(samples: Sequence[float], share: float) -> float:
    """The smallest sample that at least `share` of all do not exceed."""
    ordered = sorted(samples)
    return ordered[max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1)]


@dataclass(frozen=True, slots=True)
class Mark:
    """A figure that must reach a bound, or stay below it."""

    name: str
    value: float
    bound: float
    at_least: bool

    @property
    def is_met(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def __str__(self) -> str:
        relation = "at least" if self.at_least else "at most"
        verdict = "met" if self.is_met else "MISSED"
        return f"{verdict:<6}  {self.name}: {self.value:.3g} ({relation} {self.bound:g})"

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "value": self.value,
            "bound": self.bound,
            "at_least": self.at_least,
            "met": self.is_met,
        }
