"""Panels in one style: a sentence that says what is seen, a unit, a threshold, and queries with legends."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_uppercase
from typing import Final, NamedTuple, TypeAlias, TypeVar

from grafana_foundation_sdk.builders import common as common_builder
from grafana_foundation_sdk.builders import dashboard as builder
from grafana_foundation_sdk.builders import prometheus, stat, statetimeline, timeseries
from grafana_foundation_sdk.models import common, dashboard
from grafana_foundation_sdk.models.dashboard import DataSourceRef, ThresholdsMode

DATASOURCE: Final = DataSourceRef(type_val="prometheus", uid="${datasource}")

AnyPanel: TypeAlias = timeseries.Panel | stat.Panel | statetimeline.Panel
PanelT = TypeVar("PanelT", timeseries.Panel, stat.Panel, statetimeline.Panel)


class Query(NamedTuple):
    """PromQL, and how its series are called; `{{label}}` stands for a label's value."""

    expr: str
    legend: str


class Limits(NamedTuple):
    """Where a value becomes worth a look, and where it is bad; `falling` if small values are the bad ones."""

    warning: float
    bad: float
    falling: bool = False


NO_LIMIT: Final = Limits(1e15, 1e16)
"""For amounts of which none is too much: the panel stays green."""


def series(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    limits: Limits,
    maximum: float | None = None,
    stacked: bool = False,
    width: int = 8,
) -> timeseries.Panel:
    """Lines over time."""
    panel = (
        timeseries.Panel()
        .fill_opacity(20 if stacked else 8)
        .line_width(1)
        .show_points(common.VisibilityMode.NEVER)
        .legend(
            common_builder.VizLegendOptions()
            .display_mode(common.LegendDisplayMode.LIST)
            .placement(common.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(
            common_builder.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI).sort(common.SortOrder.DESCENDING)
        )
        .thresholds_style(
            common_builder.GraphThresholdsStyleConfig().mode(common.GraphThresholdsStyleMode.DASHED)
            if maximum is not None
            else common_builder.GraphThresholdsStyleConfig().mode(common.GraphThresholdsStyleMode.OFF)
        )
        .min(0)
        .height(8)
        .span(width)
    )
    if maximum is not None:
        panel = panel.max(maximum)
    if stacked:
        panel = panel.stacking(common_builder.StackingConfig().mode(common.StackingMode.NORMAL))
    return _finish(panel, title, description, unit, queries, limits)


def number(title: str, description: str, unit: str, query: str, *, limits: Limits, width: int = 4) -> stat.Panel:
    """One number, with its course behind it."""
    panel = (
        stat.Panel()
        .graph_mode(common.BigValueGraphMode.AREA)
        .color_mode(common.BigValueColorMode.VALUE)
        .reduce_options(common_builder.ReduceDataOptions().calcs(["lastNotNull"]))
        .no_value("0")
        .height(4)
        .span(width)
    )
    return _finish(panel, title, description, unit, [Query(query, title)], limits)


def states(title: str, description: str, query: Query, *, width: int = 8) -> statetimeline.Panel:
    """Whether something is up, over time: 1 is up, 0 is down."""
    words = {
        "1": dashboard.ValueMappingResult(text="up", color="green", index=0),
        "0": dashboard.ValueMappingResult(text="down", color="red", index=1),
    }
    panel = (
        statetimeline.Panel()
        .mappings([dashboard.ValueMap(options=words)])
        .merge_values(True)
        .show_value(common.VisibilityMode.NEVER)
        .height(8)
        .span(width)
    )
    return _finish(panel, title, description, "short", [query], Limits(1, 0.5, falling=True))


def _finish(panel: PanelT, title: str, description: str, unit: str, queries: Sequence[Query], limits: Limits) -> PanelT:
    panel = (
        panel.title(title).description(description).unit(unit).datasource(DATASOURCE).thresholds(_thresholds(limits))
    )
    for ref_id, (expr, legend) in zip(ascii_uppercase, queries, strict=False):
        target = prometheus.Dataquery().expr(expr).legend_format(legend).range().ref_id(ref_id)
        panel = panel.with_target(target.datasource(DATASOURCE))
    return panel


def _thresholds(limits: Limits) -> builder.ThresholdsConfig:
    """Green, yellow and red; the first step has no value."""
    if limits.falling:
        steps = [(None, "red"), (limits.bad, "yellow"), (limits.warning, "green")]
    else:
        steps = [(None, "green"), (limits.warning, "yellow"), (limits.bad, "red")]
    return (
        builder.ThresholdsConfig()
        .mode(ThresholdsMode.ABSOLUTE)
        .steps([dashboard.Threshold(value=value, color=color) for value, color in steps])
    )
