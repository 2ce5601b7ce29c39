"""Outcomes for people: a line for each as it comes, and a table in the end."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.step import Outcome, Verdict, tail


def line_of(outcome: Outcome) -> str:
    """What became of a step, and why."""
    took = f" in {outcome.seconds:.1f} s" if outcome.log is not None else ""
    why = f": {outcome.reason}" if outcome.reason else ""
    found = f" ({describe(outcome.figures)})" if outcome.figures else ""
    return f"    {outcome.verdict}{took}{why}{found}"


def tail_of(outcome: Outcome) -> str:
    """The end of a step's output, and where the rest is."""
    if outcome.log is None:
        return ""
    return textwrap.indent(f"{tail(outcome.log.read_text(errors='replace'))}\n(all of it: {outcome.log})", "    | ")


def summary(outcomes: Sequence[Outcome], folder: Path, seconds: float) -> str:
    """The table, and the counts below it."""
    width = max((len(outcome.step) for outcome in outcomes), default=4)
    lines = ["", f"{'step':<{width}}  {'outcome':<11}  {'seconds':>7}  figures, or why", "-" * (width + 45)]
    for outcome in outcomes:
        about = "; ".join(filter(None, (outcome.reason, describe(outcome.figures))))
        lines.append(f"{outcome.step:<{width}}  {outcome.verdict:<11}  {outcome.seconds:>7.1f}  {about}".rstrip())
    counts = {verdict: sum(outcome.verdict == verdict for outcome in outcomes) for verdict in Verdict}
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count) or "nothing was run"
    return "\n".join([*lines, "", f"{told}, in {seconds:.0f} s. Logs: {folder}"])


def describe(figures: Mapping[str, Any]) -> str:
    """Figures on one line, without those that are lists of their own."""
    return ", ".join(
        f"{name.replace('_', ' ')} {_value(value)}" for name, value in figures.items() if value is not None
    )


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return " ".join(f"{name} {_value(each)}" for name, each in value.items())
    if isinstance(value, list):
        return "; ".join(map(_value, value)) or "none"
    return str(value)
