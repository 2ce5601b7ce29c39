"""deploy/kubernetes: every build is valid, and its objects fit each other, the gateway and the engine."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from manifests import (
    FOLDER,
    INSTALLATIONS,
    NAMESPACE,
    OVERLAYS,
    ROOT,
    Manifests,
    Object,
    container,
    environment,
    option,
    pod,
    pod_labels,
    ports,
    probe_seconds,
    probes,
    references,
)

from server.admission.keys import ApiKeys
from server.cli import _make_parser
from server.settings import Settings
from server.telemetry.metrics import Metrics

README = FOLDER / "README.md"
OLDEST, NEWEST = "1.30", "1.37"
each_installation = pytest.mark.parametrize("folder", INSTALLATIONS, ids=lambda path: path.name)


def assert_valid(item: Object, version: str) -> None:
    assert kubernetes_validate.validate(item, version, strict=True) == version


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@each_installation
def test_every_object_is_valid(folder: Path, version: str) -> None:
    objects = Manifests.of(folder).objects
    assert len(objects) >= 12
    for item in objects:
        assert_valid(item, version)


def test_unknown_fields_and_versions_too_old_are_found_out() -> None:
    gateway = Manifests.of(FOLDER / "base").one("Deployment", "gateway")
    with pytest.raises(kubernetes_validate.ValidationError, match="replica"):
        assert_valid({**gateway, "spec": {**gateway["spec"], "replica": 2}}, NEWEST)
    with pytest.raises(kubernetes_validate.ValidationError, match="sleep"):
        assert_valid(gateway, "1.28")


def test_readme_claims_the_versions_that_are_tested() -> None:
    assert f"Kubernetes {OLDEST} to {NEWEST}" in README.read_text()


@each_installation
def test_objects_are_in_the_namespace_and_are_unique(folder: Path) -> None:
    objects = Manifests.of(folder).objects
    assert len({(item["kind"], item["metadata"]["name"]) for item in objects}) == len(objects)
    assert {item["metadata"].get("namespace") for item in objects if item["kind"] != "Namespace"} == {NAMESPACE}
    assert not [item for item in objects if item["kind"] == "Secret"], "secrets are not committed"


@each_installation
def test_selectors_select_the_pods_that_they_are_named_after(folder: Path) -> None:
    built = Manifests.of(folder)
    for workload in built.workloads:
        assert built.selected(workload["spec"]["selector"]["matchLabels"]) == [workload]
        for spread in pod(workload)["topologySpreadConstraints"]:
            assert built.selected(spread["labelSelector"]["matchLabels"]) == [workload]
    for budget in built.all("PodDisruptionBudget"):
        (workload,) = built.selected(budget["spec"]["selector"]["matchLabels"])
        assert workload["metadata"]["name"] == budget["metadata"]["name"]
        assert budget["spec"]["maxUnavailable"] == 1
    assert len(built.all("PodDisruptionBudget")) == len(built.workloads) == 2


@each_installation
def test_ports_of_services_and_probes_exist(folder: Path) -> None:
    built = Manifests.of(folder)
    for service in built.all("Service"):
        (workload,) = built.selected(service["spec"]["selector"])
        for port in service["spec"]["ports"]:
            assert ports(workload)[port["targetPort"]] == port["port"], "the same number inside and outside"
    for workload in built.workloads:
        for probe in probes(workload):
            assert probe["httpGet"]["port"] in ports(workload)
            assert probe.get("timeoutSeconds", 1) <= probe["periodSeconds"]


@each_installation
def test_what_pods_need_exists_or_is_to_be_created_by_the_readme(folder: Path) -> None:
    built = Manifests.of(folder)
    for workload in built.workloads:
        for kind, name in references(workload):
            exists = any(item["metadata"]["name"] == name for item in built.all(kind))
            assert exists or f"create {kind.lower()} generic {name}" in README.read_text(), (kind, name)
        claims = workload["spec"].get("volumeClaimTemplates", [])
        volumes = {item["name"] for item in [*pod(workload)["volumes"], *(claim["metadata"] for claim in claims)]}
        assert volumes == {mount["name"] for mount in container(workload)["volumeMounts"]}


@each_installation
def test_pods_pass_the_restricted_standard(folder: Path) -> None:
    """kubernetes.io/docs/concepts/security/pod-security-standards, and more: a read-only root, no token."""
    built = Manifests.of(folder)
    labels = built.one("Namespace", NAMESPACE)["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    for workload in built.workloads:
        spec, security = pod(workload), pod(workload)["securityContext"]
        assert not spec.keys() & {"hostNetwork", "hostPID", "hostIPC", "hostUsers"}
        assert not security.keys() & {"seLinuxOptions", "sysctls", "windowsOptions", "appArmorProfile"}
        assert security["runAsNonRoot"] is True
        assert (security["runAsUser"], security["runAsGroup"], security["fsGroup"]) == (10001, 10001, 10001)
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        for volume in spec["volumes"]:
            assert volume.keys() <= {"name", "emptyDir", "secret"}, volume
            assert "sizeLimit" in volume.get("emptyDir", {"sizeLimit": ""})
        assert container(workload)["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert all(port.keys() == {"name", "containerPort"} for port in container(workload)["ports"])
        assert all(probe["httpGet"].keys() == {"path", "port"} for probe in probes(workload)), "no host"
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False, "variables of Services must not look like settings"


@each_installation
def test_images_are_this_release(folder: Path) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    built = Manifests.of(folder)
    images = [container(workload)["image"] for workload in built.workloads]
    engine = "visiondrop-engine-cpu" if folder.name == "cpu" else "visiondrop-engine"
    assert sorted(images) == sorted([f"visiondrop-gateway:{version}", f"{engine}:{version}"])


@each_installation
def test_gateway_is_started_with_what_it_knows(folder: Path) -> None:
    gateway = Manifests.of(folder).one("Deployment", "gateway")
    options = _make_parser(with_demo=False).parse_args(container(gateway)["args"])
    assert (options.command, options.host, options.port) == ("gateway", "0.0.0.0", ports(gateway)["http"])
    settings = settings_of(gateway)
    assert (settings.metrics_host, settings.metrics_port) == ("0.0.0.0", ports(gateway)["metrics"])
    keys = settings.api_keys_file
    (mount,) = (mount for mount in container(gateway)["volumeMounts"] if mount["name"] == "keys")
    (volume,) = (volume for volume in pod(gateway)["volumes"] if volume["name"] == "keys")
    assert keys == Path(mount["mountPath"]) / volume["secret"]["items"][0]["path"]
    assert "optional" not in volume["secret"], "without keys the gateway would be open"
    assert volume["secret"]["defaultMode"] & 0o007 == 0, "the gateway warns of a file that all can read"


def settings_of(gateway: Object) -> Settings:
    values = environment(gateway)
    assert all(name.startswith("VISIONDROP_") for name in values)
    given: dict[str, Any] = {name.removeprefix("VISIONDROP_").lower(): value for name, value in values.items()}
    assert given.keys() <= Settings.model_fields.keys()
    return Settings(**given)


@each_installation
def test_gateways_address_every_engine_by_its_pod_in_order(folder: Path) -> None:
    built = Manifests.of(folder)
    engine = built.one("StatefulSet", "engine")
    service = built.one("Service", engine["spec"]["serviceName"])
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True, "gateways judge by themselves"
    urls = [
        f"http://engine-{number}.{service['metadata']['name']}:{ports(engine)['http']}"
        for number in range(engine["spec"]["replicas"])
    ]
    assert option(built.one("Deployment", "gateway"), "--engine") == urls


@each_installation
def test_engine_is_started_for_gateways(folder: Path) -> None:
    engine = Manifests.of(folder).one("StatefulSet", "engine")
    model, *options = container(engine)["args"]
    assert not model.startswith("-")
    assert "--trust-request-mm-kwargs" in options
    assert option(engine, "--host") == ["0.0.0.0"]
    assert option(engine, "--port") == [str(ports(engine)["http"])]
    flags = [item.partition("=")[0] for item in options if item.startswith("--")]
    assert len(set(flags)) == len(flags)
    resources = container(engine)["resources"]
    gpus = [resources[kind].get("nvidia.com/gpu") for kind in ("requests", "limits")]
    expected = {"cpu": None, "tensor-parallel": "2"}.get(folder.name, "1")
    assert gpus == [expected, expected]
    assert option(engine, "--tensor-parallel-size") == (["2"] if expected == "2" else [])
    mounts = {mount["name"]: mount["mountPath"] for mount in container(engine)["volumeMounts"]}
    assert mounts == {"cache": "/cache", "shm": "/dev/shm", "tmp": "/tmp"}
    (shm,) = (volume for volume in pod(engine)["volumes"] if volume["name"] == "shm")
    assert shm["emptyDir"]["medium"] == "Memory"


@each_installation
def test_probes_wait_for_the_longest_start(folder: Path) -> None:
    built = Manifests.of(folder)
    gateway, engine = built.one("Deployment", "gateway"), built.one("StatefulSet", "engine")
    patience = settings_of(gateway).engine_start_timeout_seconds
    assert patience >= 1800
    assert probe_seconds(container(engine)["startupProbe"]) >= patience
    assert probe_seconds(container(gateway)["startupProbe"]) > patience, "the gateway gives up first, and says why"
    assert gateway["spec"]["progressDeadlineSeconds"] > probe_seconds(container(gateway)["startupProbe"])
    assert [probe["httpGet"]["path"] for probe in probes(gateway)] == ["/health", "/ready", "/health"]
    assert {probe["httpGet"]["path"] for probe in probes(engine)} == {"/health"}
    assert probe_seconds(container(engine)["livenessProbe"]) >= 300


@each_installation
def test_pods_have_time_to_drain(folder: Path) -> None:
    built = Manifests.of(folder)
    gateway, engine = built.one("Deployment", "gateway"), built.one("StatefulSet", "engine")
    drains = {
        "gateway": settings_of(gateway).shutdown_seconds,
        "engine": float(option(engine, "--shutdown-timeout")[0]),
    }
    for workload in (gateway, engine):
        hook = container(workload).get("lifecycle", {"preStop": {"sleep": {"seconds": 0}}})
        drain = drains[workload["metadata"]["name"]]
        assert drain >= 30
        assert pod(workload)["terminationGracePeriodSeconds"] >= hook["preStop"]["sleep"]["seconds"] + drain + 10
    assert "lifecycle" in container(gateway), "clients are told by endpoints, engines tell their gateways themselves"
    assert drains["engine"] >= drains["gateway"]
    assert engine["spec"]["minReadySeconds"] > settings_of(gateway).engine_probe_seconds + 3
    assert engine["spec"]["updateStrategy"] == {"type": "RollingUpdate"}, "one by one"
    assert engine["spec"]["podManagementPolicy"] == "Parallel"


@each_installation
def test_gateways_together_keep_the_limits_of_one(folder: Path) -> None:
    built = Manifests.of(folder)
    gateway = built.one("Deployment", "gateway")
    settings, whole = settings_of(gateway), Settings.model_fields["max_inflight_tokens"].default
    together = settings.max_inflight_tokens * built.max_replicas(gateway)
    assert together == (8 * 6144 if folder.name == "cpu" else whole)
    limit = container(gateway)["resources"]["limits"]["memory"]
    assert limit == "3Gi"
    decoding = settings.image_threads * 4 * settings.max_image_pixels  # RGBA
    assert 3 * settings.max_buffered_bytes + decoding + 200 * 2**20 <= 3 * 2**30


def test_autoscaler_scales_the_gateway_by_a_metric_that_exists() -> None:
    built = Manifests.of(FOLDER / "overlays" / "autoscaling")
    (scaler,) = built.all("HorizontalPodAutoscaler")
    target = scaler["spec"]["scaleTargetRef"]
    workload = built.one(target["kind"], target["name"])
    assert target["apiVersion"] == workload["apiVersion"]
    assert "replicas" not in workload["spec"], "two would set the number"
    queue, cpu = scaler["spec"]["metrics"]
    assert f"\n{queue['pods']['metric']['name']} " in Metrics().render().decode()
    assert cpu["resource"]["name"] in container(workload)["resources"]["requests"], "of which utilization is a share"
    budget = built.one("PodDisruptionBudget", "gateway")["spec"]["maxUnavailable"]
    assert scaler["spec"]["minReplicas"] > budget


def test_example_of_keys_is_refused_until_it_is_filled_in(tmp_path: Path) -> None:
    example = (FOLDER / "keys.example.toml").read_text()
    path = tmp_path / "keys.toml"
    for text, is_usable in ((example, False), (example.replace('"the 64 digits that', f'"{64 * "a"}" # "'), True)):
        path.write_text(text)
        path.chmod(0o600)
        if is_usable:
            assert ApiKeys.from_settings(Settings(api_keys_file=path)).names == ("first",)
        else:
            with pytest.raises(ValueError, match="first"):
                ApiKeys.from_settings(Settings(api_keys_file=path))


def test_readme_names_every_overlay_and_its_example_can_be_built(tmp_path: Path) -> None:
    text = README.read_text()
    for folder in OVERLAYS:
        assert f"overlays/{folder.name}" in text
    (example,) = re.findall(r"```yaml\n(# my-cluster/kustomization\.yaml.*?)```", text, re.DOTALL)
    (tmp_path / "keys.toml").write_text("")
    relative = os.path.relpath(FOLDER, tmp_path)
    (tmp_path / "kustomization.yaml").write_text(example.replace("../visiondrop/deploy/kubernetes", relative))
    built = Manifests.of(tmp_path)
    for item in built.objects:
        assert_valid(item, NEWEST)
    gateway = built.one("Deployment", "gateway")
    images = {container(workload)["image"].partition("/")[0] for workload in built.workloads}
    assert images == {"registry.example.com"}
    (secret,) = built.all("Secret")
    assert ("Secret", secret["metadata"]["name"]) in references(gateway)
    assert option(built.one("StatefulSet", "engine"), "--max-num-seqs") == ["51"]
    assert settings_of(gateway).max_inflight_tokens == 35871 // built.max_replicas(gateway)
    assert pod_labels(gateway) == gateway["spec"]["selector"]["matchLabels"]
