"""FlashAttention's metadata for every stage, on a machine without its kernels.

vLLM's builders for FlashAttention 3 build beside those of the CPU, from the same description of a step. A recorder
stands for the kernel that plans a step; what it was asked is compared with the rows that each stage holds.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import engines
import pytest
import torch
from engines import Engine, draw, request
from graph_replay import replayed
from staged import LAYERS, Stepper, checkpoint, greedy, words
from torch import Tensor
from vllm.config import set_current_vllm_config
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder

from vd_plugin.spans import dropped_before, read_spans

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.cpu]

MAX_MODEL_LEN = 640
LARGEST_GRAPH = 4
ASKED = [
    request(f"{words(20, 1)} <image> {words(10, 2)}", [draw(336, 336)], visual_token_budget=64),
    request(words(60, 4)),
    request(f"<image> {words(20, 3)}", [draw(336, 336, seed=1)], visual_token_budget=48),
]


@dataclass(frozen=True)
class Built:
    stage: int
    for_capture: bool
    metadata: Any
    planned: dict[str, Any]
    """What the kernel that plans was asked."""
    seq_lens: list[int]
    """By request, as they were then."""


class Beside:
    """A group's builder of the CPU, and one of FlashAttention that gets the same."""

    def __init__(self, stock: Any, flash: Any, planned: list[dict[str, Any]], built: list[Built]) -> None:
        self.stock, self.flash, self.planned, self.built = stock, flash, planned, built

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stock, name)

    def build(self, common_prefix_len: int, common: Any, **others: Any) -> Any:
        self._add(self.flash.build(common_prefix_len, common), for_capture=False)
        return self.stock.build(common_prefix_len, common, **others)

    def build_for_cudagraph_capture(self, common: Any) -> Any:
        self._add(self.flash.build_for_cudagraph_capture(common), for_capture=True)
        return self.stock.build_for_cudagraph_capture(common)

    def _add(self, metadata: Any, for_capture: bool) -> None:
        stage = self.flash.kv_cache_spec.stage
        self.built.append(Built(stage, for_capture, metadata, self.planned[-1], metadata.seq_lens.tolist()))


@pytest.fixture(scope="module")
def engine(llava15: Path) -> Engine:
    return engines.start(checkpoint("llava15_gqa8", llava15), layers=LAYERS, block_size=32, max_model_len=MAX_MODEL_LEN)


@pytest.fixture
def built(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[Built]:
    """What FlashAttention's builders make meanwhile."""
    runner = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner
    config = copy.copy(runner.vllm_config)
    config.compilation_config = copy.copy(config.compilation_config)
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
    config.compilation_config.max_cudagraph_capture_size = LARGEST_GRAPH
    planned: list[dict[str, Any]] = []

    def plan(**asked: Any) -> Tensor:
        """As large as the kernel's answer."""
        planned.append(asked)
        return torch.full((1 + -(-asked["batch_size"] // 4) * 4,), len(planned), dtype=torch.int32)

    monkeypatch.setattr(flash_attn, "get_flash_attn_version", lambda **_: 3)
    monkeypatch.setattr(flash_attn, "get_scheduler_metadata", plan, raising=False)
    made: list[Built] = []
    with set_current_vllm_config(config):
        for (group,) in runner.attn_groups:
            (stock,) = group.metadata_builders
            flash = FlashAttentionMetadataBuilder(group.kv_cache_spec, group.layer_names, config, runner.device)
            assert flash.aot_schedule
            monkeypatch.setattr(group, "metadata_builders", [Beside(stock, flash, planned, made)])
    return made


def rows(stepper: Stepper, stage: int) -> list[int]:
    """Of every running request that decodes, at a stage, with the token of the coming step."""
    found = []
    for each in stepper.scheduler.running:
        count = each.num_computed_tokens + 1
        found.append(count - dropped_before(read_spans(each.mm_features), stage, count))
    return sorted(found)


def test_each_stage_has_a_builder_and_a_buffer_of_its_own(engine: Engine, built: list[Built]) -> None:
    with replayed(engine, [1, 2, LARGEST_GRAPH]):
        engine.generate(*ASKED)
    buffers: dict[int, set[int]] = {}
    for each in built:
        if each.for_capture or each.metadata.num_actual_tokens <= LARGEST_GRAPH:
            buffers.setdefault(each.stage, set()).add(each.metadata.scheduler_metadata.data_ptr())
    assert sorted(buffers) == [0, 1, 2, 3]
    assert all(len(places) == 1 for places in buffers.values()), "a graph would read a plan that is not its step's"
    assert len(set.union(*buffers.values())) == 4, "one stage would read the plan of another"


def test_graphs_are_captured_for_the_longest_sequence(engine: Engine, built: list[Built]) -> None:
    with replayed(engine, [1, 2, LARGEST_GRAPH]):
        captured = [each for each in built if each.for_capture]
        engine.generate(ASKED[1], num_tokens=2)
    assert {each.metadata.num_actual_tokens for each in captured} == {1, 2, LARGEST_GRAPH}
    for each in captured:
        assert each.planned["max_seqlen_k"] == each.metadata.max_seq_len == MAX_MODEL_LEN
        assert each.planned["max_seqlen_q"] == 1
        assert each.planned["num_splits"] > 0, "a bound for the buffers between splits"


def test_a_step_is_planned_for_the_rows_of_its_stage(engine: Engine, built: list[Built]) -> None:
    """Three requests in a graph of four rows: the fourth has no keys."""
    stepper = Stepper(engine)
    engine.forget()
    with replayed(engine, [1, 2, LARGEST_GRAPH]) as replays:
        for number, asked in enumerate(ASKED):
            stepper.add(str(number), asked, greedy(6))
        stepper.run(lambda: all(stepper.num_tokens(str(number)) for number in range(len(ASKED))))
        for _ in range(3):
            expected = [rows(stepper, stage) for stage in range(4)]
            assert expected[0][1:] != expected[3][1:]
            built.clear()
            stepper.step()
            assert replays.sizes[-1] == (3, LARGEST_GRAPH)
            assert [each.stage for each in built] == [0, 1, 2, 3]
            for each in built:
                assert sorted(each.seq_lens) == [0, *expected[each.stage]]
                assert each.planned["cache_seqlens"].data_ptr() == each.metadata.seq_lens.data_ptr()
                assert each.planned["max_seqlen_k"] == max(expected[each.stage])
                assert each.planned["batch_size"] == LARGEST_GRAPH
                assert each.planned["page_size"] == 32
        stepper.abort_all()
        stepper.run()
