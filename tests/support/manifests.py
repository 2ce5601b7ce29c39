"""What kustomize makes of deploy/kubernetes, and how its objects refer to each other."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
OVERLAYS = sorted(path.parent for path in FOLDER.glob("overlays/*/kustomization.yaml"))
INSTALLATIONS = [FOLDER / "base", *OVERLAYS]
"""What can be applied: one of them, and monitoring beside it."""

NAMESPACE = "visiondrop"
_WORKLOADS = ("Deployment", "StatefulSet")

Object = dict[str, Any]


@cache
def _kubectl() -> str | None:
    beside = Path(sys.executable).parent / "kubectl"
    return str(beside) if beside.is_file() else shutil.which("kubectl")


@cache
def _build(folder: Path) -> str:
    kubectl = _kubectl()
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, f"a warning, for example of something deprecated: {done.stderr}"
    return done.stdout


@dataclass(frozen=True, slots=True)
class Manifests:
    """The objects of one build."""

    objects: list[Object]

    @classmethod
    def of(cls, folder: Path) -> Manifests:
        return cls([item for item in yaml.load_all(_build(folder), yaml.CSafeLoader) if item])

    def __add__(self, other: Manifests) -> Manifests:
        return Manifests(self.objects + other.objects)

    def all(self, *kinds: str) -> list[Object]:
        return [item for item in self.objects if item["kind"] in kinds]

    def one(self, kind: str, name: str) -> Object:
        (found,) = (item for item in self.all(kind) if item["metadata"]["name"] == name)
        return found

    @property
    def workloads(self) -> list[Object]:
        return self.all(*_WORKLOADS)

    def selected(self, labels: Mapping[str, str]) -> list[Object]:
        """Workloads whose pods have these labels."""
        return [item for item in self.workloads if labels.items() <= pod_labels(item).items()]

    def max_replicas(self, workload: Object) -> int:
        """With the autoscaler's limit, if it has one."""
        for scaler in self.all("HorizontalPodAutoscaler"):
            target = scaler["spec"]["scaleTargetRef"]
            if (target["kind"], target["name"]) == (workload["kind"], workload["metadata"]["name"]):
                return int(scaler["spec"]["maxReplicas"])
        return int(workload["spec"]["replicas"])


def pod(workload: Object) -> Object:
    spec: Object = workload["spec"]["template"]["spec"]
    return spec


def pod_labels(workload: Object) -> dict[str, str]:
    labels: dict[str, str] = workload["spec"]["template"]["metadata"]["labels"]
    return labels


def container(workload: Object) -> Object:
    """Its only one."""
    found: Object
    (found,) = pod(workload)["containers"]
    assert "initContainers" not in pod(workload)
    return found


def ports(workload: Object) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in container(workload)["ports"]}


def environment(workload: Object) -> dict[str, str]:
    """Variables with a value in the manifest."""
    return {item["name"]: item["value"] for item in container(workload)["env"] if "value" in item}


def option(workload: Object, name: str) -> list[str]:
    """The values of an option on the container's command line."""
    arguments = container(workload)["args"]
    return [value for flag, value in pairwise(arguments) if flag == name]


def probes(workload: Object) -> list[Object]:
    """Startup, readiness, liveness."""
    return [container(workload)[f"{name}Probe"] for name in ("startup", "readiness", "liveness")]


def probe_seconds(probe: Object) -> int:
    """How long a probe may fail before something happens."""
    return int(probe.get("initialDelaySeconds", 0)) + int(probe["periodSeconds"]) * int(probe["failureThreshold"])


def references(workload: Object) -> Iterator[tuple[str, str]]:
    """(kind, name) of the Secrets, ConfigMaps and claims that the pods need."""
    for volume in pod(workload)["volumes"]:
        if "secret" in volume:
            yield "Secret", volume["secret"]["secretName"]
        elif "configMap" in volume:
            yield "ConfigMap", volume["configMap"]["name"]
        elif "persistentVolumeClaim" in volume:
            yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]
    for item in container(workload).get("env", []):
        for key, kind in (("secretKeyRef", "Secret"), ("configMapKeyRef", "ConfigMap")):
            if key in item.get("valueFrom", {}):
                yield kind, item["valueFrom"][key]["name"]
    for item in container(workload).get("envFrom", []):
        for key, kind in (("secretRef", "Secret"), ("configMapRef", "ConfigMap")):
            if key in item:
                yield kind, item[key]["name"]
