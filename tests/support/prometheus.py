"""The real Prometheus, with the configuration that is deployed, on a clock of seconds instead of minutes."""

from __future__ import annotations

import math
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from served import free_port

DEPLOYED = Path(__file__).parents[2] / "deploy" / "prometheus"
SCRAPE_SECONDS = 1


@dataclass(frozen=True, slots=True)
class Prometheus:
    """A running server, asked through its HTTP API."""

    url: str
    started: float

    def api(self, path: str, **params: Any) -> Any:
        """The `data` of an answer.

        Raises:
            AssertionError: Prometheus refuses the query; its sentence is in the message.
        """
        response = httpx.post(f"{self.url}/api/v1/{path}", data=params) if path.startswith("query") else None
        response = response or httpx.get(f"{self.url}/api/v1/{path}", params=params)
        answer = response.json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def value(self, expr: str) -> float:
        """The one value of an instant query."""
        result = self.api("query", query=expr)["result"]
        assert len(result) == 1, (expr, result)
        return float(result[0]["value"][1])

    def values(self, expr: str, *, start: float, end: float, step: float = SCRAPE_SECONDS) -> list[list[float]]:
        """The values of each series of a range query."""
        result = self.api("query_range", query=expr, start=start, end=end, step=step)["result"]
        return [[float(value) for _, value in series["values"]] for series in result]

    def label_values(self, query: str) -> list[str]:
        """What a dashboard's variable lists; `query` is Grafana's label_values(SELECTOR, LABEL)."""
        selector, _, label = query.removeprefix("label_values(").removesuffix(")").rpartition(", ")
        found = self.api(f"label/{label}/values", **{"match[]": selector})
        assert isinstance(found, list)
        return found

    def names(self) -> set[str]:
        """The metrics that were scraped or recorded."""
        return set(self.api("label/__name__/values"))

    def wait(self, expr: str, value: float, seconds: float = 60) -> None:
        """Wait until an instant query has one value, and it is this one."""
        deadline, seen = time.monotonic() + seconds, math.nan
        while time.monotonic() < deadline:
            result = self.api("query", query=expr)["result"]
            seen = float(result[0]["value"][1]) if len(result) == 1 else math.nan
            if seen == value:
                return
            time.sleep(0.2)
        pytest.fail(f"{expr} is {seen}, not {value}, after {seconds} s")


@contextmanager
def prometheus(folder: Path, metrics_address: str) -> Iterator[Prometheus]:
    """Scrape a gateway whose metrics are at HOST:PORT, and its engines through it.

    Differences from the deployed configuration: the gateway's address, seconds instead of minutes in `interval` and
    `for`. What is scraped, how it is relabelled, and every expression are the deployed ones.
    """
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed (Debian's package has that name)")
    port = free_port()
    config_text = (DEPLOYED / "prometheus.yml").read_text().replace("gateway:9100", metrics_address)
    config = yaml.safe_load(config_text.replace("localhost:9090", f"127.0.0.1:{port}"))
    config["global"] = {"scrape_interval": f"{SCRAPE_SECONDS}s", "evaluation_interval": "1s"}
    (folder / "rules").mkdir(parents=True)
    for path in (DEPLOYED / "rules").glob("*.yml"):
        rules = yaml.safe_load(path.read_text())
        for rule in (rule for group in rules["groups"] for rule in group["rules"]):
            rule.pop("for", None)
        (folder / "rules" / path.name).write_text(yaml.safe_dump(rules))
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = [
        program,
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "log").open("wb") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 30
        while not _is_ready(url):
            assert child.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
        yield Prometheus(url, time.time())
    finally:
        child.terminate()
        child.wait(timeout=30)


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/-/ready").status_code == 200
    except httpx.TransportError:
        return False
