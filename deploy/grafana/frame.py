"""What the dashboards have in common: variables, links to each other, time range."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from grafana_foundation_sdk.builders import dashboard as builder
from grafana_foundation_sdk.models import dashboard

from deploy.grafana.panels import DATASOURCE, AnyPanel

TAG: Final = "visiondrop"


def frame(uid: str, title: str, description: str, metric: str) -> builder.Dashboard:
    """An empty dashboard whose variables list the targets that have `metric`."""
    return (
        builder.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags([TAG])
        .readonly()
        .tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
        .refresh("30s")
        .time("now-1h", "now")
        .timezone("browser")
        .link(
            builder.DashboardLink("VisionDrop")
            .type(dashboard.DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .as_dropdown(False)
            .keep_time(True)
            .include_vars(False)
        )
        .with_variable(builder.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(label("job", "Job", f"label_values({metric}, job)"))
        .with_variable(label("instance", "Instance", f'label_values({metric}{{job=~"$job"}}, instance)'))
    )


def label(name: str, title: str, query: str) -> builder.QueryVariable:
    """A variable with the values of a label; all of them at first."""
    return (
        builder.QueryVariable(name)
        .label(title)
        .query(query)
        .datasource(DATASOURCE)
        .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(dashboard.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".+")
        .current(dashboard.VariableOption(selected=True, text="All", value="$__all"))
    )


def with_row(board: builder.Dashboard, title: str, panels: Sequence[AnyPanel]) -> builder.Dashboard:
    """A heading, and panels side by side below it."""
    board = board.with_row(builder.Row(title))
    for panel in panels:
        board = board.with_panel(panel)
    return board
