"""What `benchmarks/accuracy.py` reports of its answers: figures with intervals, tables, a plot. Needs no engine."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vd_plugin.demo.questions import KINDS, normalize
from vd_plugin.demo.split import Example
from vd_plugin.schedule import Geometry

SMALL: Final = 40
"""Evidence is small if the shorter side of one of its boxes has fewer pixels of the tiles."""

GROUPS: Final = (
    "easy",
    "hard",
    "small evidence",
    "no small evidence",
    "upper half",
    "lower half",
    "training words",
    "held-out words",
)


@dataclass(frozen=True, slots=True)
class Share:
    """So many of so many, with Wilson's interval."""

    right: int
    count: int

    @property
    def share(self) -> float:
        return self.right / self.count if self.count else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.right, self.count)

    def __str__(self) -> str:
        if not self.count:
            return "–"
        low, high = self.interval
        return f"{percent(self.share)} ({percent(low)}–{percent(high)})"

    def to_dict(self) -> dict[str, Any]:
        if not self.count:
            return {"right": 0, "questions": 0}
        low, high = self.interval
        shares = {"share": self.share, "low": low, "high": high}
        return {"right": self.right, "questions": self.count, **{k: round(v, 4) for k, v in shares.items()}}


def wilson(right: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval for a share, by default of 95 %.

    Raises:
        ValueError: not 0 <= right <= count.
    """
    if not 0 <= right <= count:
        raise ValueError(f"{right} of {count} is no share")
    if count == 0:
        return 0.0, 1.0
    share = right / count
    center = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    # The ends are exact: rounding must not leave 1 - 1e-16 where all are right.
    return (
        0.0 if right == 0 else (center - spread) / scale,
        1.0 if right == count else (center + spread) / scale,
    )


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def is_right(answer: str, expected: str) -> bool:
    """Exact match."""
    return normalize(answer) == normalize(expected)


def guesses(examples: Sequence[Example]) -> dict[str, str]:
    """For each kind its most common answer, normalised; of equally common ones the first by alphabet."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for example in examples:
        counts[example.question.kind][normalize(example.question.answer)] += 1
    return {kind: min(count, key=lambda answer: (-count[answer], answer)) for kind, count in counts.items()}


def evidence_side(example: Example, geometry: Geometry) -> float | None:
    """Shortest side of a box of evidence, in pixels of the tiles that the image is cut into; None without evidence."""
    scene, boxes = example.scene, example.question.evidence
    if not boxes:
        return None
    rows, columns = geometry.tile_grid(scene.height, scene.width)
    # Without tiles the image is squeezed into the base view.
    scale_x, scale_y = (
        max(1, columns) * geometry.tile_size / scene.width,
        max(1, rows) * geometry.tile_size / scene.height,
    )
    if rows:
        scale_x = scale_y = min(scale_x, scale_y)
    return min(min((box.right - box.left) * scale_x, (box.bottom - box.top) * scale_y) for box in boxes)


def groups_of(example: Example, geometry: Geometry) -> set[str]:
    """Those of KINDS and GROUPS that an example belongs to. Evidence in both halves of the image belongs to neither."""
    question = example.question
    groups = {question.kind, "easy" if question.easy else "hard"}
    side = evidence_side(example, geometry)
    if side is not None:
        groups.add("small evidence" if side < SMALL else "no small evidence")
        middle = example.scene.height / 2
        if all(box.bottom <= middle for box in question.evidence):
            groups.add("upper half")
        elif all(box.top >= middle for box in question.evidence):
            groups.add("lower half")
    if question.kind == "word":
        groups.add("held-out words" if example.is_held_out else "training words")
    return groups


@dataclass(frozen=True, slots=True)
class Column:
    """The answers under one setting; `right` has one entry for each example."""

    name: str
    budget: int | str
    kept: float
    """Visual tokens of an image in a decoder layer, mean over the questions."""
    right: Sequence[bool]


@dataclass(frozen=True, slots=True)
class Report:
    """Figures of one run. The first column is the one that the others are compared with."""

    columns: Sequence[Column]
    members: Mapping[str, Sequence[int]]
    """Numbers of the examples of each group, "all" included."""
    guessed: Sequence[bool]
    """Whether the kind's most common answer is right."""
    details: Mapping[str, Any]
    """What was run: model, versions."""

    def share(self, column: Column, group: str = "all") -> Share:
        members = self.members[group]
        return Share(sum(column.right[number] for number in members), len(members))

    def guess(self, group: str) -> Share:
        members = self.members[group]
        return Share(sum(self.guessed[number] for number in members), len(members))

    def stay_right(self, column: Column, group: str = "all") -> Share:
        """Of the questions right in the first column, how many are right in this one."""
        before = [number for number in self.members[group] if self.columns[0].right[number]]
        return Share(sum(column.right[number] for number in before), len(before))

    def become_right(self, column: Column, group: str = "all") -> Share:
        """Of the questions wrong in the first column, how many are right in this one."""
        before = [number for number in self.members[group] if not self.columns[0].right[number]]
        return Share(sum(column.right[number] for number in before), len(before))

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.details,
            "guess": {group: self.guess(group).to_dict() for group in self.members},
            "settings": [
                {
                    "name": column.name,
                    "budget": column.budget,
                    "kept": round(column.kept, 1),
                    "exact_match": {group: self.share(column, group).to_dict() for group in self.members},
                    "stay_right": {group: self.stay_right(column, group).to_dict() for group in self.members},
                    "become_right": self.become_right(column).to_dict(),
                }
                for column in self.columns
            ],
        }


def make_report(
    examples: Sequence[Example], columns: Sequence[Column], geometry: Geometry, details: Mapping[str, Any]
) -> Report:
    members: dict[str, list[int]] = {group: [] for group in ("all", *KINDS, *GROUPS)}
    for number, example in enumerate(examples):
        for group in ("all", *groups_of(example, geometry)):
            members[group].append(number)
    common = guesses(examples)
    guessed = [is_right(common[example.question.kind], example.question.answer) for example in examples]
    return Report(columns, members, guessed, details)


# Tables


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def make_tables(report: Report) -> dict[str, str]:
    """The page's tables by their name."""
    names = [_title(column) for column in report.columns]
    kept = ["*tokens kept, mean*", "", "", *(f"*{column.kept:,.0f}*" for column in report.columns)]

    def row(group: str, label: str | None = None) -> list[str]:
        shares = (str(report.share(column, group)) for column in report.columns)
        return [label or group, f"{len(report.members[group]):,}", percent(report.guess(group).share), *shares]

    def rows(groups: Sequence[str]) -> list[list[str]]:
        return [row(group) for group in groups if report.members[group]]

    return {
        "kinds": table(["kind", "questions", "guess", *names], [kept, *rows(KINDS), row("all", "**all**")]),
        "groups": table(["", "questions", "guess", *names], rows(GROUPS)),
        "paired": table(
            ["", *names[1:]],
            [
                [label, *(str(share(column)) for column in report.columns[1:])]
                for label, share in (
                    (f"right at {names[0]}: stays right", report.stay_right),
                    (f"wrong at {names[0]}: becomes right", report.become_right),
                )
            ],
        ),
        "reading": _read(report),
    }


def _title(column: Column) -> str:
    return column.name if column.name == str(column.budget) else f"{column.name} ({column.budget})"


def _read(report: Report) -> str:
    """The figures in plain sentences."""
    first, *others = report.columns
    share, guess = report.share(first), report.guess("all")
    answered = f"* With all tokens, {percent(share.share)} % of {share.count:,} questions are answered right; "
    lines = [answered + f"always giving the kind's most common answer would get {percent(guess.share)} %."]
    for column in others:
        stays = report.stay_right(column)
        if not stays.count:
            continue
        losses = {
            kind: report.share(first, kind).share - report.share(column, kind).share
            for kind in KINDS
            if report.members[kind]
        }
        worst = max(losses, key=losses.__getitem__)
        if losses[worst] > 0:
            lost = f"The kind that loses most is *{worst}* (-{percent(losses[worst])} points)"
        else:
            lost = "No kind loses"
        lines.append(
            f"* At {_title(column)} ({column.kept / first.kept:.1%} of the tokens), {percent(stays.share)} % of the "
            f"questions answered right with all tokens stay right. {lost}."
        )
    for one, other in (("no small evidence", "small evidence"), ("training words", "held-out words")):
        if report.members[one] and report.members[other]:
            pairs = ", ".join(
                f"{percent(report.share(column, one).share)} and {percent(report.share(column, other).share)} % at "
                f"{_title(column)}"
                for column in (first, report.columns[-1])
            )
            lines.append(f"* Questions with {one} and {other}: {pairs}.")
    return "\n".join(lines)


def replace_tables(page: str, tables: Mapping[str, str]) -> str:
    """The page with new tables between its markers `<!-- table: begin NAME -->` and `<!-- table: end -->`.

    Raises:
        ValueError: the page has no place for one of the tables.
    """
    for name, text in tables.items():
        begin, end = f"<!-- table: begin {name} -->\n", "<!-- table: end -->"
        if (count := page.count(begin)) != 1:
            raise ValueError(f"the page has {count} places for the table {name!r}, not one")
        before, rest = page.split(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"the page's table {name!r} has no end")
        page = f"{before}{begin}\n{text}\n\n{end}{after}"
    return page


# The plot

_COLORS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's colours for colour-blind readers; each stands for two kinds, one of them dashed."""


def draw_plot(report: Report, path: Path) -> None:
    """Exact match against the tokens kept: a line for each kind, and for all a line with its interval."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    columns = sorted(report.columns, key=lambda column: column.kept)
    kept = [column.kept for column in columns]
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    ends: dict[str, tuple[float, str]] = {}
    kinds = [kind for kind in KINDS if report.members[kind]]
    for number, kind in enumerate(kinds):
        color, dashed = _COLORS[number % len(_COLORS)], number >= len(_COLORS)
        shares = [100 * report.share(column, kind).share for column in columns]
        axes.plot(kept, shares, color=color, linewidth=1.2, linestyle="--" if dashed else "-", marker="o", markersize=3)
        ends[kind] = shares[-1], color
    shares = [100 * report.share(column).share for column in columns]
    bounds = [report.share(column).interval for column in columns]
    axes.fill_between(
        kept, [100 * low for low, _ in bounds], [100 * high for _, high in bounds], color="0.75", alpha=0.7
    )
    axes.plot(kept, shares, color="black", linewidth=2.8, marker="o", markersize=5)
    ends["all (95 % interval)"] = shares[-1], "black"

    axes.set_xscale("log")
    axes.set_ylim(0, 101)
    axes.set_xlim(kept[0] * 0.93, kept[-1] * 1.05)
    axes.xaxis.set_major_locator(FixedLocator(kept))
    axes.xaxis.set_minor_locator(NullLocator())
    names = ["" if column.name.isdecimal() else column.name for column in columns]
    axes.set_xticks(kept, [f"{column.kept:,.0f}\n{name}" for column, name in zip(columns, names, strict=True)])
    axes.set_xlabel("visual tokens kept for an image, mean over the decoder's layers")
    axes.set_ylabel("exact match, %")
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    arrow = {"arrowstyle": "-", "linewidth": 0.5, "shrinkA": 1, "shrinkB": 3, "relpos": (0, 0.5)}
    for label, height in spread({label: end for label, (end, _) in ends.items()}, 3.4, 0, 101).items():
        end, color = ends[label]
        axes.annotate(
            label, (kept[-1], end), (kept[-1] * 1.16, height), color=color, va="center", annotation_clip=False,
            fontsize=9, weight="bold" if color == "black" else "normal",
            arrowprops={**arrow, "color": color},
        )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def spread(heights: Mapping[str, float], gap: float, low: float, high: float) -> dict[str, float]:
    """Heights moved apart as little as that no two are nearer than `gap`, within low..high where there is room."""
    order = sorted(heights, key=lambda label: (heights[label], label))
    # Runs of labels that touch, each centred on its members; neighbours that would touch become one run.
    runs: list[list[str]] = []
    centers: list[float] = []

    def place(run: Sequence[str]) -> float:
        half = gap * (len(run) - 1) / 2
        center = sum(heights[label] for label in run) / len(run)
        return max(low + half, min(high - half, center))

    for label in order:
        runs.append([label])
        centers.append(place([label]))
        while len(runs) > 1 and centers[-1] - centers[-2] < gap * (len(runs[-1]) + len(runs[-2])) / 2 - 1e-9:
            last = runs.pop()
            centers.pop()
            runs[-1] = runs[-1] + last
            centers[-1] = place(runs[-1])
    return {
        label: center + gap * (number - (len(run) - 1) / 2)
        for run, center in zip(runs, centers, strict=True)
        for number, label in enumerate(run)
    }


def progress_line(done: int, total: int, seconds: float) -> str:
    """How far a run is, and the time left at its pace so far."""
    filled = 24 * done // max(1, total)
    left = f"{_duration(seconds / done * (total - done))} left" if done else "starting"
    rate = f"{done / seconds:.1f} answers/s" if done and seconds > 0 else ""
    return f"[{'#' * filled}{'.' * (24 - filled)}] {done:,}/{total:,}  {left}  {rate}".rstrip()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
