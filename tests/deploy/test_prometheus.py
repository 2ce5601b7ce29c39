"""Prometheus' configuration, rules and their tests, held by Prometheus' own tool."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "prometheus"
RULES = sorted((FOLDER / "rules").glob("*.yml"))
RULE_TESTS = FOLDER / "tests" / "alerts.yml"
RUNBOOK = ROOT / "docs" / "runbook.md"


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("promtool") is None:
        pytest.skip("promtool, which comes with Prometheus, is not installed")
    return subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)


def alerts() -> list[dict[str, Any]]:
    groups = [group for path in RULES for group in yaml.safe_load(path.read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"] if "alert" in rule]


def test_configuration_and_rules_are_valid() -> None:
    for arguments in (("config", str(FOLDER / "prometheus.yml")), ("rules", *map(str, RULES))):
        done = promtool("check", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr


def test_rules_do_what_their_tests_say() -> None:
    done = promtool("test", "rules", str(RULE_TESTS))
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_changed_rule_is_found_out(tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "prometheus")
    changed = tmp_path / "prometheus" / "rules" / "alerts.yml"
    changed.write_text(changed.read_text().replace("> 0.02", "> 0.05"))
    done = promtool("test", "rules", str(tmp_path / "prometheus" / "tests" / "alerts.yml"))
    assert done.returncode != 0
    assert "VisionDropErrorRate" in done.stdout + done.stderr


def test_every_alert_is_tested_firing_and_silent() -> None:
    cases = [
        case for test in yaml.safe_load(RULE_TESTS.read_text())["tests"] for case in test.get("alert_rule_test", [])
    ]
    names = {alert["alert"] for alert in alerts()}
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == names
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == names


def test_every_alert_has_its_heading_in_the_runbook_and_the_other_way_round() -> None:
    headings = re.findall(r"^## (VisionDrop\w+)$", RUNBOOK.read_text(), re.MULTILINE)
    assert sorted(headings) == sorted(alert["alert"] for alert in alerts())
    for alert in alerts():
        assert alert["annotations"]["runbook"] == f"docs/runbook.md#{alert['alert'].lower()}"
        assert alert["labels"]["severity"] in ("page", "ticket")
        assert alert["annotations"]["summary"].endswith(".")


def test_objective_of_the_first_token_is_a_bound_of_the_histogram() -> None:
    from server.telemetry.metrics import Metrics

    bounds = re.findall(r'first_token_seconds_bucket\{[^}]*le="([^"]+)"', Metrics().render().decode())
    used = {bound for path in RULES for bound in re.findall(r'le="([^"]+)"', path.read_text())}
    assert used == {"2.5"} <= set(bounds)
