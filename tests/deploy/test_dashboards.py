"""The dashboards' files: no drift from the code that makes them, and the rules of Grafana's dashboard linter.

The linter (github.com/grafana/dashboard-linter, docs/index.md lists its rules) is a Go program without a package here,
so its rules are written out below, under its names.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from dashboards import FILES, FOLDER, load, panels, queries, variables

ROOT = Path(__file__).parents[2]
PROVISIONING = ROOT / "deploy" / "grafana" / "provisioning"

BOARDS = [load(path) for path in FILES]
each_board = pytest.mark.parametrize("board", BOARDS, ids=[path.stem for path in FILES])

NOT_OF_A_TARGET = {"Alerts firing"}
"""Panels about ALERTS, whose labels are those of what an alert is about."""


def test_files_are_what_the_code_makes(tmp_path: Path) -> None:
    from deploy.grafana.__main__ import render

    files = render()
    assert set(files) == set(FILES)
    for path, text in files.items():
        assert path.read_text() == text, f"{path.name} is stale; run: make dashboards"


@each_board
def test_dashboard_can_be_found_and_not_be_edited_by_mistake(board: dict[str, Any]) -> None:
    """uneditable-dashboard"""
    assert board["editable"] is False, "changes belong into the code, or a copy"
    assert re.fullmatch(r"visiondrop-[a-z-]+", board["uid"])
    assert board["title"].startswith("VisionDrop / ")
    assert board["description"].endswith(".")
    assert board["tags"] == ["visiondrop"]


@each_board
def test_variables_choose_datasource_job_and_instance(board: dict[str, Any]) -> None:
    """template-datasource-rule, template-job-rule, template-instance-rule, template-on-time-change-reload-rule"""
    found = variables(board)
    assert list(found)[:3] == ["datasource", "job", "instance"]
    assert (found["datasource"]["type"], found["datasource"]["query"]) == ("datasource", "prometheus")
    assert found["datasource"]["label"] == "Data source"
    for name, variable in list(found.items())[1:]:
        assert variable["type"] == "query"
        assert variable["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert variable["label"] == name.replace("_", " ").capitalize()
        assert (variable["multi"], variable["includeAll"], variable["allValue"]) == (True, True, ".+")
        assert variable["refresh"] == 2, "on change of the time range"
        assert "label_values(" in str(variable["query"])


@each_board
def test_every_panel_says_what_it_shows(board: dict[str, Any]) -> None:
    """panel-title-description-rule, panel-units-rule, panel-no-targets-rule, panel-datasource-rule"""
    seen = set()
    for panel in panels(board):
        assert panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        assert panel["targets"], panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        defaults = panel["fieldConfig"]["defaults"]
        assert defaults["unit"], panel["title"]
        assert len(defaults["thresholds"]["steps"]) == 3, panel["title"]
        place = tuple(panel["gridPos"].values())
        assert place not in seen
        seen.add(place)
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24


@each_board
def test_every_query_follows_the_variables(board: dict[str, Any]) -> None:
    """target-job-rule, target-instance-rule, target-rate-interval-rule, target-counter-agg-rule"""
    for query in queries(board):
        assert query.target["datasource"] == query.panel["datasource"], query.name
        assert query.target["legendFormat"], query.name
        selectors = re.findall(r"\{[^{}]*\}", query.expr)
        assert selectors, query.name
        if query.panel["title"] not in NOT_OF_A_TARGET:
            for selector in selectors:
                assert 'job=~"$job"' in selector, query.name
                assert 'instance=~"$instance"' in selector, query.name
        assert set(re.findall(r"\[([^\]]*)\]", query.expr)) <= {"$__rate_interval", "$__range"}, query.name
        assert ("$__range" in query.expr) <= (query.panel["type"] == "stat"), query.name
        for call, metric in re.findall(r"(\w+\(|)([a-zA-Z_:][\w:]*)\{", query.expr):
            is_counter = metric.endswith(("_total", "_bucket", "_sum", "_count"))
            assert is_counter == (call in ("rate(", "increase(")), query.name


@each_board
def test_promql_is_valid(board: dict[str, Any], tmp_path: Path) -> None:
    """target-promql-rule"""
    if shutil.which("promtool") is None:
        pytest.skip("promtool, which comes with Prometheus, is not installed")
    rules = [
        {"record": f"panel:query_{number}", "expr": query.with_variables(".+", window="5m", range_="1h")}
        for number, query in enumerate(queries(board))
    ]
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    done = subprocess.run(["promtool", "check", "rules", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_provisioning_names_the_datasource_and_the_folder() -> None:
    (source,) = yaml.safe_load((PROVISIONING / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert (source["type"], source["uid"], source["isDefault"]) == ("prometheus", "visiondrop-prometheus", True)
    scraped = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == scraped["global"]["scrape_interval"], "$__rate_interval depends on it"
    (provider,) = yaml.safe_load((PROVISIONING / "dashboards" / "visiondrop.yml").read_text())["providers"]
    assert provider["options"]["path"] == "/etc/grafana/dashboards", "where docker-compose.yml mounts the files"
    assert provider["allowUiUpdates"] is False


def test_there_are_three_dashboards() -> None:
    assert [path.name for path in sorted(FOLDER.iterdir())] == ["engine.json", "gateway.json", "visual_tokens.json"]
