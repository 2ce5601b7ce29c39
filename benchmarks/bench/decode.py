"""Time of a decode step, and the part of it that the host's Python takes: stock against ours at the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.bench.engine import Asked, Decoded, EngineProcess, running
from benchmarks.bench.figures import Mark, Spread, ratios
from benchmarks.bench.settings import OURS, STOCK, Settings
from vd_plugin.schedule import FULL, Budget

ROUNDS: Final = 12
STEPS: Final = 6
"""A turn."""
TEXT_TOKENS: Final = 32
"""Of the prompts without images: many requests fit."""


@dataclass(frozen=True, slots=True)
class Case:
    """Requests that decode together, with one image each or with text alone."""

    requests: int
    images: int

    @property
    def name(self) -> str:
        return f"{self.requests} {'with an image' if self.images else 'of text'}"

    @property
    def variants(self) -> tuple[tuple[str, str, Budget | None], ...]:
        ours: tuple[tuple[str, str, Budget | None], ...] = (("full", OURS, FULL), ("320", OURS, 320))
        return (("stock", STOCK, None), *(ours if self.images else (("text", OURS, None),)))

    def asked(self, settings: Settings, budget: Budget | None) -> list[Asked]:
        one = settings.request(budget) if self.images else Asked(TEXT_TOKENS)
        return [one] * self.requests


def cases(settings: Settings) -> tuple[Case, ...]:
    if settings.on_gpu:
        return Case(1, 1), Case(8, 1), Case(64, 0), Case(256, 0)
    return Case(4, 1), Case(32, 0)


def count(settings: Settings) -> int:
    return sum(2 * len(case.variants[1:]) for case in cases(settings)) * (settings.rounds or ROUNDS)


def measure(settings: Settings, advance: Callable[[], None]) -> dict[str, Any]:
    with running(settings.starts(max_num_seqs=max(case.requests for case in cases(settings)))) as engines:
        return _measure(engines, settings, advance)


def _measure(engines: Mapping[str, EngineProcess], settings: Settings, advance: Callable[[], None]) -> dict[str, Any]:
    """Two settings of one engine cannot decode beside each other: stock takes its turns beside each of them."""
    return {case.name: _measure_case(engines, settings, case, advance) for case in cases(settings)}


def _measure_case(
    engines: Mapping[str, EngineProcess], settings: Settings, case: Case, advance: Callable[[], None]
) -> dict[str, Any]:
    stock, *ours = case.variants
    result: dict[str, Any] = {}
    for name, kind, budget in ours:
        samples: dict[str, Any] = {side: {"seconds": [], "schedule": [], "prepare": []} for side in ("stock", "ours")}
        sides = {"stock": (engines[stock[1]], stock[2]), "ours": (engines[kind], budget)}
        for engine, side_budget in sides.values():
            engine.ask("prefill", case.asked(settings, side_budget))
            engine.ask("decode", 2)  # warm
        for _ in range(settings.rounds or ROUNDS):
            for side, (engine, _) in sides.items():
                decoded: Decoded = engine.ask("decode", STEPS)
                samples[side]["seconds"].append(Spread.of(decoded.seconds).median)
                for part in ("schedule", "prepare"):
                    samples[side][part] += [getattr(step, part) for step in decoded.host]
                advance()
        for engine, _ in sides.values():
            engine.ask("abort")
        result[name] = samples
    return result


def marks(result: dict[str, Any]) -> list[Mark]:
    """None of the issue's own."""
    return []


def table(result: dict[str, Any]) -> str:
    lines = [
        "| requests that decode | budget | step, stock | ours | ours / stock | scheduler, both | model state, both |",
        "|---|---|---|---|---|---|---|",
    ]
    for case, variants in result.items():
        for name, samples in variants.items():
            stock, ours = samples["stock"], samples["ours"]
            step = ratios(ours["seconds"], stock["seconds"])
            host = [
                f"{Spread.of(stock[part]).median * 1e6:.0f} and {Spread.of(ours[part]).median * 1e6:.0f} µs"
                for part in ("schedule", "prepare")
            ]
            lines.append(
                f"| {case} | {name} | {Spread.of(stock['seconds']).median * 1e3:.1f} ms "
                f"| {Spread.of(ours['seconds']).median * 1e3:.1f} ms "
                f"| {step.median:.2f} ({step.low:.2f} to {step.high:.2f}) | {host[0]} | {host[1]} |"
            )
    return "\n".join(lines)
