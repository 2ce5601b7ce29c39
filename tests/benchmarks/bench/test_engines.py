"""The parts that measure engines run end to end on the random checkpoint, on engines in processes of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.bench import __main__ as bench

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def test_the_prefill_part_runs_on_the_random_checkpoint(
    random_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(random_model), "--dtype", "float32", "--rounds", "1", "--out", str(tmp_path)]
    assert bench.main([*arguments, "--only", "prefill"]) == 0
    data = json.loads(capsys.readouterr().out.splitlines()[-1])
    samples = data["results"]["prefill"]["samples"]
    unpruned = {"pruning stock", "pruning full"}
    assert all(len(seconds) == 1 and (seconds[0] > 0) != (name in unpruned) for name, seconds in samples.items())
    assert {"stock", "full", "640", "320", "160", "limit 320", "text stock", "text visiondrop"} <= set(samples)
    assert data["results"]["prefill"]["kept"] == {"full": 2928, "640": 640, "320": 320, "160": 160}
    assert samples["limit 320"][0] == pytest.approx(samples["limit decoder 320"][0] + samples["limit encoder 320"][0])
    assert len(data["marks"]) == 8
