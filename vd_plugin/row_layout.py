"""Positions, sequence lengths and KV slots of a step's rows at stages 1.., from what each request has lost there.

`lay_out_rows` is a torch expression for CPUs; `row_layout_kernel` does the same in one kernel for GPUs, where the price
of a step is the number of kernels. Both leave behind the rows what captured graphs need there: positions 0, lengths 0,
and slots that name no place.

Shapes: S stages but the first, R requests of the step, T tokens before pruning, N rows at a stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PAD_SLOT = -1
"""vLLM's `PAD_SLOT_ID`: the row is not stored."""


@dataclass(frozen=True, slots=True)
class StageGroup:
    """A KV-cache group of a stage; a stage may have several."""

    stage: int
    """From 1."""
    group: int
    block_size: int
    block_table: Tensor
    """(max R, blocks) int32: the step's requests in batch order, always in this place."""


@dataclass(frozen=True, slots=True)
class StepRows:
    """A step as vLLM's runner gives it, and how many rows of it each stage has."""

    idx_mapping: Tensor
    """(R,) int64, row of each request in per-request state."""
    query_starts: Tensor
    """(R + 1,) int32, first token of each request."""
    positions: Tensor
    """(T,) int64 before pruning."""
    num_rows: Sequence[int]
    """By stage, N."""
    row_starts: Tensor | None
    """(S, R + 1) int32, first row of each request by stage; None where no stage has other rows than the step."""


@dataclass(frozen=True, slots=True)
class StageBuffers:
    """What the stages read, always in the same place: captured graphs know no other."""

    positions: Tensor
    """(S, max T) int64."""
    seq_lens: Tensor
    """(S, max R) int32."""


def lay_out_rows(
    groups: Sequence[StageGroup], rows: StepRows, drops: Tensor, buffers: StageBuffers, slot_mappings: Tensor
) -> None:
    """Fill `buffers` and the rows of `slot_mappings` that belong to `groups`.

    Args:
        groups: of stages 1...
        drops: (S, slots) int32, rows that each request has lost.
        slot_mappings: (all groups, padded T) int64, padded where no stage has other rows than the step.
    """
    num_reqs, padded = len(rows.idx_mapping), slot_mappings.shape[1]
    starts = rows.query_starts[: num_reqs + 1]
    shift = drops[:, rows.idx_mapping]
    buffers.seq_lens[:, num_reqs:].zero_()
    if rows.row_starts is None:
        num_rows = rows.num_rows[0]
        owner = _owners(starts, num_rows)
        is_decode = num_rows == num_reqs
        positions = buffers.positions[:, :num_rows]
        torch.sub(rows.positions[:num_rows], shift if is_decode else shift[:, owner], out=positions)
        ends = positions if is_decode else positions[:, starts[1:] - 1]
        torch.add(ends, 1, out=buffers.seq_lens[:, :num_reqs])
        if num_rows < padded:
            buffers.positions[:, num_rows:padded].zero_()
        _fill_slots(positions, owner, groups, slot_mappings)
        return
    first = rows.positions[starts[:-1]] - shift
    torch.add(first, rows.row_starts.diff(), out=buffers.seq_lens[:, :num_reqs])
    for stage, num_rows in enumerate(rows.num_rows):
        starts = rows.row_starts[stage]
        owner = _owners(starts, num_rows)
        positions = buffers.positions[stage, :num_rows]
        torch.add((first[stage] - starts[:-1])[owner], torch.arange(num_rows, device=owner.device), out=positions)
        buffers.positions[stage, num_rows:padded].zero_()
        mine = [group for group in groups if group.stage == stage + 1]
        for group in mine:
            slot_mappings[group.group, num_rows:].fill_(PAD_SLOT)
        _fill_slots(buffers.positions[:, :num_rows], owner, mine, slot_mappings)


def _owners(starts: Tensor, num_rows: int) -> Tensor:
    """(N,) batch index of each row's request; `starts` (R + 1,) are the requests' first rows."""
    if num_rows == len(starts) - 1:
        return torch.arange(num_rows, device=starts.device)
    return torch.searchsorted(starts[1:], torch.arange(num_rows, dtype=starts.dtype, device=starts.device), right=True)


def _fill_slots(positions: Tensor, owner: Tensor, groups: Sequence[StageGroup], slot_mappings: Tensor) -> None:
    """Slots of rows: positions (S, N) in their request, owner (N,) row in the block tables."""
    for block_size, alike in _by_block_size(groups):
        blocks, offsets = positions // block_size, positions % block_size
        for group in alike:
            found = group.block_table[owner, blocks[group.stage - 1]]
            slots = slot_mappings[group.group, : len(owner)]
            torch.add(offsets[group.stage - 1], found, alpha=block_size, out=slots)


def _by_block_size(groups: Sequence[StageGroup]) -> Iterator[tuple[int, list[StageGroup]]]:
    for block_size in {group.block_size for group in groups}:
        yield block_size, [group for group in groups if group.block_size == block_size]
