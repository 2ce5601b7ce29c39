"""Time to first token of one request: stock, ours at every budget, and the limit.

The limit of a budget is what no pruning can beat: the tower by itself, the projector over the rows that leave it, and
stock prefill of a text as long as the prompt with what a decoder layer keeps on average. Pruning is no part of it.

A slice of the depth overstates what happens once in any depth (checkpoint.py): each ratio is also given for the whole
depth, from the measured seconds of those parts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from benchmarks.accuracy_report import table as markdown
from benchmarks.bench.engine import Asked, Encoded, EngineProcess, FirstToken, running
from benchmarks.bench.figures import Mark, Spread, ratios
from benchmarks.bench.settings import BUDGETS, OURS, STOCK, Settings
from vd_plugin.schedule import FULL

ROUNDS: Final = 7
SPEEDUPS: Final = {640: 3.5, 320: 4.9, 160: 6.1}
"""Stock's time over ours, at least."""
OVER_LIMIT: Final = 1.08
OVER_STOCK: Final = 1.03
TEXT_TURNS: Final = 3
"""Turns of text-only prompts in a round: they are short, and their mark is narrow."""


def count(settings: Settings) -> int:
    """Steps of the progress bar."""
    return 1 + (settings.rounds or ROUNDS)


def measure(settings: Settings, advance: Callable[[], None]) -> dict[str, Any]:
    kv_gib = 1 + settings.geometry.decoder.num_layers // 8  # a whole context, and more
    with running(settings.starts(kv_gib=kv_gib)) as engines:
        return _measure(engines, settings, advance)


def _measure(engines: Mapping[str, EngineProcess], settings: Settings, advance: Callable[[], None]) -> dict[str, Any]:
    """Seconds by name, a list each; all names take one turn in a round. A first round warms up and is not counted."""
    samples: dict[str, list[float]] = defaultdict(list)
    for number in range(count(settings)):
        taken = _round(engines, settings)
        if number:
            for name, seconds in taken.items():
                samples[name].append(seconds)
        advance()
    return {
        "samples": dict(samples),
        "fraction": settings.fraction,
        "kept": {str(budget): settings.schedule(budget).kept for budget in (FULL, *BUDGETS)},
        "limit_tokens": {str(budget): settings.limit_tokens(budget) for budget in BUDGETS},
    }


def _round(engines: Mapping[str, EngineProcess], settings: Settings) -> dict[str, float]:
    stock, ours = engines[STOCK], engines[OURS]
    taken: dict[str, float] = {}

    def first_token(name: str, engine: EngineProcess, asked: Asked) -> None:
        answer: FirstToken = engine.ask("first_token", [asked])
        taken[name] = answer.seconds
        if asked.images:
            taken[f"prepare {name}"] = answer.prepare_seconds
            taken[f"pruning {name}"] = answer.pruning_seconds

    for budget in BUDGETS:
        schedule = settings.schedule(budget)
        first_token(str(budget), ours, settings.request(budget))
        first_token(f"limit decoder {budget}", stock, Asked(settings.limit_tokens(budget)))
        alone: Encoded = stock.ask("encode", schedule.num_tiles, schedule.rows[0], None)
        taken[f"limit encoder {budget}"] = alone.tower + alone.projector
        taken[f"limit {budget}"] = taken[f"limit decoder {budget}"] + taken[f"limit encoder {budget}"]
        taken[f"projector {budget}"] = alone.projector
        taken[f"encoder {budget}"] = ours.ask("encode", schedule.num_tiles, schedule.rows[0], schedule.encoder).whole
    full = settings.schedule(FULL)
    alone = stock.ask("encode", full.num_tiles, full.num_tiles * settings.geometry.tile_patches, None)
    taken["encoder stock"], taken["projector stock"] = alone.whole, alone.projector
    first_token("stock", stock, settings.request(None))
    first_token("full", ours, settings.request(FULL))
    for turn in range(TEXT_TURNS):
        for kind in (STOCK, OURS) if turn % 2 else (OURS, STOCK):
            name = f"text {kind}"
            seconds = engines[kind].ask("first_token", [Asked(settings.only_text_tokens)]).seconds
            taken[name] = taken.get(name, 0.0) + seconds / TEXT_TURNS
    return taken


def at_whole_depth(result: dict[str, Any], name: str) -> list[float]:
    """Seconds of the whole model as a slice predicts them: what happens once in any depth is not multiplied."""
    samples, fraction = result["samples"], result["fraction"]
    budget = name.removeprefix("limit ")
    once = samples[f"projector {'stock' if budget == 'full' else budget}"]
    if not name.startswith("limit "):
        once = [projector + pruning for projector, pruning in zip(once, samples[f"pruning {name}"], strict=True)]
    return [fraction * (every - part) + part for every, part in zip(samples[name], once, strict=True)]


def marks(result: dict[str, Any]) -> list[Mark]:
    samples = result["samples"]
    found = []
    for budget, bound in SPEEDUPS.items():
        speedup = ratios(samples["stock"], samples[str(budget)]).median
        found.append(Mark(f"TTFT stock / ours at {budget}", speedup, bound, at_least=True))
    for budget in SPEEDUPS:
        over = ratios(samples[str(budget)], samples[f"limit {budget}"]).median
        found.append(Mark(f"TTFT ours / limit at {budget}", over, OVER_LIMIT, at_least=False))
    full = ratios(samples["full"], samples["stock"]).median
    text = ratios(samples[f"text {OURS}"], samples[f"text {STOCK}"]).median
    found.append(Mark("TTFT in full, ours / stock", full, OVER_STOCK, at_least=False))
    found.append(Mark("TTFT of text alone, ours / stock", text, OVER_STOCK, at_least=False))
    return found


def table(result: dict[str, Any]) -> str:
    samples = result["samples"]

    def seconds(name: str) -> str:
        spread = Spread.of(samples[name])
        return f"{spread.median:.3f} ({spread.low:.3f} to {spread.high:.3f})"

    def ratio(above: Sequence[float], below: Sequence[float]) -> str:
        spread = ratios(above, below)
        return f"{spread.median:.2f} ({spread.low:.2f} to {spread.high:.2f})"

    def against_stock(name: str) -> tuple[str, str]:
        whole = ratios(at_whole_depth(result, "stock"), at_whole_depth(result, name)).median
        return ratio(samples["stock"], samples[name]), f"{whole:.2f}"

    columns = ("first token, s", "stock / it", "whole depth", "it / limit", "whole depth", "encoder, s", "pruning, s")
    rows = [
        ["stock", seconds("stock"), "1", "1", "", "", seconds("encoder stock"), ""],
        ["full", seconds("full"), *against_stock("full"), "", "", "", ""],
    ]
    for budget in map(str, SPEEDUPS):
        limit = f"limit {budget}"
        over = ratio(samples[budget], samples[limit])
        whole = ratios(at_whole_depth(result, budget), at_whole_depth(result, limit)).median
        apart = seconds(f"encoder {budget}"), seconds(f"pruning {budget}")
        rows.append([budget, seconds(budget), *against_stock(budget), over, f"{whole:.2f}", *apart])
        title = f"limit of {budget}: {result['limit_tokens'][budget]} tokens"
        alone = seconds(f"limit encoder {budget}")
        rows.append([title, seconds(limit), *against_stock(limit), "1", "1", alone, ""])
    texts = samples[f"text {STOCK}"], samples[f"text {OURS}"]
    rows.append(["text alone, stock", seconds(f"text {STOCK}"), "1", *[""] * 5])
    rows.append(["text alone, ours", seconds(f"text {OURS}"), ratio(*texts), *[""] * 5])
    prepared = Spread.of(samples["prepare stock"]).median, Spread.of(samples["prepare 320"]).median
    note = "Preparing the image in the front end, stock and 320: {:.3f} and {:.3f} s.".format(*prepared)
    return f"{markdown(('', *columns), rows)}\n\n{note}"
