"""Driver of the interpreter's backend. It reports where tensors live; the interpreter runs the kernels itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from vd_plugin.cpu.interpreter import is_in_use


class InterpreterDriver(DriverBase):  # triton ships no types
    @staticmethod
    def is_active() -> bool:
        """Only where the interpreter is requested: a GPU machine must see its own driver alone."""
        return is_in_use()

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("the cpu backend interprets kernels, it does not compile them")

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cpu", 0, 1)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0

    def get_benchmarker(self) -> Callable[..., Sequence[float]]:
        return _benchmark


def _benchmark(kernel_call: Callable[[], Any], *, quantiles: list[float], **_: Any) -> Sequence[float]:
    """Wall-clock milliseconds of one call, for every quantile: enough to let autotuned kernels start."""
    start = time.perf_counter()
    kernel_call()
    elapsed = (time.perf_counter() - start) * 1e3
    return [elapsed] * len(quantiles)
