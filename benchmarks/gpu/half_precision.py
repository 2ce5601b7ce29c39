"""A step: whether bfloat16 keeps the patches that float32 keeps."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

from benchmarks.gpu.context import Context
from benchmarks.gpu.programs import run_program
from benchmarks.gpu.step import StepError, tell

_LEAST_EQUAL: Final = 0.7
"""Share of equal patches. Of patches at random, a fifth or less would be equal."""


def half_precision(context: Context) -> None:
    explanations = []
    for dtype in ("float32", "bfloat16"):
        out = context.path(f"{dtype}.json")
        run_program([sys.executable, "-m", "benchmarks.gpu.kept", context.model, str(out), "--dtype", dtype])
        explanations.append(json.loads(out.read_text()))
    shares = share_equal(*explanations)
    tell(equal_patches=shares)
    if min(shares.values()) < _LEAST_EQUAL:
        raise StepError(f"in one stage less than {_LEAST_EQUAL:.0%} of the patches kept are the same")


def share_equal(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of the patches that each stage keeps as they are, the share that both keep; the mean over all explanations.

    Args:
        ours, theirs: of the same images at the same budgets, as `visiondrop explain` writes them.

    Raises:
        StepError: a stage has another number of rows.
    """
    shares: dict[str, list[float]] = {}
    for one, other in zip(ours, theirs, strict=True):
        for number, (first, second) in enumerate(zip(one["stages"], other["stages"], strict=True)):
            if first["rows"] != second["rows"]:
                raise StepError(f"stage {number} has {first['rows']} rows in one and {second['rows']} in the other")
            kept = _patches(first)
            shares.setdefault(f"stage {number}", []).append(len(kept & _patches(second)) / len(kept))
    return {name: round(sum(values) / len(values), 4) for name, values in shares.items()}


def _patches(stage: Mapping[str, Any]) -> set[tuple[str, int, int]]:
    return {(cell["view"], cell["row"], cell["column"]) for cell in stage["dominant"]}
