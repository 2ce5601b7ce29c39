"""What deploy/setup.sh finds out about a machine before it downloads anything."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = ("deploy/setup.sh", "deploy/steps.sh", "pyproject.toml", "vd_plugin/cpu/visiondrop_cpu.pth")
PAST_THE_CHECK = "PYTHON=no-such-python is not Python 3.11 to 3.12"
"""The sentence of the next check, with CUDA's newest Python."""


def set_up(folder: Path, driver: str, **environment: str) -> str:
    """What the set-up of a machine with a GPU and this driver says before it fails."""
    for file in (*FILES, *(f"requirements/{backend}.txt" for backend in ("cpu", "cuda"))):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, folder / file)
    tool = folder / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\n[ "$1" = -L ] && echo "GPU 0: a GPU" || printf "%s\\n" "{driver}" "{driver}"\n')
    tool.chmod(0o755)
    clean = {name: value for name, value in os.environ.items() if name != "VISIONDROP_BACKEND"}
    path = f"{tool.parent}:{os.environ['PATH']}"
    ran = subprocess.run(
        [folder / "deploy/setup.sh"],
        env={**clean, "PATH": path, "PYTHON": "no-such-python", **environment},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert ran.returncode == 1
    assert not (folder / ".venv").exists()
    return ran.stderr


@pytest.mark.parametrize("driver", ["550.54.15", "570.211.01", "99.9"])
def test_a_driver_that_is_too_old_is_named(tmp_path: Path, driver: str) -> None:
    said = set_up(tmp_path, driver)
    assert said.startswith(
        f"visiondrop set-up: the NVIDIA driver is {driver}, but the CUDA packages need 580 or newer."
    )
    assert said.count("\n") == 1


@pytest.mark.parametrize("driver", ["580.65.06", "1000.1", "[N/A]"])
def test_another_driver_is_accepted(tmp_path: Path, driver: str) -> None:
    assert PAST_THE_CHECK in set_up(tmp_path, driver)


def test_the_driver_does_not_matter_where_packages_are_selected(tmp_path: Path) -> None:
    assert PAST_THE_CHECK in set_up(tmp_path, "550.54.15", VISIONDROP_BACKEND="cuda")


def test_the_lock_is_of_the_cuda_that_the_driver_is_checked_for() -> None:
    """CUDA 13 needs driver 580; another one needs another."""
    assert "\nnvidia-cuda-runtime==13." in (ROOT / "requirements/cuda.txt").read_text()
