"""Floating-point operations of LLaVA-NeXT-7B, in full and at a budget: the decoder by `schedule.prefill_flops`, and the
vision tower, which pruning does not change, apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from benchmarks.bench.engine import IMAGE_SIZE
from benchmarks.bench.figures import Mark
from benchmarks.bench.settings import Settings
from benchmarks.seven_b import SEVEN_B
from vd_plugin.schedule import FULL, parse_budget, prefill_flops, resolve

TEXT_TOKENS: Final = 60
_TOWER: Final = {"num_layers": 23, "hidden": 1024, "inner": 4096, "patch": 14}
"""CLIP-L/14-336 as LLaVA runs it: the output of the layer before the last."""


def tower_flops(num_tiles: int, tokens: int, *, num_layers: int, hidden: int, inner: int, patch: int) -> int:
    """Of the tower over tiles of `tokens` (CLS and the patches), 2 for each multiply-add."""
    patches = num_tiles * (tokens - 1) * 3 * patch * patch * hidden
    linear = num_tiles * tokens * (4 * hidden * hidden + 2 * hidden * inner)
    attention = num_tiles * 2 * tokens * tokens * hidden
    return 2 * (patches + num_layers * (linear + attention))


def count(settings: Settings) -> int:
    return 1


def measure(settings: Settings, advance: Callable[[], None]) -> dict[str, Any]:
    result = counts()
    advance()
    return result


def counts() -> dict[str, Any]:
    """Of a prompt with one image at every budget; always those of the whole 7B."""
    budgets = {
        str(budget): prefill_flops(SEVEN_B, TEXT_TOKENS, [resolve(SEVEN_B, *IMAGE_SIZE, parse_budget(budget))])
        for budget in (FULL, 640, 320, 160)
    }
    num_tiles = SEVEN_B.num_tiles(*IMAGE_SIZE)
    return {"decoder": budgets, "tower": tower_flops(num_tiles, SEVEN_B.tile_tokens, **_TOWER)}


def marks(result: dict[str, Any]) -> list[Mark]:
    decoder = result["decoder"]
    return [Mark("FLOPs of the 7B decoder, full / 320", decoder["full"] / decoder["320"], 6.0, at_least=True)]


def table(result: dict[str, Any]) -> str:
    tower = result["tower"] / 1e12
    lines = ["| budget | decoder | with the tower |", "|---|---|---|"]
    for budget, flops in result["decoder"].items():
        lines.append(f"| {budget} | {flops / 1e12:.1f} TFLOP | {flops / 1e12 + tower:.1f} TFLOP |")
    return "\n".join(lines)
