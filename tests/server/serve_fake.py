"""`visiondrop serve` with fake_engine.py as its engine: `python serve_fake.py MODE PORT [LOG]`."""

from __future__ import annotations

import sys
from pathlib import Path

from server import cli

FAKE_ENGINE = Path(__file__).with_name("fake_engine.py")

if __name__ == "__main__":
    mode, port, *log = sys.argv[1:]
    cli.engine_command = lambda model, options: [sys.executable, str(FAKE_ENGINE), model, *options]
    sys.exit(cli.main(["serve", mode, "--port", port, *(["--engine-log", log[0]] if log else [])]))
