"""What the Prometheus Operator makes of a ServiceMonitor, and what Prometheus' own relabelling makes of the targets."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from manifests import Manifests, Object, container, pod_labels

Target = dict[str, str]


def promtool(*arguments: str) -> str:
    if shutil.which("promtool") is None:
        pytest.skip("promtool, which comes with Prometheus, is not installed")
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def targets_of(monitor: Object, installation: Manifests, folder: Path, *, replicas: Mapping[str, int]) -> list[Target]:
    """The labels of each target, `__address__` and `__metrics_path__` included.

    Args:
        folder: for the scrape configuration.
        replicas: pods of each workload that run, by its name.
    """
    (endpoint,) = monitor["spec"]["endpoints"]
    job = {
        "job_name": f"serviceMonitor/{monitor['metadata']['namespace']}/{monitor['metadata']['name']}/0",
        "static_configs": [
            {"targets": [labels.pop("__address__")], "labels": labels}
            for labels in _discovered(installation, monitor["metadata"]["namespace"], replicas)
        ],
        "relabel_configs": [*_of_operator(monitor, endpoint), *map(_relabelling, endpoint["relabelings"])],
    }
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump({"scrape_configs": [job]}))
    found = json.loads(promtool("check", "service-discovery", "--timeout=1s", str(path), job["job_name"]))
    return [item["labels"] for item in found if item.get("labels")]


def _discovered(installation: Manifests, namespace: str, replicas: Mapping[str, int]) -> list[Target]:
    """As kubernetes_sd_configs with `role: endpoints` finds them: every port of every pod behind every Service."""
    found = []
    for service in installation.all("Service"):
        (workload,) = installation.selected(service["spec"]["selector"])
        name = workload["metadata"]["name"]
        for number in range(replicas[name]):
            pod = f"{name}-{number}" if workload["kind"] == "StatefulSet" else f"{name}-5d4f8c-{number:05}"
            for port in container(workload)["ports"]:
                target = {
                    "__address__": f"10.244.{len(name)}.{number}:{port['containerPort']}",
                    "__meta_kubernetes_namespace": namespace,
                    "__meta_kubernetes_service_name": service["metadata"]["name"],
                    "__meta_kubernetes_pod_name": pod,
                    "__meta_kubernetes_pod_container_name": container(workload)["name"],
                    "__meta_kubernetes_pod_phase": "Running",
                    "__meta_kubernetes_endpoint_address_target_kind": "Pod",
                    "__meta_kubernetes_endpoint_address_target_name": pod,
                }
                if port["name"] in {item["targetPort"] for item in service["spec"]["ports"]}:
                    target["__meta_kubernetes_endpoint_port_name"] = port["name"]
                for kind, labels in (("service", service["metadata"]["labels"]), ("pod", pod_labels(workload))):
                    for key, value in labels.items():
                        target[f"__meta_kubernetes_{kind}_label_{_escaped(key)}"] = value
                        target[f"__meta_kubernetes_{kind}_labelpresent_{_escaped(key)}"] = "true"
                found.append(target)
    return found


def _of_operator(monitor: Object, endpoint: Object) -> list[dict[str, Any]]:
    """What the operator puts before an endpoint's own (pkg/prometheus/promcfg.go, generateServiceMonitorConfig)."""
    keep = [
        {
            "action": "keep",
            "source_labels": [
                f"__meta_kubernetes_service_{kind}_{_escaped(key)}" for kind in ("label", "labelpresent")
            ],
            "regex": f"({re.escape(value)});true",
        }
        for key, value in monitor["spec"]["selector"]["matchLabels"].items()
    ]
    port = {
        "action": "keep",
        "source_labels": ["__meta_kubernetes_endpoint_port_name"],
        "regex": re.escape(endpoint["port"]),
    }
    sources = {
        "namespace": "namespace",
        "service": "service_name",
        "pod": "pod_name",
        "container": "pod_container_name",
        "job": "service_name",
    }
    copied = [
        {"source_labels": [f"__meta_kubernetes_{source}"], "target_label": label} for label, source in sources.items()
    ]
    return [*keep, port, *copied, {"target_label": "endpoint", "replacement": endpoint["port"]}]


def _relabelling(item: Mapping[str, Any]) -> dict[str, Any]:
    """From the operator's spelling to Prometheus'."""
    return {re.sub(r"[A-Z]", lambda found: "_" + found.group().lower(), key): value for key, value in item.items()}


def _escaped(key: str) -> str:
    return re.sub(r"[^a-zA-Z0-9_]", "_", key)


def instances(targets: Sequence[Target]) -> list[tuple[str, str]]:
    """(job, instance), sorted."""
    return sorted((target["job"], target["instance"]) for target in targets)
