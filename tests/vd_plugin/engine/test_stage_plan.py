"""`visiondrop plan` against the live engine: its blocks, the sentence that it logs, and the weights that it holds."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import engines
import pytest
import torch
from engines import Engine
from staged import LAYERS, Stepper
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

from vd_plugin import model_state
from vd_plugin.tools import plan as tool

pytestmark = [pytest.mark.engine, pytest.mark.slow]


# The first is the one that test_stage_parity leaves behind.
@pytest.fixture(scope="module", params=["llava15", "random_model"])
def started(request: pytest.FixtureRequest) -> tuple[Path, Engine]:
    folder = request.getfixturevalue(request.param)
    return folder, engines.start(folder, layers=LAYERS)


@pytest.fixture
def planned(started: tuple[Path, Engine], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    same = ("block_size", "dtype", "max_model_len", "max_num_seqs")
    engine = {name.replace("_", "-"): engines.FAST[name] for name in same}
    options = {**engine, "kv-memory": engines.FAST["kv_cache_memory_bytes"] / 2**30, "layers": "2,4,6"}
    status = tool.main([str(started[0]), "--json", *(f"--{name}={value}" for name, value in options.items())])
    assert status == 0
    planned: dict[str, Any] = json.loads(capsys.readouterr().out)
    return planned


def runner_of(engine: Engine) -> Any:
    return engine.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def test_blocks_are_those_of_the_engine(started: tuple[Path, Engine], planned: dict[str, Any]) -> None:
    stepper = Stepper(started[1])
    assert stepper.pool.num_gpu_blocks == planned["capacity"]["num_blocks"]
    assert stepper.free_blocks == planned["capacity"]["usable_blocks"]
    groups = [[manager.kv_cache_spec.stage, manager.kv_cache_spec.block_size] for manager in stepper.managers]
    assert groups == planned["capacity"]["groups"]
    cache = started[1].llm.llm_engine.vllm_config.cache_config
    assert cache.kv_cache_size_tokens == planned["kv_cache_tokens"]
    assert cache.kv_cache_max_concurrency == planned["max_concurrency"]


def test_the_sentence_is_the_one_that_the_engine_logs(
    started: tuple[Path, Engine], planned: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[str] = []
    monkeypatch.setattr(model_state.logger, "info_once", logged.append)
    runner = runner_of(started[1])
    runner.model_state._log_capacity(runner.kv_cache_config)
    assert logged == [planned["log"]]
    assert f"the KV cache of {planned['capacity']['num_blocks']} blocks holds images of " in planned["log"]


def test_weights_are_those_of_the_engines_model(started: tuple[Path, Engine], planned: dict[str, Any]) -> None:
    """Built once more, on no device: on a CPU, vLLM packs the weights of the live model into another form."""
    config = copy.deepcopy(started[1].llm.llm_engine.vllm_config)
    config.compilation_config.static_forward_context.clear()
    with set_current_vllm_config(config), set_default_torch_dtype(getattr(torch, engines.DTYPE)), torch.device("meta"):
        model = initialize_model(vllm_config=config)
    held = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert planned["memory"]["weights"] == held
