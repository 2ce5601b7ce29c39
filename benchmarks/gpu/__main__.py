"""`make gpu`, or `python -m benchmarks.gpu`: every step, its outcome, a table, and one line of JSON last."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any, Final, NoReturn

from benchmarks.gpu.hour import Hour
from benchmarks.gpu.machine import find_gpus
from benchmarks.gpu.plan import CHECKS, make_steps
from benchmarks.gpu.processes import adopt_orphans
from vd_plugin.demo import find_model
from vd_plugin.model_config import read_model_config

ENVIRONMENT: Final = {
    "PYTHONUNBUFFERED": "1",  # the log of a step that is killed has its last words
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Of all steps, where not set."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="What to find out first on a machine with an NVIDIA GPU. Without, steps that need none run.",
    )
    parser.add_argument("--list", action="store_true", help="show the steps, and do nothing")
    parser.add_argument(
        "--only", action="append", default=[], metavar="STEP,STEP", help="these steps alone; may be given several times"
    )
    parser.add_argument(
        "--model",
        help="a folder with a LLaVA checkpoint, or its name on the hub (default: the demo model; steps named 7b or "
        "bench always use the shape of LLaVA-NeXT-7B with random weights)",
    )
    parser.add_argument(
        "--budget-minutes",
        type=_minutes,
        metavar="N",
        help="stop starting steps, and end the last one, after N minutes",
    )
    parser.add_argument("--folder", type=Path, default=Path(".gpu"), help="for logs and results (default: %(default)s)")
    options = parser.parse_args(argv)
    if options.list:
        width = max(len(check.name) for check in CHECKS)
        print("\n".join(f"{check.name:<{width}}  {check.about}" for check in CHECKS))
        return 0
    names = [name.strip() for given in options.only for name in given.split(",")]
    try:
        model = str(find_model()) if options.model is None else options.model
        if Path(model).exists() or model.startswith(("/", ".", "~")):
            read_model_config(Path(model))  # now, and not in every step
        gpus = find_gpus()
        steps = make_steps(model, options.folder.absolute(), len(gpus), names)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    os.environ["PATH"] = os.pathsep.join((os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)))
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, _interrupt)
    adopt_orphans()
    budget = None if options.budget_minutes is None else 60 * options.budget_minutes
    about: dict[str, Any] = {"model": model}
    return Hour(steps, options.folder.absolute(), gpus, budget, about).run()


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not minutes > 0:
        raise argparse.ArgumentTypeError("it must be a number above 0")
    return minutes


if __name__ == "__main__":
    sys.exit(main())
