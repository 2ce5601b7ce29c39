"""Ways to break the engine on purpose, each a bug that somebody could write. A law's test must notice them.

Each is applied to a running engine through pytest's `monkeypatch`, and gone with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from vd_plugin import decoder, model_state, scheduler
from vd_plugin.key_reader import KeyReader
from vd_plugin.kv_cache import StagedKVCacheManager
from vd_plugin.model_state import StagedModelState

Sabotage = Callable[[pytest.MonkeyPatch], None]


def keep_the_wrong_tokens(patch: pytest.MonkeyPatch) -> None:
    """Each kept token's neighbour is kept in its place."""
    select = decoder.select
    patch.setattr(decoder, "select", lambda scores, *others: select(scores.roll(1), *others))


def merge_into_the_wrong_anchor(patch: pytest.MonkeyPatch) -> None:
    select = decoder.select

    def wrong(*args: Any) -> Any:
        plan = select(*args)
        return plan._replace(owners=(plan.owners + 1) % max(1, len(plan.anchors)))

    patch.setattr(decoder, "select", wrong)


def score_without_context(patch: pytest.MonkeyPatch) -> None:
    """Rows are scored as if they stood at the beginning of the prompt."""
    positions = decoder._positions
    patch.setattr(
        decoder, "_positions", lambda stage, request, count: positions(stage, request, count) - request.context
    )


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
    slots_of = model_state.slots_of
    patch.setattr(model_state, "slots_of", lambda positions, *others: slots_of(positions + 1, *others))


def forget_what_was_dropped(patch: pytest.MonkeyPatch) -> None:
    """Steps after an image do not know of the rows that it has lost."""

    def advance(self: StagedModelState, pruned: list[Any]) -> None:
        for request in pruned:
            rest = self.pending.pop(request.req_id)[len(request.spans) :]
            if rest:
                self.pending[request.req_id] = rest

    patch.setattr(StagedModelState, "_advance", advance)


def keep_the_slot_of_another(patch: pytest.MonkeyPatch) -> None:
    """A request begins with what the last one in its slot had lost."""
    add_request, set_drops = StagedModelState.add_request, StagedModelState._set_drops

    def wrong(self: StagedModelState, *args: Any) -> None:
        self._set_drops = lambda *_: None  # type: ignore[method-assign]
        add_request(self, *args)
        del self._set_drops

    patch.setattr(StagedModelState, "add_request", wrong)
    patch.setattr(StagedModelState, "_set_drops", set_drops)


def take_the_first_request_for_all(patch: pytest.MonkeyPatch) -> None:
    """Steps that do not prune treat each token as one of the batch's first request."""

    def owners(self: StagedModelState, batch: Any) -> torch.Tensor:
        return torch.zeros(batch.num_tokens, dtype=torch.int64)

    patch.setattr(StagedModelState, "_owners", owners)


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
