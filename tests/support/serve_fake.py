"""`visiondrop serve` with engine_process.py as its engine: `python serve_fake.py MODE [OPTIONS]`."""

from __future__ import annotations

import sys
from pathlib import Path

from server import cli
from server.launcher import serve
from server.launcher.supervisor import Backoff

ENGINE = Path(__file__).with_name("engine_process.py")

if __name__ == "__main__":
    mode, *options = sys.argv[1:]
    cli.engine_command = lambda model, engine_options: [sys.executable, str(ENGINE), model, *engine_options]
    serve.BACKOFF = Backoff(first_seconds=0.1, longest_seconds=0.4, reset_seconds=60.0)
    sys.exit(cli.main(["serve", mode, "--port", "0", *options]))
