"""What an engine would run with on an H100, an A100 and an L40: vLLM's own configuration on another platform."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")
import cuda_configurations
from cuda_configurations import GPUS

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.cpu]

COMPILED = {"mode": "VLLM_COMPILE", "graphs": "FULL_AND_PIECEWISE", "largest_graph": 512}
"""By default: stages are compiled, decode steps are full graphs and all others graphs of pieces."""
EAGER = {"mode": "NONE", "graphs": "FULL_DECODE_ONLY", "largest_graph": 512}
"""With `compile` set to false: decode steps are full graphs, all others run layer by layer."""
BARE = {"mode": "NONE", "graphs": "NONE", "largest_graph": 0}

ALWAYS = {
    "asynchronous": True,
    "scheduler": "vd_plugin.scheduler.VisionDropScheduler",
    "block_size": 16,
    "runner": "second",
    "worker": "vllm.v1.worker.gpu_worker.Worker",
}
BY_GPU: dict[str, dict[str, Any]] = {
    "H100": {"num_seqs": 1024, "batched_tokens": 8192, "attention": "FLASH_ATTN 3"},
    "A100": {"num_seqs": 256, "batched_tokens": 2928 + 256, "attention": "FLASH_ATTN 2"},
    "L40": {"num_seqs": 256, "batched_tokens": 2928 + 256, "attention": "FLASH_ATTN 2"},
}
"""vLLM's defaults for the server; of batched tokens at least the largest image beside every decode."""


@dataclass(frozen=True)
class Case:
    arguments: dict[str, Any]
    differs: dict[str, Any] = field(default_factory=dict)
    """From the GPU's defaults, with compiled stages."""
    refused: str = ""


WITHOUT = {"visiondrop": {"compile": False}}
CASES: dict[str, Case] = {
    "defaults": Case({}),
    "-O0": Case({"optimization_level": 0}, BARE),
    "-O1": Case({"optimization_level": 1}, {"graphs": "PIECEWISE"}),
    "-O2": Case({"optimization_level": 2}),
    "-O3": Case({"optimization_level": 3}),
    "eager": Case({"enforce_eager": True}, BARE),
    "not compiled": Case(WITHOUT, EAGER),
    "not compiled, -O0": Case({**WITHOUT, "optimization_level": 0}, BARE),
    "not compiled, -O3": Case({**WITHOUT, "optimization_level": 3}, EAGER),
    "not compiled, but asked for": Case(
        {**WITHOUT, "compilation_config": {"mode": 3}}, refused="set visiondrop.compile to true"
    ),
    "mode NONE": Case({"compilation_config": {"mode": 0}}, EAGER),
    "mode STOCK_TORCH_COMPILE": Case(
        {"compilation_config": {"mode": 1}}, refused="leave compilation_config.mode unset"
    ),
    "graphs NONE": Case({"compilation_config": {"cudagraph_mode": "NONE"}}, {"graphs": "NONE", "largest_graph": 0}),
    "graphs PIECEWISE": Case({"compilation_config": {"cudagraph_mode": "PIECEWISE"}}, {"graphs": "PIECEWISE"}),
    "graphs FULL_DECODE_ONLY": Case(
        {"compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY"}}, {"graphs": "FULL_DECODE_ONLY"}
    ),
    "graphs FULL": Case({"compilation_config": {"cudagraph_mode": "FULL"}}, refused="leave cudagraph_mode unset"),
    "encoder alone": Case(
        {"visiondrop": {"layers": []}, "max_num_batched_tokens": 4096}, {"scheduler": "None", "batched_tokens": 4096}
    ),
    "synchronous": Case({"async_scheduling": False}, {"asynchronous": False}),
    "asynchronous": Case({"async_scheduling": True}),
    "offloaded blocks": Case({"kv_offloading_size": 1.0}, refused="kv_offloading_size unset"),
    "float32": Case({"dtype": "float32"}, {"attention": "TRITON_ATTN"}),
    "bfloat16": Case({"dtype": "bfloat16"}),
    "float16": Case({"dtype": "float16"}),
    "back end TRITON_ATTN": Case({"attention_backend": "TRITON_ATTN"}, {"attention": "TRITON_ATTN"}),
    "back end FLASH_ATTN": Case({"attention_backend": "FLASH_ATTN"}),
    "FlashAttention 2": Case({"attention_config": {"flash_attn_version": 2}}, {"attention": "FLASH_ATTN 2"}),
    "many seats, small steps": Case(
        {"max_num_seqs": 400, "max_num_batched_tokens": 1024}, {"num_seqs": 400, "batched_tokens": 2928 + 400}
    ),
    "few seats, large steps": Case(
        {"max_num_seqs": 16, "max_num_batched_tokens": 9000},
        {"num_seqs": 16, "batched_tokens": 9000, "largest_graph": 32},
    ),
    "large blocks": Case({"block_size": 128}, {"block_size": 128}),
}


@pytest.fixture(scope="module")
def described(random_model: Path) -> dict[str, dict[str, Any]]:
    """All cases on all GPUs, from one process."""
    asked = {
        f"{gpu}, {name}": {"gpu": gpu, "arguments": {"dtype": "bfloat16", **case.arguments}}
        for gpu in GPUS
        for name, case in CASES.items()
    }
    script = Path(cuda_configurations.__file__)
    ran = subprocess.run(
        [sys.executable, script, random_model],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(script.parent), os.environ.get("PYTHONPATH", "")])},
        input=json.dumps(list(asked.values())),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return dict(zip(asked, json.loads(ran.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("gpu", GPUS)
def test_an_engine_runs_with(described: dict[str, dict[str, Any]], gpu: str, name: str) -> None:
    case, found = CASES[name], described[f"{gpu}, {name}"]
    if case.refused:
        assert case.refused in found["refused"]
        return
    assert found == {**ALWAYS, **COMPILED, **BY_GPU[gpu], **case.differs}
