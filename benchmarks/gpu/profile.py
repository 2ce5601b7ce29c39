"""Steps that run a profiler beside an engine that is busy."""

from __future__ import annotations

import threading
from typing import Any, Final

import psutil

from benchmarks.gpu.context import Context
from benchmarks.gpu.programs import batch, run_program
from benchmarks.gpu.questions import ask_at_once
from benchmarks.gpu.server import Server, serve
from benchmarks.gpu.step import Skip, StepError, tell
from server.demo import make_tasks

_PROFILE_SECONDS: Final = 20


def profile_python(context: Context) -> None:
    """Where the engine's process spends the host's time, as a flame graph's stacks."""
    stacks = context.path("stacks")
    with serve(context.model, context.path("engine.log")) as server:
        (core,) = [each for each in psutil.Process(server.pid).children(recursive=True) if _is_core(each)]
        stop = threading.Event()
        load = threading.Thread(target=_load, args=(server, stop))
        load.start()
        try:
            seconds = str(_PROFILE_SECONDS)
            command = ["py-spy", "record", "-p", str(core.pid), "-d", seconds, "-f", "raw", "-o", str(stacks)]
            output = run_program(command, check=False)
        finally:
            stop.set()
            load.join()
    if not stacks.exists():
        if "permission" in output.lower():
            raise Skip("py-spy may not look into other processes here")
        raise StepError("py-spy has written no profile")
    tell(**shares_of_stacks(stacks.read_text()))


def profile_gpu(context: Context) -> None:
    """Kernels of a batch by their time: the tables are in the log."""
    tool = ["nsys", "profile", "--trace", "cuda,nvtx", "--cuda-graph-trace", "node", "--stats", "true"]
    run_program([*tool, "--output", str(context.path("nsys")), *batch(context, 20, 32)])


def _is_core(process: psutil.Process) -> bool:
    return any("EngineCore" in word for word in process.cmdline())


def _load(server: Server, stop: threading.Event) -> None:
    """Batches of requests until told to stop."""
    tasks = make_tasks(64)
    while not stop.is_set():
        size = min(16, len(tasks))
        ask_at_once(server, tasks[:size])
        tasks = tasks[size:] or make_tasks(64)


def shares_of_stacks(stacks: str) -> dict[str, Any]:
    """Shares of a profile's samples by what is on the stack: the plugin, the scheduler, the model."""
    counts = {"plugin": 0, "schedule": 0, "execute_model": 0}
    patterns = {"plugin": "vd_plugin/", "schedule": "schedule (", "execute_model": "execute_model ("}
    total = 0
    for line in stacks.splitlines():
        stack, _, count = line.rpartition(" ")
        total += int(count)
        for name, pattern in patterns.items():
            counts[name] += int(count) if pattern in stack else 0
    return {"samples": total, **{f"share_{name}": round(count / max(total, 1), 3) for name, count in counts.items()}}
