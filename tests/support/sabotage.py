"""Ways to break the engine on purpose, each a bug that somebody could write. A law's test must notice them.

Each is applied to a running engine through pytest's `monkeypatch`, and gone with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from vllm.config.compilation import CUDAGraphMode
from vllm.model_executor.models.llama import LlamaDecoderLayer
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from vd_plugin import decoder, image_batches, model_state, row_layout, scheduler
from vd_plugin.key_reader import KeyReader
from vd_plugin.kv_cache import StagedKVCacheManager
from vd_plugin.model_state import StagedModelState

Sabotage = Callable[[pytest.MonkeyPatch], None]


def keep_the_wrong_tokens(patch: pytest.MonkeyPatch) -> None:
    """Each kept token's neighbour is kept in its place."""
    select = decoder.select
    patch.setattr(decoder, "select", lambda scores, *others: select(scores.roll(1, dims=-1), *others))


def merge_into_the_wrong_anchor(patch: pytest.MonkeyPatch) -> None:
    select = decoder.select

    def wrong(*args: Any) -> Any:
        plan = select(*args)
        return plan._replace(owners=(plan.owners + 1) % max(1, plan.anchors.shape[-1]))

    patch.setattr(decoder, "select", wrong)


def score_without_context(patch: pytest.MonkeyPatch) -> None:
    """Rows are scored as if they stood at the beginning of the prompt."""
    positions = image_batches._positions
    patch.setattr(image_batches, "_positions", lambda stage, request: positions(stage, request) - request.context)


def read_other_keys(patch: pytest.MonkeyPatch) -> None:
    """Keys of earlier steps come out of the cache with their width in the wrong order."""
    read = KeyReader.read
    patch.setattr(KeyReader, "read", lambda self, *args: read(self, *args).flip(-1))


def shift_positions(patch: pytest.MonkeyPatch) -> None:
    """Steps that do not prune rotate by one position too many."""
    lay_out = StagedModelState._lay_out

    def wrong(self: StagedModelState, *args: Any) -> Any:
        layout = lay_out(self, *args)
        for positions in layout.positions:
            positions += 1
        return layout

    patch.setattr(StagedModelState, "_lay_out", wrong)


def shift_slots(patch: pytest.MonkeyPatch) -> None:
    """Every row is stored one slot too late."""
    fill_slots = row_layout._fill_slots
    patch.setattr(row_layout, "_fill_slots", lambda positions, *others: fill_slots(positions + 1, *others))


def forget_what_was_dropped(patch: pytest.MonkeyPatch) -> None:
    """Steps after an image do not know of the rows that it has lost."""

    def advance(self: StagedModelState, pruned: list[Any]) -> None:
        for request in pruned:
            rest = self.pending.pop(request.req_id)[len(request.spans) :]
            if rest:
                self.pending[request.req_id] = rest

    patch.setattr(StagedModelState, "_advance", advance)


def keep_the_slot_of_another(patch: pytest.MonkeyPatch) -> None:
    """A request begins with what the last one in its slot had lost; one with images to prune would not even run."""
    add_request = StagedModelState.add_request

    def wrong(self: StagedModelState, req_index: int, request: Any) -> None:
        before = self.drops.np[:, req_index].copy()
        add_request(self, req_index, request)
        if request.req_id not in self.pending:
            self.drops.np[:, req_index] = before

    patch.setattr(StagedModelState, "add_request", wrong)


def take_the_first_request_for_all(patch: pytest.MonkeyPatch) -> None:
    """Each row counts as one of the batch's first request."""
    owners = row_layout._owners

    def wrong(starts: Tensor, num_rows: int) -> Tensor:
        return torch.zeros_like(owners(starts, num_rows))

    patch.setattr(row_layout, "_owners", wrong)


def continue_from_the_first_row(patch: pytest.MonkeyPatch) -> None:
    """An image's rows are left-aligned in its span: a prompt that ends with one is continued from a row too early."""
    final_rows = model_state.final_rows
    patch.setattr(model_state, "final_rows", lambda *args: np.maximum(final_rows(*args) - 1, 0))


def trust_blocks_of_this_step(patch: pytest.MonkeyPatch) -> None:
    """An image is scored against keys of blocks that the same step will fill."""
    patch.setattr(scheduler.VisionDropScheduler, "_is_filled", lambda self, blocks: True)


def split_images(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(scheduler, "whole_images", lambda found, start, end: end)


def cache_what_was_pruned(patch: pytest.MonkeyPatch) -> None:
    """Pruned rows are offered to the prefix cache under the hashes of the tokens that they are not."""
    patch.setattr(StagedKVCacheManager, "cache_blocks", FullAttentionManager.cache_blocks)


def allocate_for_the_original_tokens(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(StagedKVCacheManager, "_rows", lambda self, request_id, num_tokens: num_tokens)


def measure_outside_of_buffers(patch: pytest.MonkeyPatch) -> None:
    """Sequence lengths of each step are a new tensor: no captured graph would read it."""
    build = model_state.build_attn_metadata

    def wrong(*args: Any, seq_lens: Tensor, **others: Any) -> Any:
        return build(*args, seq_lens=seq_lens.clone(), **others)

    patch.setattr(model_state, "build_attn_metadata", wrong)


def lay_out_outside_of_buffers(patch: pytest.MonkeyPatch) -> None:
    """Positions of each step are new tensors."""
    prepare_inputs = StagedModelState.prepare_inputs

    def wrong(self: StagedModelState, *args: Any) -> Any:
        inputs = prepare_inputs(self, *args)
        layout = inputs["layout"]
        return {**inputs, "layout": replace(layout, positions=[positions.clone() for positions in layout.positions])}

    patch.setattr(StagedModelState, "prepare_inputs", wrong)


def store_padding(patch: pytest.MonkeyPatch) -> None:
    """Rows that pad a step to the size of its graph are stored over the first request's row."""
    prepare_attn = StagedModelState.prepare_attn

    def wrong(
        self: StagedModelState, batch: Any, mode: Any, tables: Any, slots: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        metadata = prepare_attn(self, batch, mode, tables, slots, *args, **kwargs)
        if mode == CUDAGraphMode.FULL:
            slots[:, batch.num_tokens :] = slots[:, :1]
        return metadata

    patch.setattr(StagedModelState, "prepare_attn", wrong)


def read_what_a_norm_overwrites(patch: pytest.MonkeyPatch) -> None:
    """Each layer takes the residual that it was given for what it was before the layer ran.

    Right with norms that make new tensors, as a CPU's do.
    """
    forward = LlamaDecoderLayer.forward

    def wrong(self: Any, positions: Tensor, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        given = hidden if residual is None else residual
        before = given.clone()
        hidden, residual = forward(self, positions, hidden, residual)
        return hidden + given - before, residual

    patch.setattr(LlamaDecoderLayer, "forward", wrong)
