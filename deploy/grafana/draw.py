"""Draw the dashboards' panels as images, from a Prometheus: for the documentation, where no Grafana runs.

    python -m deploy.grafana.draw --prometheus http://127.0.0.1:9090 --minutes 60 FOLDER

Panels, places, titles, queries, legends, units and limits are those of the JSON files; colours and fonts are not
Grafana's. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, date2num
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

FOLDER: Final = Path(__file__).parent / "dashboards"
_CELL: Final = (0.72, 0.42)
"""Width and height of a cell of the dashboard's grid, in inches."""
_GAP: Final = 0.14
_PREFIXES: Final = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""))
_PER_SECOND: Final = {"cps": "/s", "reqps": " req/s", "ops": " ops/s", "flops": "FLOP/s"}


def draw_dashboards(
    folder: Path, prometheus_url: str, start: float, end: float, *, jobs: str, window: str
) -> list[Path]:
    """Draw every dashboard as one PNG.

    Args:
        folder: where the images go; made if it is missing.
        start, end: seconds since the epoch.
        jobs: a regular expression, the value of the variable `job`; instances and budget classes are All.
        window: the value of `$__rate_interval`.

    Returns:
        the paths of the images.
    """
    folder.mkdir(parents=True, exist_ok=True)
    variables = {
        "$__rate_interval": window,
        "$__range": f"{max(1, round(end - start))}s",
        "$job": jobs,
        "$instance": ".+",
        "$budget_class": ".+",
    }
    paths = []
    for source in sorted(FOLDER.glob("*.json")):
        figure = _draw(json.loads(source.read_text()), _Source(prometheus_url, start, end, variables))
        paths.append(folder / f"{source.stem}.png")
        figure.savefig(paths[-1], dpi=90)
    return paths


class _Source:
    """Answers of a Prometheus over a range of time."""

    def __init__(self, url: str, start: float, end: float, variables: Mapping[str, str]) -> None:
        self._url, self.start, self.end, self._variables = url, start, end, variables

    def series(self, expr: str) -> list[tuple[dict[str, str], list[tuple[float, float]]]]:
        """Labels and points of each series."""
        for variable, value in self._variables.items():
            expr = expr.replace(variable, value)
        step = max(1.0, (self.end - self.start) / 300)
        query = urllib.parse.urlencode({"query": expr, "start": self.start, "end": self.end, "step": step})
        with urllib.request.urlopen(f"{self._url}/api/v1/query_range", query.encode()) as response:
            result = json.load(response)["data"]["result"]
        return [
            (item["metric"], [(float(moment), float(value)) for moment, value in item["values"]]) for item in result
        ]


def _draw(board: Mapping[str, Any], source: _Source) -> Figure:
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in board["panels"])
    figure = Figure(figsize=(24 * _CELL[0], (rows + 1.5) * _CELL[1]), facecolor="#f4f5f5")
    size = figure.get_size_inches()
    figure.text(0.012, 1 - 0.75 * _CELL[1] / size[1], board["title"], fontsize=15, weight="bold", va="center")
    for panel in board["panels"]:
        place = panel["gridPos"]
        left, top = place["x"] * _CELL[0] + _GAP, (place["y"] + 1.5) * _CELL[1] + _GAP
        width, height = place["w"] * _CELL[0] - 2 * _GAP, place["h"] * _CELL[1] - 2 * _GAP
        if panel["type"] == "row":
            figure.text(left / size[0], 1 - (top + height / 2) / size[1], panel["title"], fontsize=11, va="center")
            continue
        box = (left / size[0], 1 - (top + height) / size[1], width / size[0], height / size[1])
        card = figure.add_axes(box, facecolor="white")
        card.set(xticks=[], yticks=[])
        for spine in card.spines.values():
            spine.set_color("#d8d9da")
        card.text(
            0.02, 1 - 0.14 / height, panel["title"], transform=card.transAxes, fontsize=8.5, weight="bold", va="center"
        )
        inner = (left + 0.55, top + 0.3, width - 0.65, height - 0.3 - 0.62)
        if panel["type"] == "stat":
            _draw_number(card, panel, source)
        else:
            axes = figure.add_axes(
                (inner[0] / size[0], 1 - (inner[1] + inner[3]) / size[1], inner[2] / size[0], inner[3] / size[1])
            )
            _draw_lines(axes, panel, source)
    return figure


def _draw_number(card: Axes, panel: Mapping[str, Any], source: _Source) -> None:
    (target,) = panel["targets"]
    points = [points for _, points in source.series(target["expr"])]
    value = points[0][-1][1] if points else 0.0
    defaults = panel["fieldConfig"]["defaults"]
    color = {"green": "#299c46", "yellow": "#c48a00", "red": "#d44a3a"}[_step(defaults["thresholds"]["steps"], value)]
    text = _format(value, defaults["unit"])
    card.text(0.5, 0.42, text, transform=card.transAxes, ha="center", va="center", fontsize=20, color=color)


def _draw_lines(axes: Axes, panel: Mapping[str, Any], source: _Source) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    lines: list[tuple[str, list[tuple[float, float]]]] = []
    for target in panel["targets"]:
        for labels, points in source.series(target["expr"]):
            name = target["legendFormat"]
            for label, value in labels.items():
                name = name.replace(f"{{{{{label}}}}}", value)
            lines.append((name, points))
    lines.sort()
    is_stacked = defaults.get("custom", {}).get("stacking", {}).get("mode") == "normal"
    if is_stacked and lines:
        moments = sorted({moment for _, points in lines for moment, _ in points})
        values = [[dict(points).get(moment, 0.0) for moment in moments] for _, points in lines]
        axes.stackplot(_dates(moments), *values, labels=[name for name, _ in lines], alpha=0.75)
    else:
        for name, points in lines:
            axes.plot(_dates([moment for moment, _ in points]), [value for _, value in points], label=name, lw=1.3)
    axes.set_xlim(*_dates([source.start, source.end]))
    axes.set_ylim(0, defaults.get("max") or None)
    locator = AutoDateLocator(maxticks=5)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator, show_offset=False))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _format(value, defaults["unit"])))
    axes.tick_params(labelsize=6.5, length=2)
    axes.grid(color="#ebebeb", lw=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if lines:
        axes.legend(
            loc="upper left", bbox_to_anchor=(-0.02, -0.14), ncol=4, fontsize=6.5, frameon=False, columnspacing=1
        )
    else:
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", va="center", color="#8e8e8e")


def _dates(moments: Sequence[float]) -> list[float]:
    return [float(date2num(datetime.fromtimestamp(moment, UTC))) for moment in moments]


def _step(steps: Sequence[Mapping[str, Any]], value: float) -> str:
    color = str(steps[0]["color"])
    for step in steps[1:]:
        if value >= step["value"]:
            color = str(step["color"])
    return color


def _format(value: float, unit: str) -> str:
    """A value as Grafana would print it."""
    if unit == "percentunit":
        return f"{100 * value:.3g}%"
    if unit == "s":
        return f"{value:.3g} s" if value >= 1 or value == 0 else f"{1000 * value:.3g} ms"
    divisor, prefix = next(((divisor, prefix) for divisor, prefix in _PREFIXES if abs(value) >= divisor), (1, ""))
    space = " " if unit == "flops" else ""
    return f"{value / divisor:.3g}{space}{prefix}{_PER_SECOND.get(unit, '')}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.grafana.draw", description="Draw the dashboards' panels.")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", metavar="URL")
    parser.add_argument("--minutes", type=float, default=60, help="until now (default: %(default)g)")
    options = parser.parse_args()
    end = time.time()
    start = end - 60 * options.minutes
    for path in draw_dashboards(options.folder, options.prometheus, start, end, jobs=".+", window="1m"):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
