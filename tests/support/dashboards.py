"""Grafana's dashboards as tests see them: the JSON files that are provisioned."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "deploy" / "grafana" / "dashboards"
FILES = sorted(FOLDER.glob("*.json"))

_METRIC = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*(?=\{)")


@dataclass(frozen=True, slots=True)
class PanelQuery:
    """One query of one panel."""

    dashboard: str
    panel: dict[str, Any]
    target: dict[str, Any]

    @property
    def expr(self) -> str:
        return str(self.target["expr"])

    @property
    def name(self) -> str:
        return f"{self.dashboard}: {self.panel['title']} ({self.target['refId']})"

    @property
    def metrics(self) -> set[str]:
        """Names of the metrics in it; every selector in the dashboards has braces."""
        return set(_METRIC.findall(self.expr))

    def with_variables(self, jobs: str, *, window: str, range_: str, budget_class: str = ".+") -> str:
        """As Grafana sends it to Prometheus."""
        variables = {
            "$__rate_interval": window,
            "$__range": range_,
            "$job": jobs,
            "$instance": ".+",
            "$budget_class": budget_class,
        }
        text = self.expr
        for variable, value in variables.items():
            text = text.replace(variable, value)
        assert "$" not in text, text
        return text


def load(path: Path) -> dict[str, Any]:
    board = json.loads(path.read_text())
    assert isinstance(board, dict)
    return board


def panels(board: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """All panels, those inside rows included; rows themselves are none."""
    for panel in board["panels"]:
        if panel["type"] == "row":
            yield from panel.get("panels", [])
        else:
            yield panel


def queries(board: dict[str, Any]) -> Iterator[PanelQuery]:
    for panel in panels(board):
        for target in panel["targets"]:
            yield PanelQuery(board["title"], panel, target)


def variables(board: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {variable["name"]: variable for variable in board["templating"]["list"]}
