"""Every shell script is free of what shellcheck knows, and those for users explain themselves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "deploy" / "cluster"
SCRIPTS = [*sorted(ROOT.glob("deploy/**/*.sh")), *sorted(ROOT.glob("tests/clients/**/*.sh")), ROOT / ".ci" / "run"]
COMMANDS = sorted(path for path in CLUSTER.glob("*.sh") if path.name != "say.sh")


def run(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([script, *arguments], capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shellcheck_finds_nothing(script: Path) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    found = subprocess.run([shellcheck, script], capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("script", COMMANDS, ids=lambda path: path.name)
def test_help_is_the_header_and_no_arguments_are_one_sentence(script: Path) -> None:
    assert "\nset -euo pipefail\n" in script.read_text()
    told = run(script, "--help")
    assert told.returncode == 0
    assert f"  {script.name} " in told.stdout
    assert "PYTHON=" in told.stdout
    assert "set -e" not in told.stdout
    refused = run(script)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith(f"visiondrop: error: usage: {script.name} ")
    assert refused.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("engines.sh none model", "N is the number of engines, 1 or more; got 'none'"),
        ("engines.sh 2 model --uds=x", "engine option --uds: set by this script"),
        ("engines.sh 2 model --tensor-parallel-size 2", "engine option --tensor-parallel-size: set GPUS_PER_ENGINE"),
        ("node.sh 2 2 head model", "RANK is a number from 0 to 1; got '2'"),
        ("node.sh 0 1 head model", "NODES is the number of machines, 2 or more; got '1'"),
        ("node.sh 0 2 head model", "name the number of all GPUs together: --tensor-parallel-size GPUS"),
        ("node.sh 0 2 head model -tp 3", "--tensor-parallel-size is a multiple of the number of nodes, 2; got '3'"),
        ("node.sh 0 2 head model -tp 2 -pp 2", "engine option -pp: VisionDrop does not support pipeline parallelism"),
        ("ray_head.sh model --enforce-eager x", "name the number of all GPUs together: --tensor-parallel-size GPUS"),
    ],
)
def test_wrong_usage_is_one_sentence(command: str, sentence: str) -> None:
    name, *arguments = command.split()
    refused = run(CLUSTER / name, *arguments)
    assert (refused.returncode, refused.stderr) == (2, f"visiondrop: error: {sentence}\n")


def test_an_environment_without_visiondrop_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setenv("PYTHON", str(python))
    for command in (
        "engines.sh 2 model",
        "node.sh 0 2 head model -tp 2",
        "ray_head.sh model -tp 2",
        "ray_worker.sh head",
    ):
        name, *arguments = command.split()
        refused = run(CLUSTER / name, *arguments)
        assert refused.returncode == 2
        assert refused.stderr.startswith(f"visiondrop: error: {python} has no VisionDrop")
