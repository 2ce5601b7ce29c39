"""A `python` that runs engine_process.py where `python -m vd_plugin.engine MODE` is asked for.

The environment variable VISIONDROP_TEST_ARGUMENTS names a file: then the engine is not run, but its arguments are
written there, one a line.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

ENGINE = Path(__file__).with_name("engine_process.py")
ROOT = Path(__file__).parents[2]


def write(folder: Path) -> Path:
    """A program in `folder`, for scripts that let PYTHON choose theirs."""
    program = folder / "python"
    python, engine = shlex.quote(sys.executable), shlex.quote(str(ENGINE))
    program.write_text(f"""#!/bin/sh
if [ "$1 $2" = "-m vd_plugin.engine" ]; then
  shift 2
  if [ -n "$VISIONDROP_TEST_ARGUMENTS" ]; then printf '%s\\n' "$@" >"$VISIONDROP_TEST_ARGUMENTS"; exit; fi
  PYTHONPATH={shlex.quote(str(ROOT))} exec {python} {engine} "$@"
fi
exec {python} "$@"
""")
    program.chmod(0o755)
    return program
