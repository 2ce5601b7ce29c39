"""Pruning runs on vLLM's batch-invariant kernels (`VLLM_BATCH_INVARIANT=1`): those of Triton, here in its interpreter.

On a GPU they take the place of torch's own. vLLM's CPU attention has no such mode, so a whole engine in it needs a GPU;
what can be shown here is that the method's tensor operations are among those that the kernels take, with equal results.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import warnings

import torch
from vllm.model_executor.determinism import batch_invariant

from vd_plugin.selection import apply, attention_received, select

torch.manual_seed(0)
queries, keys = torch.randn(8, 40, 32), torch.randn(2, 60, 32)
metric, tokens = torch.randn(40, 32), torch.randn(40, 64)


def prune(dtype):
    scores = attention_received(queries.to(dtype), keys.to(dtype))
    plan = select(scores, metric.to(dtype), 10, 4)
    return scores, plan, apply(plan, tokens.to(dtype))


stock = {dtype: prune(dtype) for dtype in (torch.float32, torch.bfloat16)}
warnings.simplefilter("ignore")  # torch's, about what is overridden
library = torch.library.Library("aten", "IMPL")
batch_invariant.enable_batch_invariant_mode()
calls = 0


def bmm(a, b):
    global calls
    calls += 1
    return batch_invariant.bmm_batch_invariant(a, b)


library.impl("aten::bmm", bmm, "CPU")
for dtype, (scores, plan, rows) in stock.items():
    ours = prune(dtype)
    assert (ours[0] - scores).abs().max() <= 1e-5
    assert all(torch.equal(one, other) for one, other in zip(ours[1], plan))
    assert (ours[2] - rows).abs().max() <= 1e-5
assert calls >= 6, "the kernels were not asked"
print("equal")
"""


@pytest.mark.slow
def test_pruning_runs_on_batch_invariant_kernels() -> None:
    """In a process of its own: the kernels stay in their places."""
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=200, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.endswith("equal\n")
