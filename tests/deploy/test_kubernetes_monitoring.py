"""deploy/kubernetes/monitoring: what the operator gets, and the labels that rules and dashboards rely on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import cloudcoil.models.prometheus_operator.v1 as operator
import kubernetes_validate
import pytest
import yaml
from dashboards import FILES
from manifests import FOLDER, INSTALLATIONS, NAMESPACE, ROOT, Manifests, Object
from network_policy import Party, may_connect
from service_monitor import instances, promtool, targets_of

from deploy.kubernetes.__main__ import render
from server.paths import ENGINE_METRICS, METRICS
from server.telemetry.metrics import Metrics

RULES = sorted((ROOT / "deploy" / "prometheus" / "rules").glob("*.yml"))
PROMETHEUS = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
each_installation = pytest.mark.parametrize("folder", INSTALLATIONS, ids=lambda path: path.name)


def monitoring() -> Manifests:
    return Manifests.of(FOLDER / "monitoring")


def assert_known(item: Object) -> None:
    """The operator's models ignore unknown fields; what they have read must be all there is."""
    model = getattr(operator, item["kind"]).model_validate(item)
    assert model.model_dump(by_alias=True, exclude_unset=True, mode="json") == item


def test_objects_are_those_of_the_operator() -> None:
    objects = monitoring().objects
    kinds = sorted(item["kind"] for item in objects)
    assert kinds == ["ConfigMap"] * 3 + ["PrometheusRule"] * 2 + ["ServiceMonitor"] * 2
    for item in objects:
        assert item["metadata"]["namespace"] == NAMESPACE
        assert item["metadata"]["labels"]["release"] == "kube-prometheus-stack"
        if item["kind"] == "ConfigMap":
            assert kubernetes_validate.validate(item, "1.37", strict=True)
        else:
            assert item["apiVersion"] == "monitoring.coreos.com/v1"
            assert_known(item)


@pytest.mark.parametrize("kind", ["ServiceMonitor", "PrometheusRule"])
def test_unknown_fields_are_found_out(kind: str) -> None:
    item = monitoring().all(kind)[0]
    for place in ({**item["spec"], "jobLabels": "x"}, deep(item["spec"])):
        with pytest.raises((AssertionError, ValueError)):
            assert_known({**item, "spec": place})


def deep(spec: Object) -> Object:
    """A mistake in the first endpoint or group."""
    (key,) = spec.keys() & {"endpoints", "groups"}
    return {**spec, key: [{**spec[key][0], "relabelling": []}, *spec[key][1:]]}


def test_rules_are_those_of_the_files() -> None:
    for path, text in render().items():
        assert path.read_text() == text, f"{path.name} is stale; run: python -m deploy.kubernetes"
    rules = {item["metadata"]["name"]: item["spec"] for item in monitoring().all("PrometheusRule")}
    assert rules == {f"visiondrop-{path.stem}": yaml.safe_load(path.read_text()) for path in RULES}


def test_a_file_of_rules_that_cannot_be_indented_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deploy.kubernetes import __main__ as generator

    monkeypatch.setattr(generator, "_RULES", tmp_path)
    for text in ("groups: []\n", "# note\nother: 1\ngroups:\n  - name: a\n"):
        (tmp_path / "a.yml").write_text(text)
        with pytest.raises(ValueError, match=r"a\.yml"):
            generator.render()


def test_rules_pass_prometheus_own_check(tmp_path: Path) -> None:
    for item in monitoring().all("PrometheusRule"):
        path = tmp_path / f"{item['metadata']['name']}.yml"
        path.write_text(yaml.safe_dump(item["spec"]))
        assert "SUCCESS" in promtool("check", "rules", str(path))


def test_dashboards_are_the_files_under_the_label_of_the_sidecar() -> None:
    maps = monitoring().all("ConfigMap")
    assert {name: text for item in maps for name, text in item["data"].items()} == {
        path.name: path.read_text() for path in FILES
    }
    for item in maps:
        assert item["metadata"]["labels"]["grafana_dashboard"] == "1"
        # kubectl apply keeps the whole object in an annotation, of at most 256 KiB.
        assert len(json.dumps(item)) < 200 * 1024


@each_installation
@pytest.mark.parametrize("num_gateways", [1, 3])
def test_every_engine_is_read_once_through_the_gateways(folder: Path, num_gateways: int, tmp_path: Path) -> None:
    installation = Manifests.of(folder)
    replicas = {"gateway": num_gateways, "engine": installation.one("StatefulSet", "engine")["spec"]["replicas"]}
    targets = targets_of(monitoring().one("ServiceMonitor", "engine"), installation, tmp_path, replicas=replicas)
    assert instances(targets) == [("visiondrop-engine", f"engine-{number}") for number in range(replicas["engine"])]
    service = installation.one("Service", "gateway-metrics")
    assert service["spec"]["publishNotReadyAddresses"] is True, "a stall is when metrics are needed"
    for target in targets:
        number = target["instance"].removeprefix("engine-")
        assert target["__metrics_path__"] == ENGINE_METRICS.format(engine=number)
        host = f"{service['metadata']['name']}.{NAMESPACE}.svc"
        assert target["__address__"] == f"{host}:{service['spec']['ports'][0]['port']}"
        assert (target["pod"], target["namespace"]) == (target["instance"], NAMESPACE)


@each_installation
def test_every_gateway_is_read_by_itself(folder: Path, tmp_path: Path) -> None:
    installation = Manifests.of(folder)
    monitor = monitoring().one("ServiceMonitor", "gateway")
    targets = targets_of(monitor, installation, tmp_path, replicas={"gateway": 3, "engine": 2})
    assert len({target["__address__"] for target in targets}) == len(targets) == 3
    policies = installation.all("NetworkPolicy")
    gateway = installation.one("Deployment", "gateway")["spec"]["template"]["metadata"]["labels"]
    for target in targets:
        assert (target["job"], target["instance"]) == ("visiondrop-gateway", target["pod"])
        assert target["__metrics_path__"] == METRICS
        address, _, port = target["__address__"].partition(":")
        assert may_connect(policies, Party("10.9.9.9", "monitoring"), Party(address, NAMESPACE, gateway), int(port))


def test_jobs_and_intervals_are_those_of_the_other_deployments() -> None:
    jobs = {job["job_name"] for job in PROMETHEUS["scrape_configs"]} - {"prometheus"}
    found = set()
    for monitor in monitoring().all("ServiceMonitor"):
        (endpoint,) = monitor["spec"]["endpoints"]
        assert endpoint["interval"] == PROMETHEUS["global"]["scrape_interval"]
        found |= {item["replacement"] for item in endpoint["relabelings"] if item["targetLabel"] == "job"}
    assert found == jobs
    used = {job for path in RULES for job in re.findall(r'job="([^"]+)"', path.read_text())}
    assert used <= jobs


def test_adapter_reads_what_the_service_monitor_yields(tmp_path: Path) -> None:
    values: dict[str, Any] = yaml.safe_load((FOLDER / "autoscaling" / "prometheus_adapter_values.yaml").read_text())
    (rule,) = values["rules"]["custom"]
    (scaler,) = Manifests.of(FOLDER / "overlays" / "autoscaling").all("HorizontalPodAutoscaler")
    name = scaler["spec"]["metrics"][0]["pods"]["metric"]["name"]
    assert rule["seriesQuery"].startswith(f'{name}{{job="visiondrop-gateway",')
    assert f"\n{name} " in Metrics().render().decode()
    monitor = monitoring().one("ServiceMonitor", "gateway")
    (target, _) = targets_of(monitor, Manifests.of(FOLDER / "base"), tmp_path, replicas={"gateway": 2, "engine": 1})
    assert rule["resources"]["overrides"].keys() <= target.keys()
    expr = rule["metricsQuery"].replace("<<.Series>>", name).replace("<<.GroupBy>>", "pod")
    path = tmp_path / "rules.yml"
    queries = {"series": rule["seriesQuery"], "metrics": expr.replace("<<.LabelMatchers>>", "")}
    rules = [{"record": f"adapter:{name}", "expr": text} for name, text in queries.items()]
    path.write_text(yaml.safe_dump({"groups": [{"name": "adapter", "rules": rules}]}))
    assert "SUCCESS" in promtool("check", "rules", str(path))
