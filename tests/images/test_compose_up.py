"""docker-compose.yml with the profile `cpu`, brought up for real: its networks, volumes, limits and users.

With podman: podman-compose, and a loop in place of the systemd timers that run health checks. Where Prometheus' image
cannot be had, Debian's package stands in for it; where Grafana's cannot, Grafana is left out, and that is printed.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any
from urllib.parse import quote

import openai
import pytest
import yaml
from containers import ROOT, TAG, Container, build, call, inspect, require
from dockerfile import stages
from engines import draw
from served import ask, free_port

pytestmark = [pytest.mark.images, pytest.mark.slow]

FILE = ROOT / "docker-compose.yml"
PROJECT = "visiondrop-test"
STAND_IN = f"visiondrop-prometheus-stand-in:{TAG}"


def has(name: str) -> bool:
    """Whether an image is here, or can be pulled."""
    if subprocess.run([require(), "image", "inspect", name], capture_output=True, check=False).returncode == 0:
        return True
    return subprocess.run([require(), "pull", name], capture_output=True, check=False, timeout=600).returncode == 0


def third_party(name: str) -> str:
    found = re.search(rf"\$\{{{name}:-([^}}]+)\}}", FILE.read_text())
    assert found
    return found[1]


@dataclass(frozen=True, slots=True)
class Project:
    """The services that were started."""

    command: tuple[str, ...]
    environment: dict[str, str]
    services: tuple[str, ...]
    port: int

    def compose(self, *arguments: str) -> None:
        done = subprocess.run(
            [*self.command, *arguments], cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{arguments}: {done.stdout[-3000:]}{done.stderr[-3000:]}"

    def container(self, service: str) -> Container:
        label = "label=com.docker.compose.service="
        names = call("ps", "--all", "--filter", f"{label}{service}", "--filter",
                     f"label=com.docker.compose.project={PROJECT}", "--format", "{{.Names}}")  # fmt: skip
        return Container(names)

    def fetch(self, service: str, url: str) -> str:
        """What a service gets from a URL."""
        code = f"import urllib.request as u; print(u.urlopen({url!r}, timeout=5).read().decode())"
        command = ("wget", "-q", "-O", "-", "-T", "5", url) if service == "prometheus" else ("python3", "-c", code)
        done = self.container(service).run(*command)
        if done.returncode:
            raise ConnectionError(done.stderr)
        return done.stdout

    def query(self, expr: str) -> list[dict[str, Any]]:
        """The result of an instant query of Prometheus."""
        answer = self.fetch("prometheus", f"http://127.0.0.1:9090/api/v1/query?query={quote(expr)}")
        result = json.loads(answer)["data"]["result"]
        assert isinstance(result, list)
        return result


@contextmanager
def health_timers() -> Iterator[None]:
    """Podman runs health checks by systemd timers: without systemd, this loop runs them."""
    over = Event()

    def check() -> None:
        while not over.wait(2):
            for name in call("ps", "--filter", f"label=com.docker.compose.project={PROJECT}", "--format", "{{.Names}}",
                             check=False).split():  # fmt: skip
                subprocess.run([require(), "healthcheck", "run", name], capture_output=True, check=False)

    thread = Thread(target=check, daemon=True)
    thread.start()
    yield
    over.set()
    thread.join()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    program = require()
    build("gateway", "engine-cpu")
    prometheus, services = third_party("PROMETHEUS_IMAGE"), ["engine-cpu", "gateway", "prometheus"]
    if not has(prometheus):
        print(f"{prometheus} cannot be pulled: {STAND_IN} stands in for it")
        prometheus, base = STAND_IN, stages()["gateway"].base
        more = os.environ.get("VISIONDROP_BUILD_OPTIONS", "").split()
        file, folder = str(Path(__file__).with_name("prometheus.Dockerfile")), str(Path(__file__).parent)
        call("build", *more, "--file", file, "--build-arg", f"PYTHON_IMAGE={base}", "--tag", STAND_IN, folder)
    if has(third_party("GRAFANA_IMAGE")):
        services.append("grafana")
    else:
        print(f"{third_party('GRAFANA_IMAGE')} cannot be pulled: Grafana is left out")
    port = free_port()
    env_file = tmp_path_factory.mktemp("compose") / ".env"
    settings = {
        "GRAFANA_ADMIN_PASSWORD": "of-this-test",
        "GATEWAY_PORT": port,
        "GRAFANA_PORT": free_port(),
        "IMAGE_TAG": TAG,
        "PROMETHEUS_IMAGE": prometheus,
        "VISIONDROP_API_KEY": "of-this-test",
    }
    env_file.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    podman_compose = shutil.which("podman-compose", path=str(Path(sys.executable).parent))
    compose = (program, "compose") if program == "docker" else (str(podman_compose), "--in-pod", "false")
    files = ["--file", str(FILE)]
    if program == "podman" and (limits := clamped_limits()):
        print(f"limits of this machine in place of the file's: {limits}")
        clamped = env_file.with_name("limits.yml")
        clamped.write_text(yaml.safe_dump({"services": limits}))
        files += ["--file", str(clamped)]
    command = (*compose, *files, "--env-file", str(env_file), "--project-name", PROJECT, "--profile", "cpu")
    started = Project(command, {**os.environ}, tuple(services), port)
    with ExitStack() as stack:
        if program == "podman":
            stack.enter_context(health_timers())
        stack.callback(started.compose, "down", "--volumes")
        started.compose("up", "--detach", "--no-build", *services)
        started.container("gateway").wait_ready("http://127.0.0.1:9100/ready")
        yield started


def clamped_limits() -> dict[str, dict[str, dict[str, int]]]:
    """Service -> its ulimits, where this machine does not let us raise them so far.

    Podman raises the number of processes, too, unless that is given.
    """
    found: dict[str, dict[str, dict[str, int]]] = {}
    for service, settings in yaml.safe_load(FILE.read_text())["services"].items():
        if "ulimits" not in settings:
            continue
        wanted = settings["ulimits"]
        hard = {name: resource.getrlimit(getattr(resource, f"RLIMIT_{name.upper()}"))[1] for name in wanted}
        too_high = {name for name in wanted if hard[name] != -1 and not 0 <= wanted[name] <= hard[name]}
        if too_high:
            found[service] = {"ulimits": {**wanted, **{name: hard[name] for name in too_high}, "nproc": 4096}}
    return found


def ask_with_budget(project: Project, budget: str) -> Any:
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{project.port}/v1", api_key="of-this-test", max_retries=0)
    model = client.models.list().data[0].id
    return ask(client, model, draw(672, 672), extra_body={"visual_token_budget": budget})


def test_image_question_is_answered_on_the_published_port(project: Project) -> None:
    assert ask_with_budget(project, "low").usage.visual_tokens["kept"] == 160


def test_settings_of_the_env_file_reach_the_gateway(project: Project) -> None:
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{project.port}/v1", api_key="a guess", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_engine_is_reached_by_the_gateway_and_by_nobody_else(project: Project) -> None:
    assert project.fetch("gateway", "http://engine:8000/version").startswith('{"version":')
    (network,) = inspect("container", project.container("engine-cpu").name)["NetworkSettings"]["Networks"].values()
    for url in ("http://engine:8000/version", f"http://{network['IPAddress']}:8000/version"):
        with pytest.raises(ConnectionError):
            project.fetch("prometheus", url)
    bindings = inspect("container", project.container("engine-cpu").name)["HostConfig"]["PortBindings"]
    assert not any(bindings.values()), "published nowhere"


def test_monitoring_reaches_nothing_outside(project: Project) -> None:
    def destinations(service: str) -> set[str]:
        lines = project.container(service).run("cat", "/proc/net/route").stdout.splitlines()[1:]
        return {line.split()[1] for line in lines}

    everywhere = "00000000"
    assert destinations("prometheus"), "a route to its own network"
    assert everywhere not in destinations("prometheus")
    assert everywhere in destinations("gateway"), "which fetches images"
    networks = inspect("container", project.container("prometheus").name)["NetworkSettings"]["Networks"]
    assert list(networks) == [f"{PROJECT}_monitoring"]
    assert inspect("network", f"{PROJECT}_monitoring").get(
        "Internal", inspect("network", f"{PROJECT}_monitoring").get("internal")
    )


def test_prometheus_scrapes_gateway_and_engine_and_has_the_rules(project: Project) -> None:
    for budget in ("low", "medium"):
        ask_with_budget(project, budget)
    wanted = {"visiondrop-gateway": "1", "visiondrop-engine": "1", "prometheus": "1"}
    deadline = time.monotonic() + 90  # scrapes are 15 s apart, and engines are discovered every 30 s
    while time.monotonic() < deadline:
        up = {series["metric"]["job"]: series["value"][1] for series in project.query("up")}
        images = {s["metric"]["budget_class"]: float(s["value"][1]) for s in project.query("visiondrop_images_total")}
        if up == wanted and images.get("medium", 0) >= 1:
            break
        time.sleep(1)
    assert up == wanted
    assert images["medium"] >= 1
    (engine,) = project.query("vllm:num_requests_running")
    assert engine["metric"]["instance"] == "engine-0"
    rules = json.loads(project.fetch("prometheus", "http://127.0.0.1:9090/api/v1/rules"))["data"]["groups"]
    files = {path.name for path in (ROOT / "deploy" / "prometheus" / "rules").glob("*.yml")}
    assert {Path(group["file"]).name for group in rules} == files
    assert {rule["health"] for group in rules for rule in group["rules"]} <= {"ok", "unknown"}


@pytest.mark.parametrize("service", ["engine-cpu", "gateway", "prometheus"])
def test_container_is_as_confined_as_the_file_says(project: Project, service: str) -> None:
    host = inspect("container", project.container(service).name)["HostConfig"]
    assert host["ReadonlyRootfs"] is True
    limits = yaml.safe_load(FILE.read_text())["services"][service]["deploy"]["resources"]["limits"]
    assert host["PidsLimit"] == limits["pids"]
    assert host["Memory"] > 0
    capabilities = project.container(service).run("grep", "CapEff", "/proc/1/status").stdout.split()
    assert capabilities[1] == "0000000000000000"
    user = project.container(service).run("id", "-u").stdout.strip()
    assert user == ("65534" if service == "prometheus" else "10001")


def test_grafana_shows_the_dashboards(project: Project) -> None:
    if "grafana" not in project.services:
        pytest.skip(f"{third_party('GRAFANA_IMAGE')} cannot be pulled here")
    container = project.container("grafana")
    url = "http://admin:of-this-test@127.0.0.1:3000/api"
    found = json.loads(container.run("wget", "-q", "-O", "-", f"{url}/search?query=VisionDrop").stdout)
    assert len([entry for entry in found if entry["type"] == "dash-db"]) == 3
    source = json.loads(
        container.run("wget", "-q", "-O", "-", f"{url}/datasources/uid/visiondrop-prometheus/health").stdout
    )
    assert source["status"] == "OK"


def test_stop_drains_and_ends_with_status_0(project: Project) -> None:
    """Last: it stops all. Gateway first, so that its clients are answered."""
    for service in ("gateway", "engine-cpu"):
        project.compose("stop", service)
        state = inspect("container", project.container(service).name)["State"]
        assert (state["Status"], state["ExitCode"]) == ("exited", 0), project.container(service).logs()[-2000:]
