"""A program: `make gpu` with made-up steps. `python gpu_hour.py STEPS.json [options of benchmarks.gpu]`.

STEPS.json has a list of `[name, program, limit in seconds]`; each program is Python, and gets the step's name as its
first argument.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import benchmarks.gpu.__main__ as gpu
from benchmarks.gpu import hour, processes
from benchmarks.gpu.step import Step

processes._GRACE_SECONDS = 1.0
hour.LEAST_SECONDS = 1.0


def main(steps_path: str, *options: str) -> int:
    steps = [
        Step(name, "made up", (sys.executable, "-c", program, name), limit)
        for name, program, limit in json.loads(Path(steps_path).read_text())
    ]
    gpu.make_steps = lambda *_: steps
    return gpu.main(list(options))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
