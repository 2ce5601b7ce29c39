"""Requests per second and time to first token at a fixed concurrency, with the same few bytes of KV cache for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Final

from benchmarks.bench.engine import EngineProcess, Served, Start, running
from benchmarks.bench.figures import Mark, Spread, percentile, ratios
from benchmarks.bench.settings import OURS, STOCK, Settings
from vd_plugin.schedule import FULL, Budget

ROUNDS: Final = 2
SPEEDUP: Final = 4.0
CONCURRENCY: Final = 8
NUM_TOKENS: Final = 8
"""Of an answer."""
STOCK_IMAGES: Final = 2
"""Requests with an image in full that the KV cache holds."""
VARIANTS: Final[tuple[tuple[str, str, Budget | None], ...]] = (
    ("stock", STOCK, None),
    ("full", OURS, FULL),
    ("320", OURS, 320),
)


def num_requests(settings: Settings) -> int:
    return 32 if settings.on_gpu else CONCURRENCY


def count(settings: Settings) -> int:
    return len(VARIANTS) * (settings.rounds or ROUNDS)


def starts(settings: Settings) -> dict[str, Start]:
    block_size = settings.block_size
    blocks = -(-(settings.schedule(FULL).num_placeholders + settings.text_tokens + NUM_TOKENS) // block_size)
    return settings.starts(
        max_num_seqs=CONCURRENCY, stock_blocks=1 + STOCK_IMAGES * blocks, max_model_len=blocks * block_size
    )


def measure(settings: Settings, advance: Callable[[], None]) -> dict[str, Any]:
    with running(starts(settings)) as engines:
        return _measure(engines, settings, advance)


def _measure(engines: Mapping[str, EngineProcess], settings: Settings, advance: Callable[[], None]) -> dict[str, Any]:
    served: dict[str, list[dict[str, Any]]] = {name: [] for name, _, _ in VARIANTS}
    for engine in engines.values():  # warm
        engine.ask("serve", [settings.request(None if engine is engines[STOCK] else 320)], 1, 2)
    for _ in range(settings.rounds or ROUNDS):
        for name, kind, budget in VARIANTS:
            asked = [settings.request(budget)] * num_requests(settings)
            answer: Served = engines[kind].ask("serve", asked, CONCURRENCY, NUM_TOKENS)
            served[name].append(asdict(answer))
            advance()
    return {
        "served": served,
        "requests": num_requests(settings),
        "blocks": {kind: engine.num_blocks - 1 for kind, engine in engines.items()},
        "block_bytes": {kind: settings.bytes_per_block(kind) for kind in engines},
    }


def _seconds(result: dict[str, Any], name: str) -> list[float]:
    return [served["seconds"] for served in result["served"][name]]


def marks(result: dict[str, Any]) -> list[Mark]:
    speedup = ratios(_seconds(result, "stock"), _seconds(result, "320")).median
    return [Mark("requests per second in the same KV cache, 320 / stock", speedup, SPEEDUP, at_least=True)]


def table(result: dict[str, Any]) -> str:
    lines = [
        "| in one KV cache | requests/s | it / stock | first token, p50, p99 | peak blocks | of all | preemptions |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, kind, _ in VARIANTS:
        runs = result["served"][name]
        seconds = Spread.of(_seconds(result, name)).median
        faster = ratios(_seconds(result, "stock"), _seconds(result, name)).median
        first = [second for run in runs for second in run["first_token_seconds"]]
        peak, blocks = max(run["peak_blocks"] for run in runs), result["blocks"][kind]
        mebibytes = peak * result["block_bytes"][kind] / 2**20
        lines.append(
            f"| {name} | {result['requests'] / seconds:.3f} | {faster:.2f} "
            f"| {percentile(first, 0.5):.2f} s, {percentile(first, 0.99):.2f} s "
            f"| {peak} ({mebibytes:.0f} MiB) | {peak / blocks:.0%} of {blocks} "
            f"| {sum(run['preemptions'] for run in runs)} |"
        )
    return "\n".join(lines)
