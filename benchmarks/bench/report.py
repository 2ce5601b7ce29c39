"""What a run reports: tables, marks, an entry for the log, a plot, one line of JSON. Needs no engine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.bench import curve, decode, flops, prefill, serve, throughput
from benchmarks.bench.figures import Mark, Spread, ratios
from benchmarks.bench.settings import OURS, STOCK

PARTS: Final[Mapping[str, Any]] = {
    "flops": flops,
    "prefill": prefill,
    "throughput": throughput,
    "decode": decode,
    "curve": curve,
    "serve": serve,
}
"""Every part in the order of a run. A part has `marks` and `table` of its result."""

_TITLES: Final = {
    "flops": "FLOPs of the 7B",
    "prefill": "Time to first token",
    "throughput": "Throughput",
    "decode": "Decode step",
    "curve": "Cost of prefill",
    "serve": "Through the gateway",
}


@dataclass(frozen=True, slots=True)
class Report:
    """Results of the parts that were measured."""

    date: str
    command: str
    commit: str
    machine: str
    checkpoint: str
    results: Mapping[str, dict[str, Any]]
    """By part."""

    @property
    def marks(self) -> list[Mark]:
        return [
            mark for part, module in PARTS.items() if part in self.results for mark in module.marks(self.results[part])
        ]

    @property
    def missing(self) -> list[str]:
        return [part for part in PARTS if part not in self.results]

    def tables(self) -> str:
        parts = [(part, PARTS[part].table(self.results[part])) for part in PARTS if part in self.results]
        return "\n\n".join(f"{_TITLES[part]}:\n\n{table}" for part, table in parts)

    def text(self) -> str:
        """As the terminal shows it."""
        lines = [
            f"{self.checkpoint}; {self.machine}; commit {self.commit}",
            "",
            self.tables(),
            "",
            *map(str, self.marks),
        ]
        if self.missing:
            lines.append(f"not measured: {', '.join(self.missing)} (--only {','.join(self.missing)})")
        return "\n".join(lines)

    def entry(self, plot: str | None = None) -> str:
        """A section of benchmarks/LOG.md.

        Args:
            plot: the plot's path, as seen from the log.
        """
        verdicts = "\n".join(f"* {str(mark).strip()}" for mark in self.marks)
        lines = [
            f"## {self.date}: stock vLLM, VisionDrop and the limit side by side",
            "",
            f"`{self.command}`, commit {self.commit}; {self.machine}.",
            f"{self.checkpoint}. Medians, quartiles in brackets; ratios are medians of ratios within a round.",
            "",
            self.tables(),
            "",
            verdicts,
        ]
        if self.missing:
            lines += ["", f"Not measured: {', '.join(self.missing)}."]
        if plot is not None:
            lines += ["", f"![Time to first token]({plot})"]
        return "\n".join(lines) + "\n"

    def json_line(self) -> str:
        return json.dumps(
            {
                "benchmark": "bench",
                "date": self.date,
                "commit": self.commit,
                "machine": self.machine,
                "checkpoint": self.checkpoint,
                "marks": [mark.to_dict() for mark in self.marks],
                "results": self.results,
            }
        )


def add_entry(log: str, entry: str) -> str:
    """The log with an entry before its newest.

    Raises:
        ValueError: the log has no entry yet.
    """
    head, found, rest = log.partition("\n## ")
    if not found:
        raise ValueError("the log has no section to put the entry before")
    return f"{head}\n{entry}{found}{rest}"


# The plot

_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "0.6"


def draw_plot(report: Report, path: Path) -> None:
    """First tokens beside their limits, and the cost of prefill by visual tokens; as far as they were measured."""
    from matplotlib.figure import Figure

    parts = [part for part in ("prefill", "curve") if part in report.results]
    if not parts:
        return
    figure: Any = Figure(figsize=(4.8 * len(parts), 4), layout="constrained")
    for axes, part in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        (_draw_prefill if part == "prefill" else _draw_curve)(axes, report.results[part])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _draw_prefill(axes: Any, result: dict[str, Any]) -> None:
    samples = {name: Spread.of(seconds) for name, seconds in result["samples"].items()}
    names = ["stock", "full", *map(str, prefill.SPEEDUPS)]
    spreads = [samples[name] for name in names]
    errors = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
    axes.bar(names, [s.median for s in spreads], color=[_GREY, *[_BLUE] * 4], yerr=errors, capsize=3, width=0.6)
    for place, name in enumerate(names):
        limit = samples.get(f"limit {name}")
        if limit is not None:
            axes.plot([place - 0.4, place + 0.4], [limit.median] * 2, color=_ORANGE, linewidth=2.5)
        axes.annotate(
            f"{ratios(result['samples']['stock'], result['samples'][name]).median:.1f}×",
            (place, samples[name].high), xytext=(0, 5),
            textcoords="offset points", ha="center", fontsize=9,
        )  # fmt: skip
    axes.plot([], [], color=_ORANGE, linewidth=2.5, label="limit: encoder, and stock on as many tokens")
    axes.set_ylim(top=1.18 * max(spread.high for spread in spreads))
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    axes.set_ylabel("time to first token, s")
    axes.set_xlabel("stock vLLM, and VisionDrop by budget")


def _draw_curve(axes: Any, result: dict[str, Any]) -> None:
    points = [
        (point["kept"] * point["images"] * point["requests"], Spread.of(point["seconds"]).median, point)
        for point in result["points"]
    ]
    lines = {
        "one image, by budget": (OURS, _BLUE, "o", lambda p: p["images"] == p["requests"] == 1),
        "several images at 320": (OURS, _ORANGE, "s", lambda p: p["requests"] == 1 and p["budget"] == 320),
        "several requests at 320": (OURS, "#009E73", "^", lambda p: p["images"] == 1 and p["budget"] == 320),
        "stock, one or two images": (STOCK, _GREY, "x", lambda p: p["requests"] == 1),
    }
    for label, (engine, color, marker, belongs) in lines.items():
        line = sorted((x, y) for x, y, point in points if point["engine"] == engine and belongs(point))
        axes.plot(*zip(*line, strict=True), color=color, marker=marker, markersize=4, linewidth=1.3, label=label)
    axes.legend(frameon=False, fontsize=8)
    axes.set_xlabel("visual tokens, layer average")
    axes.set_ylabel("all first tokens after, s")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)


def plan_parts(only: str | None, saved: Sequence[str]) -> list[str]:
    """The parts that a run measures: those that it names, or all that are not saved.

    Raises:
        ValueError: an unknown part.
    """
    named = [part.strip() for part in only.split(",")] if only else [part for part in PARTS if part not in saved]
    unknown = [part for part in named if part not in PARTS]
    if unknown:
        raise ValueError(f"there is no part {unknown[0]!r}; the parts are {', '.join(PARTS)}")
    return [part for part in PARTS if part in named]
