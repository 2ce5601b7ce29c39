"""All steps, those that tell most first. The time limits are several times what is expected."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.gpu import half_precision, little_memory, machine, profile, programs, serving
from benchmarks.gpu.context import Context
from benchmarks.gpu.step import Step


@dataclass(frozen=True, slots=True)
class Check:
    """A step before it is known what to work on."""

    name: str
    about: str
    function: Callable[[Context], None]
    limit_minutes: float
    num_gpus: int = 0
    tool: str | None = None


CHECKS: Final = (
    Check("machine", "GPU, driver, tools and packages", machine.machine, 2),
    Check("eager", "a server without graphs, where a hidden wait for the GPU is an error", serving.eager, 6),
    Check("defaults", "a server with vLLM's defaults; answers as in eager", serving.defaults, 8),
    Check("burst", "many requests at once", serving.burst, 6),
    Check("bench-prefill", "7B shape, first token of stock and ours", programs.bench("prefill"), 10, 1),
    Check("compiled", "stages compiled and not: answers, first tokens in turns", serving.compiled, 10),
    Check("bench-decode", "7B shape, a decode step of stock and ours", programs.bench("decode"), 10, 1),
    Check("laws-float32", "tests of the stages on the Triton back end", programs.laws_float32, 12),
    Check("laws-bfloat16", "the same with FlashAttention and graphs", programs.laws_bfloat16, 12, 1),
    Check("bare-path", "a start and a sampled answer with PATH=/usr/bin:/bin", serving.bare_path, 6),
    Check("compiled-7b", "7B shape, stages compiled and not: first tokens", serving.compiled_7b, 10, 1),
    Check("bench-throughput", "7B shape, little KV cache: requests per second", programs.bench("throughput"), 10, 1),
    Check("decode", "a decode step of stock and ours on the model itself", programs.decode, 6),
    Check("triton", "the attention back end TRITON_ATTN; answers as in eager", serving.triton, 6, 1),
    Check("flashinfer", "the attention back end FLASHINFER", serving.flashinfer, 10, 1),
    Check("flash-attention-2", "FlashAttention 2, as A100 and L40 run", serving.flash_attention_2, 6, 1),
    Check("half-precision", "patches kept in bfloat16 and in float32", half_precision.half_precision, 6),
    Check("little-memory", "preemption under load; answers as alone", little_memory.little_memory, 6),
    Check("tensor-parallel", "two GPUs; answers and plans as on one", serving.tensor_parallel, 10, 2),
    Check("memcheck", "every memory access of a few steps", programs.memcheck, 10, 1, "compute-sanitizer"),
    Check("profile-python", "where the engine's Python spends its time", profile.profile_python, 5, 0, "py-spy"),
    Check("profile-gpu", "kernels by their time", profile.profile_gpu, 8, 1, "nsys"),
)


def make_steps(model: str, folder: Path, num_gpus: int, names: Sequence[str] = ()) -> list[Step]:
    """The steps of these names, or all, in the order of the plan.

    Raises:
        ValueError: there is no step of that name.
    """
    known = [check.name for check in CHECKS]
    for name in names:
        if name not in known:
            raise ValueError(f"there is no step {name!r}; --list shows them")
    return [_step(check, model, folder, num_gpus) for check in CHECKS if not names or check.name in names]


def _step(check: Check, model: str, folder: Path, num_gpus: int) -> Step:
    options = ["--model", model, "--folder", str(folder), "--gpus", str(num_gpus)]
    command = (sys.executable, "-m", "benchmarks.gpu.check", check.name, *options)
    return Step(check.name, check.about, command, check.limit_minutes * 60, check.num_gpus, check.tool)
