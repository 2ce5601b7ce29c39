"""Every panel, variable and rule is proved: the real Prometheus scrapes the real gateway and engine under traffic.

With VISIONDROP_DASHBOARD_IMAGES=FOLDER the panels are drawn there afterwards, from the same data.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from dashboards import FILES, PanelQuery, load, queries, variables
from engines import draw
from gateway import write_keys
from images import encode
from prometheus import Prometheus, prometheus
from served import free_port, process, wait_until_ready
from traffic import BUDGETS, Traffic, image_host

from deploy.grafana.draw import draw_dashboards

pytestmark = [pytest.mark.engine, pytest.mark.slow]

BOARDS = [load(path) for path in FILES]
QUERIES = [query for board in BOARDS for query in queries(board)]
_FOLDER = os.environ.pop("VISIONDROP_DASHBOARD_IMAGES", None)  # no setting of the gateway, which would refuse it
IMAGES = Path(_FOLDER) if _FOLDER else None
ROUNDS = 40 if IMAGES else 6
WINDOW = "30s"
WORK = 'route=~"/v1/(chat|completions|responses|visual).*|/tokenize"'
SETTINGS = {
    "KEY_METRICS": "true",
    "FETCH_HTTP": "true",
    "MAX_QUEUED_REQUESTS": "2",
    "MAX_INFLIGHT_TOKENS": "6000",
}
HERE = Path(__file__).parents[1] / "support"


@dataclass(frozen=True, slots=True)
class Monitored:
    """A server with its Prometheus, after the traffic; times are in seconds since the epoch."""

    prometheus: Prometheus
    traffic: Traffic
    metrics: str
    """What the gateway and, through it, the engine expose at the end."""
    idle: dict[str, list[list[float]]]
    """What every query gave before the first request."""
    began: float
    ended: float


@pytest.fixture(scope="module")
def monitored(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Monitored]:
    folder = tmp_path_factory.mktemp("monitored")
    keys = write_keys(
        folder, '[keys.shop]\nsecret = "open-sesame"\n[keys.trial]\nsecret = "abracadabra"\nrequests_per_minute = 1\n'
    )
    port, metrics_port, log = free_port(), free_port(), folder / "server.log"
    command = ["serve", str(random_model), "--port", str(port), "--metrics-port", str(metrics_port)]
    engine = ["--", "--max-model-len", "6144", "--max-num-seqs", "4", "--enforce-eager", "--skip-mm-profiling"]
    settings = {f"VISIONDROP_{name}": value for name, value in {**SETTINGS, "API_KEYS_FILE": str(keys)}.items()}
    address = f"127.0.0.1:{metrics_port}"
    with (
        process(str(HERE / "gateway_with_local_images.py"), *command, *engine, log=log, **settings) as child,
        image_host(encode(draw(800, 600))) as image_url,
    ):
        wait_until_ready(f"http://{address}/ready", child, log)
        with prometheus(folder / "prometheus", address) as watcher:
            watcher.wait("min(up)", 1)
            time.sleep(5)  # several scrapes, so that a rate has something to compare
            idle = {query.name: run(watcher, query, time.time() - 3, time.time()) for query in QUERIES}
            traffic = Traffic(f"http://127.0.0.1:{port}", "open-sesame", "abracadabra", image_url)
            began = time.time()
            for number in range(ROUNDS):
                traffic.round(number)
                if number % 6 == 5:
                    traffic.flood(16)
            traffic.round(ROUNDS)
            traffic.close()
            watcher.wait(f"sum(visiondrop_requests_total{{{WORK}}})", sum(traffic.tally.statuses.values()))
            time.sleep(2)  # one more evaluation of the rules
            ours, engines = (httpx.get(f"http://{address}/metrics{path}").text for path in ("", "/engine/0"))
            yield Monitored(watcher, traffic, ours + engines, idle, began, time.time())


def run(watcher: Prometheus, query: PanelQuery, start: float, end: float) -> list[list[float]]:
    return watcher.values(query.with_variables(".+", window=WINDOW, range_="60s"), start=start, end=end)


def test_idle_server_shows_zero_or_nothing(monitored: Monitored) -> None:
    """Never NaN or infinity, and no alert but about what an idle server lacks."""
    for name, series in monitored.idle.items():
        assert all(math.isfinite(value) for values in series for value in values), name
    assert monitored.idle["VisionDrop / Gateway: Alerts firing (A)"] in ([], [[0.0] * 4], [[0.0] * 3])


def test_traffic_was_what_it_claims(monitored: Monitored) -> None:
    tally = monitored.traffic.tally
    assert {200, 400, 401, 429, 503} <= set(tally.statuses), tally
    assert tally.visual_tokens["saved"] > 10_000


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.name)
def test_panel_shows_finite_data_of_metrics_that_exist(monitored: Monitored, query: PanelQuery) -> None:
    scraped = monitored.prometheus.names()
    assert query.metrics or "ALERTS" in query.expr
    for metric in query.metrics:
        assert metric in scraped, f"no such metric: {metric}"
        assert metric == "ALERTS" or f"\n{metric}" in monitored.metrics, f"{metric} is not in the live scrape"
    series = run(monitored.prometheus, query, monitored.began, monitored.ended)
    assert series, "no data"
    assert all(math.isfinite(value) for values in series for value in values)


def test_every_variable_lists_values(monitored: Monitored) -> None:
    for board in BOARDS:
        for variable in variables(board).values():
            if variable["type"] != "query":
                continue
            query = variable["query"] if isinstance(variable["query"], str) else variable["query"]["query"]
            values = monitored.prometheus.label_values(query.replace("$job", ".+").replace("$instance", ".+"))
            assert values, (board["title"], variable["name"])
            if variable["name"] == "budget_class":
                assert set(values) == set(BUDGETS)
            if variable["name"] == "instance" and board["uid"] == "visiondrop-engine":
                assert values == ["engine-0"]


def test_every_rule_evaluates_and_every_recording_has_finite_data(monitored: Monitored) -> None:
    groups = monitored.prometheus.api("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) == 22
    for rule in rules:
        assert rule["health"] == "ok", rule
        if rule["type"] == "recording":
            series = monitored.prometheus.values(rule["name"], start=monitored.began, end=monitored.ended)
            assert series, rule["name"]
            assert all(math.isfinite(value) for values in series for value in values), rule["name"]


def test_alert_fires_for_what_happened(monitored: Monitored) -> None:
    alerts = monitored.prometheus.api("alerts")["alerts"]
    firing = {alert["labels"]["alertname"] for alert in alerts}
    assert "VisionDropRejections" in firing, "requests were turned away from a full queue"
    assert firing <= {"VisionDropRejections", "VisionDropInvalidKeys", "VisionDropQueueSaturated"}


def test_figures_are_those_that_clients_were_told(monitored: Monitored) -> None:
    told, watcher = monitored.traffic.tally.visual_tokens, monitored.prometheus
    for name in ("full", "kept", "saved"):
        assert watcher.value(f"sum(visiondrop_visual_tokens_{name}_total)") == told[name]
    assert watcher.value("sum(visiondrop_images_total)") == told["images"]
    for status, count in monitored.traffic.tally.statuses.items():
        assert watcher.value(f'sum(visiondrop_requests_total{{code="{status}", {WORK}}})') == count
    share = next(query for query in QUERIES if query.panel["title"] == "Saved share")
    window = f"{math.ceil(time.time() - watcher.started)}s"
    shown = watcher.value(share.with_variables(".+", window=window, range_=window))
    assert shown == pytest.approx(told["saved"] / told["full"], rel=0.01)


def test_panels_can_be_drawn(monitored: Monitored, tmp_path: Path) -> None:
    paths = draw_dashboards(
        IMAGES or tmp_path, monitored.prometheus.url, monitored.began - 5, monitored.ended, jobs=".+", window="10s"
    )
    assert len(paths) == len(BOARDS)
    assert all(path.stat().st_size > 10_000 for path in paths)
