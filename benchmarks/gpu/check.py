"""One step: `python -m benchmarks.gpu.check STEP --model MODEL --folder FOLDER [--gpus N]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.gpu.context import Context
from benchmarks.gpu.plan import CHECKS
from benchmarks.gpu.step import SKIPPED_STATUS, Skip, StepError, tell_reason


def main() -> int:
    checks = {check.name: check for check in CHECKS}
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.check", description="One step of make gpu.")
    parser.add_argument("step", choices=checks)
    parser.add_argument("--model", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--gpus", type=int, default=0)
    options = parser.parse_args()
    try:
        checks[options.step].function(Context(options.step, options.model, options.folder, options.gpus))
    except Skip as reason:
        tell_reason(reason)
        return SKIPPED_STATUS
    except StepError as error:
        tell_reason(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
