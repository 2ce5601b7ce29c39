"""Rows that requests have lost reach the device once a step at most, and never while a step in flight reads them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu import buffer_utils

from vd_plugin import model_state
from vd_plugin.model_state import StagedModelState
from vd_plugin.row_layout import StageBuffers
from vd_plugin.schedule import TokenSplit
from vd_plugin.spans import ImageSpan

pytestmark = pytest.mark.engine

SPAN = ImageSpan(3, (20, 12, 6), (TokenSplit(10, 2), TokenSplit(4, 2)))
MAX_REQS, MAX_TOKENS = 4, 64


class State(StagedModelState):
    """Two stages, without an engine around it; remembers what each layout has read."""

    def __init__(self) -> None:
        self.num_stages, self.device = 2, torch.device("cpu")
        self.rope_state = self.prompt_embeds_state = None
        self.drops = buffer_utils.UvaBackedTensor((2, MAX_REQS), dtype=torch.int32, max_concurrency=2)
        self.drops_changed = False
        self.positions = torch.zeros(2, MAX_TOKENS, dtype=torch.int64)
        self.seq_lens = torch.zeros(2, MAX_REQS, dtype=torch.int32)
        self.buffers = StageBuffers(self.positions, self.seq_lens)
        self.stage_groups = [[0], [1], [2]]
        self.model = SimpleNamespace(entry_groups=[1, 2])
        self.pending, self.known = {}, set()
        self.read: list[torch.Tensor] = []
        self.lay_out_rows = lambda rows, drops, buffers, slots: self.read.append(drops)

    def add(self, slot: int, req_id: str, *spans: ImageSpan, computed: int = 0) -> None:
        self.add_request(slot, SimpleNamespace(req_id=req_id, num_computed_tokens=computed, mm_features=spans))

    def step(self, *requests: tuple[str, int, int, int]) -> None:
        """Prepare a step: of each request its name, slot, tokens computed before, and tokens."""
        names, slots, computed, lengths = zip(*requests, strict=True)
        starts = np.cumsum([0, *lengths], dtype=np.int32)
        batch: Any = SimpleNamespace(
            req_ids=list(names),
            num_reqs=len(names),
            num_reqs_after_padding=len(names),
            num_tokens=int(starts[-1]),
            num_tokens_after_padding=int(starts[-1]),
            has_prefill=True,
            is_prefilling_np=np.ones(len(names), dtype=bool),
            num_computed_tokens_np=np.array(computed),
            num_scheduled_tokens=np.array(lengths, dtype=np.int32),
            idx_mapping=torch.tensor(slots),
            idx_mapping_np=np.array(slots),
            query_start_loc=torch.from_numpy(starts),
            positions=torch.zeros(int(starts[-1]), dtype=torch.int64),
            seq_lens_cpu_upper_bound=torch.from_numpy(np.add(computed, lengths, dtype=np.int32)),
        )
        slot_mappings = torch.zeros(3, batch.num_tokens, dtype=torch.int64)
        cache: Any = SimpleNamespace(kv_cache_groups=[SimpleNamespace(layer_names=[])] * 3)
        tables = (torch.zeros(len(names), 1, dtype=torch.int32),) * 3
        self.prepare_attn(batch, CUDAGraphMode.NONE, tables, slot_mappings, [[], [], []], cache)


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> State:
    monkeypatch.setattr(buffer_utils, "is_uva_available", lambda: False)
    monkeypatch.setattr(model_state.DefaultModelState, "prepare_attn", lambda *args: {})
    monkeypatch.setattr(model_state, "read_spans", lambda features: features)
    monkeypatch.setattr(StagedModelState, "_build_metadata", lambda *args: {})
    return State()


def copies(state: State, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    done: list[int] = []
    copy = state.drops.copy_to_uva
    monkeypatch.setattr(state.drops, "copy_to_uva", lambda: (done.append(1), copy())[1])
    return done


def test_each_layout_reads_what_requests_had_lost_before_its_step(state: State) -> None:
    state.add(2, "image", SPAN)
    state.add(0, "resumed", SPAN, computed=30)
    state.step(("image", 2, 0, 25), ("resumed", 0, 30, 1))
    assert state.read[-1][:, [2, 0]].tolist() == [[0, 8], [0, 14]]
    state.step(("image", 2, 25, 1), ("resumed", 0, 31, 1))
    assert state.read[-1][:, [2, 0]].tolist() == [[8, 8], [14, 14]]
    state.add(2, "text")
    state.step(("text", 2, 0, 7))
    assert state.read[-1][:, 2].tolist() == [0, 0]


def test_a_step_copies_once_or_not_at_all(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    done = copies(state, monkeypatch)
    state.add(2, "image", SPAN)
    state.add(1, "text")
    assert not done, "an added request costs the device nothing"
    state.step(("image", 2, 0, 25), ("text", 1, 0, 5))
    assert len(done) == 1
    state.step(("image", 2, 25, 1), ("text", 1, 5, 1))
    assert len(done) == 2
    for position in (6, 7):
        state.step(("image", 2, position + 20, 1), ("text", 1, position, 1))
    assert len(done) == 2


def test_what_a_step_in_flight_reads_stays_as_it_is(state: State) -> None:
    """Two steps are in flight: the device may read for the first one until the second is prepared."""
    state.add(2, "image", SPAN)
    state.step(("image", 2, 0, 25))
    first, before = state.read[-1], state.read[-1].clone()
    state.add(0, "other", SPAN)
    state.step(("image", 2, 25, 1), ("other", 0, 0, 25))
    assert torch.equal(first, before)
    assert not torch.equal(first, state.read[-1])
