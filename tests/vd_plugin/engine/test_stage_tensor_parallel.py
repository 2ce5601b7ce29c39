"""Two ranks, each with half of the heads, keep the same tokens and give the same answers as one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import engines
import pytest
import torch
from decoder_checkpoint import with_decoder
from staged import SAME
from tensor_parallel_answers import NUM_TOKENS, REQUESTS, answer, options
from torch.testing import assert_close

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.cpu]

SUPPORT = Path(engines.__file__).parent


@pytest.mark.parametrize("kv_heads", [6, 2])
def test_two_ranks_answer_as_one(random_model: Path, tmp_path: Path, kv_heads: int) -> None:
    """All key heads, and grouped-query attention: there a rank has one key head of two.

    On the random checkpoint: towers of the recorded ones have three heads, which two ranks cannot share.
    """
    text = {"model_type": "llama", "num_key_value_heads": kv_heads}
    folder = with_decoder(random_model, tmp_path / "checkpoint", text)
    engines.stop()
    output = tmp_path / "answers.json"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(SUPPORT.parents[1]), str(SUPPORT), os.environ.get("PYTHONPATH", "")]),
        "VLLM_CPU_OMP_THREADS_BIND": "0|1" if (os.cpu_count() or 1) > 1 else "nobind",
    }
    program = [sys.executable, str(SUPPORT / "tensor_parallel_answers.py"), str(folder), "2", str(output)]
    run = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    two = json.loads(output.read_text())
    one = answer(engines.start(folder, **options(1)))
    assert two["token_ids"] == one["token_ids"]
    assert len(two["token_ids"]) == len(REQUESTS)
    for ours, theirs in zip(two["logprobs"], one["logprobs"], strict=True):
        assert len(ours) == NUM_TOKENS
        assert_close(torch.tensor(ours), torch.tensor(theirs), atol=SAME, rtol=0)
