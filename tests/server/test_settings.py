"""Settings from the environment, and their table in the documentation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from server.settings import Settings
from vd_plugin.schedule import FULL

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"


def test_every_setting_is_in_the_table_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \|([^|]*)\|", OPERATIONS.read_text(), re.MULTILINE))
    assert set(rows) == {name.upper() for name in Settings.model_fields}
    for name, field in Settings.model_fields.items():
        said = rows[name.upper()].strip()
        if isinstance(field.default, bool):
            assert said == str(field.default).lower(), name
        elif isinstance(field.default, int | float) and name not in ("default_budget", "image_threads"):
            assert float(said) == field.default, name
        elif field.default is None:
            assert said == "", name


@pytest.mark.parametrize(("text", "budget"), [("320", 320), ("low", 160), ("full", FULL)])
def test_budgets_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch, text: str, budget: object) -> None:
    monkeypatch.setenv("VISIONDROP_DEFAULT_BUDGET", text)
    monkeypatch.setenv("VISIONDROP_MAX_BUDGET", text)
    settings = Settings()
    assert settings.default_budget == settings.max_budget == budget


def test_hosts_are_a_list_with_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISIONDROP_FETCH_HOSTS", "Example.com, *.example.org,")
    assert Settings().fetch_hosts == ("example.com", "*.example.org")


def test_origins_are_as_browsers_write_them() -> None:
    right = ("https://a.example", "http://localhost:3000", "app://obsidian.md", "http://[::1]:8080", "*")
    assert Settings(allowed_origins=", ".join(right)).allowed_origins == right
    for origin in (
        "https://a.example/",
        "https://*.example",
        "a.example",
        "https://A.example",
        "https://a.example:443",
    ):
        with pytest.raises(ValidationError, match="an origin is"):
            Settings(allowed_origins=origin)


@pytest.mark.parametrize(
    ("name", "value"),
    [("MAX_BUDGET", "31"), ("MAX_BODY_BYTES", "0"), ("SHUTDOWN_SECONDS", "-1"), ("METRICS_PORT", "70000")],
)
def test_values_out_of_range_are_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"VISIONDROP_{name}", value)
    with pytest.raises(ValidationError):
        Settings()
