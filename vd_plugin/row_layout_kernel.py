"""`row_layout.lay_out_rows` as one Triton kernel: a program for each KV-cache group and request.

Upstream: `_compute_slot_mappings_kernel` in `vllm/v1/worker/gpu/block_table.py` (vLLM 0.32).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from vllm.triton_utils import tl, triton

from vd_plugin.row_layout import PAD_SLOT, StageBuffers, StageGroup, StepRows


class RowLayoutKernel:
    """Takes the place of `lay_out_rows` for some groups, whose block tables stay where they are."""

    def __init__(self, groups: Sequence[StageGroup], device: torch.device) -> None:
        def column(values: list[int], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        self.num_groups = len(groups)
        self.stages = column([group.stage - 1 for group in groups], torch.int32)
        self.groups = column([group.group for group in groups], torch.int32)
        self.block_sizes = column([group.block_size for group in groups], torch.int32)
        self.table_pointers = column([group.block_table.data_ptr() for group in groups], torch.uint64)
        self.table_strides = column([group.block_table.stride(0) for group in groups], torch.int64)

    def __call__(self, rows: StepRows, drops: Tensor, buffers: StageBuffers, slot_mappings: Tensor) -> None:
        num_reqs = len(rows.idx_mapping)
        row_starts = rows.query_starts if rows.row_starts is None else rows.row_starts
        _lay_out_rows_kernel[(self.num_groups, num_reqs + 1)](
            rows.idx_mapping,
            rows.query_starts,
            rows.positions,
            drops,
            drops.stride(0),
            row_starts,
            0 if rows.row_starts is None else row_starts.stride(0),
            self.stages,
            self.groups,
            self.block_sizes,
            self.table_pointers,
            self.table_strides,
            buffers.positions,
            buffers.positions.stride(0),
            buffers.seq_lens,
            buffers.seq_lens.stride(0),
            slot_mappings,
            slot_mappings.stride(0),
            slot_mappings.shape[1],
            PAD_SLOT=PAD_SLOT,
            BLOCK=1024,
        )


@triton.jit(do_not_specialize=["row_starts_stride", "num_padded"])  # type: ignore[untyped-decorator]
def _lay_out_rows_kernel(  # type: ignore[no-untyped-def]  # Triton's language
    idx_mapping,  # [num_reqs]
    query_starts,  # [num_reqs + 1]
    step_positions,  # [num_tokens]
    drops,  # [num_stages, max_num_reqs]
    drops_stride,
    row_starts,  # [num_stages, num_reqs + 1], or [num_reqs + 1] with stride 0
    row_starts_stride,
    group_stages,  # [num_groups]
    group_ids,  # [num_groups]
    block_sizes,  # [num_groups]
    block_table_pointers,  # [num_groups]
    block_table_strides,  # [num_groups]
    positions,  # out: [num_stages, max_num_tokens]
    positions_stride,
    seq_lens,  # out: [num_stages, max_num_reqs]
    seq_lens_stride,
    slot_mappings,  # out: [all groups, num_padded]
    slot_mappings_stride,
    num_padded,
    PAD_SLOT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0)
    request = tl.program_id(1)
    num_reqs = tl.num_programs(1) - 1
    stage = tl.load(group_stages + group)
    row_starts += stage * row_starts_stride
    positions += stage * positions_stride
    seq_lens += stage * seq_lens_stride
    slot_mappings += tl.load(group_ids + group) * slot_mappings_stride
    begin = tl.load(row_starts + request)

    if request == num_reqs:
        # What lies behind the rows. Groups of one stage write the same positions and lengths.
        for i in range(begin, num_padded, BLOCK):
            place = i + tl.arange(0, BLOCK)
            tl.store(positions + place, 0, mask=place < num_padded)
            tl.store(slot_mappings + place, PAD_SLOT, mask=place < num_padded)
        for i in range(num_reqs, seq_lens_stride, BLOCK):
            place = i + tl.arange(0, BLOCK)
            tl.store(seq_lens + place, 0, mask=place < seq_lens_stride)
        return

    end = tl.load(row_starts + request + 1)
    lost = tl.load(drops + stage * drops_stride + tl.load(idx_mapping + request))
    first = tl.load(step_positions + tl.load(query_starts + request)) - lost
    tl.store(seq_lens + request, (first + end - begin).to(tl.int32))
    block_size = tl.load(block_sizes + group)
    table = tl.cast(tl.load(block_table_pointers + group), tl.pointer_type(tl.int32))
    table += request * tl.load(block_table_strides + group)
    for i in range(begin, end, BLOCK):
        row = i + tl.arange(0, BLOCK)
        position = first + row - begin
        block = tl.load(table + position // block_size, mask=row < end, other=0).to(tl.int64)
        tl.store(positions + row, position, mask=row < end)
        tl.store(slot_mappings + row, block * block_size + position % block_size, mask=row < end)
