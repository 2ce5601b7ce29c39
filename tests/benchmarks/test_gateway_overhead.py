"""The measurement of the gateway's own cost goes on working with the gateway as it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_kind_of_request_passes_the_gateway() -> None:
    command = [sys.executable, "benchmarks/gateway_overhead.py", "--requests", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = {row["request"]: row for row in json.loads(done.stdout.splitlines()[-1])["rows"]}
    assert set(rows) == {"text", "100 KB JPEG", "2 MB JPEG", "2 MB PNG"}
    assert rows["text"]["check_seconds"] < rows["2 MB PNG"]["check_seconds"] < rows["2 MB PNG"]["cpu_seconds"]
    assert all(row["through_seconds"] > row["direct_seconds"] > 0 for row in rows.values())
