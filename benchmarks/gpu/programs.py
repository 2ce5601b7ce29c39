"""Steps that run a program of this repository, or a tool on one of them, and read its output."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from benchmarks.bench.figures import ratios
from benchmarks.gpu.context import Context
from benchmarks.gpu.step import Skip, StepError, tell

LAWS: Final = tuple(
    f"vd_plugin/engine/test_{name}.py"
    for name in ("stage_parity", "stage_laws", "kv_memory", "cache_isolation", "stage_chunks", "stage_lifecycle")
)
"""Tests of the plugin against a reference and against itself, most telling first."""


def laws_float32(context: Context) -> None:
    """On a GPU that is vLLM's Triton back end: FlashAttention takes 16 bits alone. On a CPU the first file; `make test`
    runs all."""
    run_tests(*(LAWS if context.num_gpus else LAWS[:1]), VISIONDROP_TEST_DTYPE="float32")


def laws_bfloat16(context: Context) -> None:
    """FlashAttention, CUDA graphs, and what vLLM compiles."""
    run_tests(*LAWS, VISIONDROP_TEST_DTYPE="bfloat16", VISIONDROP_TEST_EAGER="0")


def memcheck(context: Context) -> None:
    """Every access of every kernel, in a batch of one request at each budget.

    Each tensor is an allocation of its own, so that what is beside it belongs to nobody.

    Raises:
        StepError: one was out of bounds, or the tool did not get to its summary.
    """
    tool = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
    output = run_program([*tool, *batch(context, 5, 4), "--eager"], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    if not re.search(r"ERROR SUMMARY: 0 errors", output):
        raise StepError("compute-sanitizer has no summary without errors")


def decode(context: Context) -> None:
    """Steps of the model itself, which on a GPU is so small that the host's Python decides; on a CPU a few."""
    _bench(context, "decode", "--model", context.model, *([] if context.num_gpus else ["--rounds", "1"]))


def bench(part: str) -> Callable[[Context], None]:
    """A part of `make bench` on the shape of LLaVA-NeXT-7B with random weights, stock beside ours."""
    return lambda context: _bench(context, part, "--shape", "7b")


def _bench(context: Context, part: str, *options: str) -> None:
    """Tells the marks, and ratios of decode steps. Whether marks are met is a matter of the machine, and no failure."""
    command = [sys.executable, "-m", "benchmarks.bench", "--only", part, "--out", str(context.path("parts")), *options]
    report = _last_json(run_program(command))
    tell(**{mark["name"]: round(mark["value"], 3) for mark in report["marks"]})
    for case, budgets in report["results"].get("decode", {}).items():
        for budget, samples in budgets.items():
            ratio = ratios(samples["ours"]["seconds"], samples["stock"]["seconds"])
            tell(**{f"step of {case} at {budget}, ours / stock": round(ratio.median, 3)})


def batch(context: Context, num_requests: int, num_tokens: int) -> list[str]:
    """The command of batch.py."""
    return [sys.executable, "-m", "benchmarks.gpu.batch", context.model, str(num_requests), str(num_tokens)]


def run_tests(*files: str, **environment: str) -> None:
    """Run files of tests, and tell the counts.

    Args:
        environment: variables of the tests.

    Raises:
        StepError: a test failed, or none passed.
        Skip: pytest is not installed.
    """
    if find_spec("pytest") is None:
        raise Skip("pytest is not installed")
    paths = [f"tests/{file}" for file in files]
    output = run_program([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *paths], environment, check=False)
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|error|skipped)", output[-2000:])}
    tell(**counts)
    if counts.get("failed") or counts.get("error"):
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
        raise StepError(f"{len(failed)} tests failed: {', '.join(name.partition('::')[2] for name in failed[:5])}")
    if not counts.get("passed"):
        raise StepError("pytest ran no test to its end")


def run_program(command: Sequence[str], environment: Mapping[str, str] | None = None, *, check: bool = True) -> str:
    """Run a program; its output goes to the step's log as it comes.

    Returns:
        That output.

    Raises:
        StepError: it failed.
    """
    lines = []
    with subprocess.Popen(
        command,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if check and process.returncode:
        raise StepError(f"{Path(command[0]).name} ended with status {process.returncode}")
    return "".join(lines)


def _last_json(output: str) -> dict[str, Any]:
    lines = [line for line in output.splitlines() if line.startswith("{")]
    if not lines:
        raise StepError("no line of JSON in the output")
    result: dict[str, Any] = json.loads(lines[-1])
    return result
