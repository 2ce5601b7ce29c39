"""What prefill costs by the tokens of an image, the number of images, and the number of requests in a step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.bench.engine import EngineProcess, running
from benchmarks.bench.figures import Mark, Spread
from benchmarks.bench.settings import OURS, STOCK, Settings
from vd_plugin.schedule import FULL, Budget

ROUNDS: Final = 2
BUDGETS: Final[tuple[Budget, ...]] = (80, 160, 320, 640, 1280, FULL)


@dataclass(frozen=True, slots=True)
class Point:
    kind: str
    budget: Budget | None
    images: int = 1
    """Of a request."""
    requests: int = 1


POINTS: Final = (
    *(Point(OURS, budget) for budget in BUDGETS),
    *(Point(OURS, 320, images=images) for images in (2, 4)),
    *(Point(OURS, 320, requests=requests) for requests in (2, 4, 8)),
    Point(STOCK, None),
    Point(STOCK, None, images=2),
    Point(STOCK, None, requests=2),
)


def count(settings: Settings) -> int:
    return len(POINTS) * (settings.rounds or ROUNDS)


def measure(settings: Settings, advance: Callable[[], None]) -> dict[str, Any]:
    with running(settings.starts()) as engines:
        return _measure(engines, settings, advance)


def _measure(engines: Mapping[str, EngineProcess], settings: Settings, advance: Callable[[], None]) -> dict[str, Any]:
    samples: dict[Point, list[float]] = defaultdict(list)
    for kind, engine in engines.items():  # warm
        engine.ask("first_token", [settings.request(None if kind == STOCK else 320)])
    for _ in range(settings.rounds or ROUNDS):
        for point in POINTS:
            asked = [settings.request(point.budget, point.images)] * point.requests
            samples[point].append(engines[point.kind].ask("first_token", asked).seconds)
            advance()
    return {
        "points": [
            {
                "engine": point.kind,
                "budget": point.budget,
                "images": point.images,
                "requests": point.requests,
                "kept": settings.schedule(FULL if point.budget is None else point.budget).kept,
                "seconds": seconds,
            }
            for point, seconds in samples.items()
        ]
    }


def marks(result: dict[str, Any]) -> list[Mark]:
    """None of the issue's own."""
    return []


def table(result: dict[str, Any]) -> str:
    lines = [
        "| engine | budget | requests | images of each | visual tokens | all first tokens after | for an image |",
        "|---|---|---|---|---|---|---|",
    ]
    for point in result["points"]:
        seconds, images = Spread.of(point["seconds"]).median, point["requests"] * point["images"]
        lines.append(
            f"| {point['engine']} | {point['budget'] or ''} | {point['requests']} | {point['images']} "
            f"| {images * point['kept']:,} | {seconds:.3f} s | {seconds / images:.3f} s |"
        )
    return "\n".join(lines)
