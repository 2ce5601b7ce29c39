"""A step and its outcome; and how a step, which is a program, tells its outcome.

A step passes if its program ends with status 0, and is skipped if that is `SKIPPED_STATUS`. On the way it prints lines
that the runner reads in its output: `figures {JSON}` for what it has found so far, and `reason: ...` before it ends
otherwise than well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

SKIPPED_STATUS: Final = 77
"""As automake has it."""

_FIGURES: Final = "figures "
_REASON: Final = "reason: "


class Verdict(StrEnum):
    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"
    TIMED_OUT = "timed out"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True)
class Step:
    name: str
    about: str
    command: tuple[str, ...]
    """Program and arguments."""
    limit_seconds: float
    num_gpus: int = 0
    """It is skipped on machines with fewer."""
    tool: str | None = None
    """A program that it needs on the PATH; it is skipped where that is not found."""


@dataclass(frozen=True, slots=True)
class Outcome:
    step: str
    verdict: Verdict
    seconds: float
    reason: str = ""
    """Of anything but a pass: a sentence."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    log: Path | None = None
    """Its output; None if it was not started."""

    @property
    def is_bad(self) -> bool:
        return self.verdict in (Verdict.FAILED, Verdict.TIMED_OUT)


class StepError(Exception):
    """A step has failed. The message is a sentence."""


class Skip(Exception):  # noqa: N818  # no error
    """A step cannot be done here. The message is a sentence."""


def tell(**figures: Any) -> None:
    """Add to a step's figures, from inside it; of equal names the last counts."""
    print(f"{_FIGURES}{json.dumps(figures)}", flush=True)


def tell_reason(sentence: object) -> None:
    """Why a step ends as it does, from inside it."""
    print(f"{_REASON}{' '.join(str(sentence).split())}", flush=True)


def read_figures(output: str) -> dict[str, Any]:
    """All figures that a step has told."""
    figures: dict[str, Any] = {}
    for line in output.splitlines():
        if line.startswith(_FIGURES):
            figures |= json.loads(line.removeprefix(_FIGURES))
    return figures


def read_reason(output: str) -> str:
    """The reason that a step has told, otherwise its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip() and not line.startswith(_FIGURES)]
    told = [line.removeprefix(_REASON) for line in lines if line.startswith(_REASON)]
    return (told or lines or ["no output"])[-1]


def tail(output: str, num_lines: int = 25) -> str:
    """The last lines of a step's output, without those meant for the runner."""
    lines = [line for line in output.splitlines() if line.strip() and not line.startswith((_FIGURES, _REASON))]
    return "\n".join(lines[-num_lines:])
