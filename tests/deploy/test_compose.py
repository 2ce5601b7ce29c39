"""docker-compose.yml and .env.example: the schema of compose files, and what a deployment relies on.

tests/images starts the profile `cpu` for real.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from dockerfile import stages

from server import cli
from server.settings import Settings

ROOT = Path(__file__).parents[2]
PATH = ROOT / "docker-compose.yml"
TEXT = PATH.read_text()
COMPOSE = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
EXAMPLE = (ROOT / ".env.example").read_text()
ENGINES = ("engine", "engine-1", "engine-cpu")
OURS = ("gateway", *ENGINES)
each_service = pytest.mark.parametrize("name", SERVICES)

FIXED = {"VISIONDROP_METRICS_HOST", "VISIONDROP_METRICS_PORT"}
"""Settings that the other services rely on."""


def defaults() -> dict[str, str | None]:
    """Variable -> its default in docker-compose.yml; None if it has none."""
    found = dict.fromkeys(re.findall(r"\$\{(\w+):\?", TEXT))
    for name, default in re.findall(r"\$\{(\w+):-([^}]*)\}", TEXT):
        assert found.setdefault(name, default) == default, f"{name} has two defaults"
    passed_on = {
        name for service in SERVICES.values() for name, value in service.get("environment", {}).items() if value is None
    }
    return found | dict.fromkeys(passed_on)


def examples() -> dict[str, str]:
    """Variable -> what .env.example says about it, commented or not."""
    return dict(re.findall(r"^#?([A-Z][A-Z0-9_]+)=(.*)$", EXAMPLE, flags=re.MULTILINE))


def interpolate(text: str) -> str:
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def seconds(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([sm])", interpolate(text)).groups()
    return int(number) * (60 if unit == "m" else 1)


def test_file_fits_the_compose_specification() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(PATH)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_setting_of_the_gateway_can_be_set() -> None:
    passed_on = {name for name in SERVICES["gateway"]["environment"] if name.startswith("VISIONDROP_")}
    assert passed_on == {f"VISIONDROP_{name.upper()}" for name in Settings.model_fields}
    assert {name: value for name, value in SERVICES["gateway"]["environment"].items() if name in FIXED} == {
        "VISIONDROP_METRICS_HOST": "0.0.0.0",
        "VISIONDROP_METRICS_PORT": "9100",
    }


def test_example_lists_every_variable_and_no_other() -> None:
    assert set(examples()) == {"COMPOSE_PROFILES", *defaults()}


@pytest.mark.parametrize("name", sorted(defaults()))
def test_example_shows_the_default(name: str) -> None:
    """Where there is none, the line shows what a value looks like."""
    shown, field = examples()[name], name.removeprefix("VISIONDROP_").lower()
    if default := defaults()[name]:
        assert shown == default
    elif name.startswith("VISIONDROP_") and shown:
        value = getattr(Settings(**{field: shown}), field)
        depends_on_machine = name == "VISIONDROP_IMAGE_THREADS"
        assert depends_on_machine or value == Settings.model_fields[field].default or name == "VISIONDROP_API_KEYS_FILE"
    elif name.startswith("VISIONDROP_"):
        assert Settings.model_fields[field].default in (None, ())


def test_only_what_has_no_default_stands_uncommented() -> None:
    uncommented = dict(re.findall(r"^([A-Z][A-Z0-9_]+)=(.*)$", EXAMPLE, flags=re.MULTILINE))
    assert uncommented == {"COMPOSE_PROFILES": "gpu", "GRAFANA_ADMIN_PASSWORD": ""}
    assert "${GRAFANA_ADMIN_PASSWORD:?" in TEXT, "an empty password must stop the start"


def test_profiles_choose_the_engine() -> None:
    assert {name: service.get("profiles") for name, service in SERVICES.items() if "profiles" in service} == {
        "engine": ["gpu"],
        "engine-1": ["gpu2"],
        "engine-cpu": ["cpu"],
    }
    assert SERVICES["engine-cpu"]["networks"] == {"inference": {"aliases": ["engine"]}}, "the gateway knows one name"


def test_gateway_and_grafana_alone_publish_a_port_and_on_loopback() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(published) == {"gateway", "grafana"}
    for ports in published.values():
        (port,) = ports
        assert interpolate(port).startswith("127.0.0.1:")


def test_engine_is_reached_by_the_gateway_alone() -> None:
    for name in ENGINES:
        neighbours = {
            other for other, service in SERVICES.items() if set(service["networks"]) & set(SERVICES[name]["networks"])
        }
        assert neighbours - set(ENGINES) == {"gateway"}
        assert "--trust-request-mm-kwargs" in (SERVICES[name].get("command") or stages()[name].last["CMD"])


def test_engine_has_gpus_shared_memory_and_pinned_memory() -> None:
    engine = SERVICES["engine"]
    (device,) = engine["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], interpolate(device["count"]), device["capabilities"]) == ("nvidia", "1", ["gpu"])
    assert interpolate(engine["shm_size"]) == "8gb"
    assert engine["ulimits"]["memlock"] == -1
    assert engine["volumes"] == ["model-cache:/cache"]


@each_service
def test_service_is_confined(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "network_mode", "pid", "ipc"} & set(service)
    assert set(service["deploy"]["resources"]["limits"]) == {"memory", "pids"}


@each_service
def test_service_restarts_and_its_log_is_bounded(name: str) -> None:
    assert SERVICES[name]["restart"] == "unless-stopped"
    assert set(SERVICES[name]["logging"]["options"]) == {"max-size", "max-file"}


@each_service
def test_health_is_checked(name: str) -> None:
    assert ("healthcheck" in SERVICES[name]) != (name in OURS), "ours have it in their images"


@each_service
def test_images_have_exact_tags_and_no_platform(name: str) -> None:
    image = interpolate(SERVICES[name]["image"])
    assert re.search(r":v?\d+\.\d+\.\d+$", image), image
    assert "platform" not in SERVICES[name]


@each_service
def test_state_is_in_named_volumes_and_configuration_in_the_repository(name: str) -> None:
    for volume in SERVICES[name].get("volumes", []):
        source, _, rest = interpolate(volume).partition(":")
        if source.startswith("."):
            assert (ROOT / source).exists()
            assert rest.endswith(":ro")
        else:
            assert source in COMPOSE["volumes"]
            assert not rest.endswith(":ro")


def test_no_path_depends_on_who_runs_it() -> None:
    assert "~" not in TEXT
    assert "$HOME" not in TEXT


def test_services_start_when_what_they_need_is_healthy() -> None:
    # Which engine there is depends on the profile.
    needed = {"condition": "service_healthy", "required": False}
    assert SERVICES["gateway"]["depends_on"] == dict.fromkeys(("engine", "engine-cpu"), needed), (
        "one is enough to begin"
    )
    assert SERVICES["engine-1"]["depends_on"] == {"engine": {"condition": "service_healthy"}}
    assert SERVICES["grafana"]["depends_on"] == {"prometheus": {"condition": "service_healthy"}}


def test_stopping_takes_longer_than_draining() -> None:
    drain = Settings.model_fields["shutdown_seconds"].default
    assert seconds(SERVICES["gateway"]["stop_grace_period"]) >= drain + 10
    for name in ENGINES:
        command = SERVICES[name].get("command") or shlex.join(stages()[name].last["CMD"])
        timeout = re.search(r"--shutdown-timeout (\d+)", command)
        assert timeout
        assert seconds(SERVICES[name]["stop_grace_period"]) >= 2 * int(timeout[1]) + 30, "vd_plugin/drain.py"


def test_memory_of_the_gateway_fits_its_buffers() -> None:
    """docs/operations.md: the process needs two to three times as much."""
    (gib,) = re.fullmatch(
        r"(\d+)gb", interpolate(SERVICES["gateway"]["deploy"]["resources"]["limits"]["memory"])
    ).groups()
    assert int(gib) * 2**30 >= 3 * Settings.model_fields["max_buffered_bytes"].default


def test_gateway_is_started_with_arguments_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISIONDROP_ENGINES", interpolate(SERVICES["gateway"]["environment"]["VISIONDROP_ENGINES"]))
    arguments = shlex.split(interpolate(SERVICES["gateway"]["command"]))
    options = cli._make_parser(with_demo=False).parse_args(arguments)
    assert (options.host, options.port) == ("0.0.0.0", 8000)
    assert Settings().engines == ("http://engine:8000",), "the one that every profile has"
    assert interpolate(SERVICES["gateway"]["ports"][0]).endswith(f":{options.port}")


def test_prometheus_finds_the_gateway() -> None:
    config = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    (job,) = (job for job in config["scrape_configs"] if job["job_name"] == "visiondrop-gateway")
    port = SERVICES["gateway"]["environment"]["VISIONDROP_METRICS_PORT"]
    assert job["static_configs"] == [{"targets": [f"gateway:{port}"]}]
    assert set(SERVICES["prometheus"]["networks"]) & set(SERVICES["gateway"]["networks"])
    assert COMPOSE["networks"]["monitoring"] == {"internal": True}


def test_grafana_finds_prometheus_and_the_dashboards() -> None:
    folder = ROOT / "deploy" / "grafana" / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((folder / "dashboards" / "visiondrop.yml").read_text())["providers"]
    mounts = dict(volume.split(":")[:2] for volume in SERVICES["grafana"]["volumes"])
    assert mounts["./deploy/grafana/dashboards"] == provider["options"]["path"]
    assert mounts["./deploy/grafana/provisioning"] == "/etc/grafana/provisioning"
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (ROOT / "deploy" / "grafana" / "dashboards" / Path(home).name).exists()


def test_secrets_cannot_be_committed_by_mistake() -> None:
    for path in (".env", "deploy/keys/keys.toml"):
        done = subprocess.run(["git", "check-ignore", "--quiet", path], cwd=ROOT, check=False)
        assert done.returncode == 0, path
