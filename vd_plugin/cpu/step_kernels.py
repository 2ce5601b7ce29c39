"""Kernels that prepare a step and record what it sampled, in numpy: see `kernels`.

Each function has its kernel's parameters behind the launch grid, and its kernel's name. Tensors are on the CPU; names
and shapes are those of the upstream file. R requests of the step, T tokens, S request slots, G KV-cache groups.
"""

# ruff: noqa: N803  # parameters have the kernels' names

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from torch import Tensor

Grid = tuple[int, ...]


def gather_block_tables(
    grid: Grid,
    batch_idx_to_req_idx: Tensor,
    src_block_table_ptrs: Tensor,
    dst_block_table_ptrs: Tensor,
    block_table_strides: Tensor,
    num_blocks_ptr: Tensor,
    num_blocks_stride: int,
    num_reqs: int,
    BLOCK_SIZE: int,
) -> None:
    """Copy the block tables of the step's requests, (R,) slots of (G, S), and zero the rows of padding."""
    _, num_rows = grid
    slots = batch_idx_to_req_idx[:num_reqs].numpy()
    num_blocks = num_blocks_ptr.numpy()
    tables = zip(
        src_block_table_ptrs.tolist(), dst_block_table_ptrs.tolist(), block_table_strides.tolist(), strict=True
    )
    for group, (source, destination, stride) in enumerate(tables):
        rows = _table(destination, num_rows, stride)
        rows[num_reqs:] = 0
        if num_reqs == 0:
            continue
        counts = num_blocks[group, slots]
        longest = int(counts.max())
        mine = _table(source, int(slots.max()) + 1, stride)[slots, :longest]
        np.copyto(rows[:num_reqs, :longest], mine, where=np.arange(longest) < counts[:, None])


def compute_slot_mappings(
    grid: Grid,
    max_num_tokens: int,
    idx_mapping: Tensor,
    query_start_loc: Tensor,
    pos: Tensor,
    block_table_ptrs: Tensor,
    block_table_strides: Tensor,
    block_sizes: Tensor,
    slot_mapping_enabled: Tensor,
    dcp_sharded: Tensor,
    slot_mappings_ptr: Tensor,
    slot_mappings_stride: int,
    cp_rank: int,
    CP_SIZE: int,
    CP_INTERLEAVE: int,
    PAD_ID: int,
    TRITON_BLOCK_SIZE: int,
) -> Any:
    """KV slots of the step's tokens in every group, (G, T) int64; `PAD_ID` behind them and for requests without a slot.

    Without context parallelism only.
    """
    if CP_SIZE != 1:
        return NotImplemented
    num_reqs = grid[1] - 1
    starts, owner = _owners(query_start_loc, num_reqs)
    first, end = int(starts[0]), int(starts[-1])
    positions = pos[first:end].numpy()
    slots = idx_mapping[:num_reqs].numpy()
    is_real = (slots >= 0)[owner]
    slots = slots.clip(0)
    num_rows = int(slots.max(initial=0)) + 1
    slots = slots[owner]
    mappings = slot_mappings_ptr.numpy()
    layouts = zip(
        block_table_ptrs.tolist(),
        block_table_strides.tolist(),
        block_sizes.tolist(),
        slot_mapping_enabled.tolist(),
        strict=True,
    )
    for mapping, (pointer, stride, block_size, is_enabled) in zip(mappings, layouts, strict=True):
        mapping[end:max_num_tokens] = PAD_ID
        if not is_enabled:
            mapping[first:end] = PAD_ID
            continue
        blocks = _table(pointer, num_rows, stride)[slots, np.where(is_real, positions // block_size, 0)]
        mapping[first:end] = np.where(is_real, blocks * block_size + positions % block_size, PAD_ID)
    return None


def apply_write(
    grid: Grid,
    output_ptr: Tensor,
    output_stride: Any,
    write_indices_ptr: Tensor,
    write_starts_ptr: Tensor,
    write_contents_ptr: Tensor,
    write_cu_lens_ptr: Tensor,
    write_group_ids_ptr: Tensor | None,
    BLOCK_SIZE: int,
    MULTI_GROUP: bool,
) -> None:
    """Writes that were staged on the host: a range of `write_contents_ptr` each, to a row at an offset, in order."""
    (num_writes,) = grid
    contents = write_contents_ptr.numpy()
    rows, starts = write_indices_ptr[:num_writes].tolist(), write_starts_ptr[:num_writes].tolist()
    ends = write_cu_lens_ptr[:num_writes].tolist()
    if MULTI_GROUP:
        assert write_group_ids_ptr is not None
        pointers, strides = output_ptr.tolist(), output_stride.tolist()
        groups = write_group_ids_ptr[:num_writes].tolist()
    else:
        output = output_ptr.view(-1).numpy()
    begin = 0
    for number, (row, start, end) in enumerate(zip(rows, starts, ends, strict=True)):
        length = end - begin
        if MULTI_GROUP:
            group = groups[number]
            output = _table(pointers[group], 1, (row + 1) * strides[group])[0]
            at = row * strides[group] + start
        else:
            at = row * output_stride + start
        output[at : at + length] = contents[begin:end]
        begin = end


def prepare_prefill_inputs(
    grid: Grid,
    input_ids_ptr: Tensor,
    next_prefill_tokens_ptr: Tensor,
    next_prefill_tokens_stride: int,
    num_lookahead: int,
    idx_mapping_ptr: Tensor,
    query_start_loc_ptr: Tensor,
    all_token_ids_ptr: Tensor,
    all_token_ids_stride: int,
    prefill_lens_ptr: Tensor,
    num_computed_tokens_ptr: Tensor,
    BLOCK_SIZE: int,
    LOOKAHEAD_BLOCK: int,
) -> None:
    """Token ids of requests that are still in their prompt, and the `num_lookahead` ids that follow; 0 behind it."""
    (num_reqs,) = grid
    input_ids, upcoming = input_ids_ptr.numpy(), next_prefill_tokens_ptr.numpy()
    all_token_ids = all_token_ids_ptr.numpy()
    slots, starts = idx_mapping_ptr[:num_reqs].numpy(), query_start_loc_ptr[: num_reqs + 1].numpy()
    computed, prefill_lens = num_computed_tokens_ptr.numpy()[slots], prefill_lens_ptr.numpy()[slots]
    for index in np.flatnonzero(computed < prefill_lens).tolist():
        slot, start, end = int(slots[index]), int(starts[index]), int(starts[index + 1])
        first = int(computed[index])
        following = first + end - start
        input_ids[start:end] = all_token_ids[slot, first:following]
        known = all_token_ids[slot, following : min(following + num_lookahead, int(prefill_lens[index]))]
        upcoming[: len(known), slot] = known
        upcoming[len(known) : num_lookahead, slot] = 0


def prepare_pos_seq_lens(
    grid: Grid,
    pos_ptr: Tensor,
    seq_lens_ptr: Tensor,
    idx_mapping_ptr: Tensor,
    query_start_loc_ptr: Tensor,
    num_computed_tokens_ptr: Tensor,
    max_num_reqs: int,
    BLOCK_SIZE: int,
) -> None:
    """Positions (T,) of the step's tokens and lengths (R,) of its requests; the lengths behind them are 0."""
    num_reqs = grid[0] - 1
    starts, owner = _owners(query_start_loc_ptr, num_reqs)
    computed = num_computed_tokens_ptr.numpy()[idx_mapping_ptr[:num_reqs].numpy()]
    seq_lens = seq_lens_ptr.numpy()
    seq_lens[:num_reqs] = computed + np.diff(starts)
    seq_lens[num_reqs:max_num_reqs] = 0
    first, end = int(starts[0]), int(starts[-1])
    pos_ptr.numpy()[first:end] = np.arange(first, end) + (computed - starts[:-1])[owner]


def combine_sampled_tokens(
    grid: Grid,
    input_ids_ptr: Tensor,
    idx_mapping_ptr: Tensor,
    last_sampled_tokens_ptr: Tensor,
    query_start_loc_ptr: Tensor,
    seq_lens_ptr: Tensor,
    prefill_len_ptr: Tensor,
    draft_tokens_ptr: Tensor,
    draft_tokens_stride: int,
    cu_num_logits_ptr: Tensor,
    logits_indices_ptr: Tensor,
    BLOCK_SIZE: int,
    NUM_NEW_SAMPLED_TOKENS: int = 1,
) -> Any:
    """Row of each request's logits, and the token that it sampled last as its input once its prompt is over.

    Without draft tokens only.
    """
    (num_reqs,) = grid
    if BLOCK_SIZE != 1 or NUM_NEW_SAMPLED_TOKENS != 1 or len(logits_indices_ptr) != num_reqs:
        return NotImplemented
    slots = idx_mapping_ptr[:num_reqs].numpy()
    rows = query_start_loc_ptr[1 : num_reqs + 1].numpy() - 1
    logits_indices_ptr.numpy()[:] = rows
    seq_lens, prefill_lens = seq_lens_ptr[:num_reqs].numpy(), prefill_len_ptr.numpy()[slots]
    decodes = np.flatnonzero(seq_lens > prefill_lens)
    input_ids_ptr.numpy()[rows[decodes]] = last_sampled_tokens_ptr.view(-1).numpy()[slots[decodes]]
    return None


def get_num_sampled_and_rejected(
    grid: Grid,
    num_sampled_ptr: Tensor,
    num_rejected_ptr: Tensor,
    seq_lens_ptr: Tensor,
    cu_num_logits_ptr: Tensor,
    idx_mapping_ptr: Tensor,
    prefill_len_ptr: Tensor,
) -> None:
    """(R,) tokens sampled, none while a prompt is not over, and logits that led to none."""
    (num_reqs,) = grid
    prefill_lens = prefill_len_ptr.numpy()[idx_mapping_ptr[:num_reqs].numpy()]
    is_prefilling = seq_lens_ptr[:num_reqs].numpy() < prefill_lens
    num_sampled, num_rejected = num_sampled_ptr.numpy(), num_rejected_ptr.numpy()
    num_sampled[:num_reqs][is_prefilling] = 0
    num_logits = np.diff(cu_num_logits_ptr[: num_reqs + 1].numpy())
    num_rejected[:num_reqs] = np.where(is_prefilling, 0, num_logits - num_sampled[:num_reqs])


def post_update(
    grid: Grid,
    idx_mapping_ptr: Tensor,
    num_computed_tokens_ptr: Tensor,
    last_sampled_tokens_ptr: Tensor,
    output_bin_counts_ptr: Tensor | None,
    output_bin_counts_stride: int,
    sampled_tokens_ptr: Tensor,
    sampled_tokens_stride: int,
    num_sampled_ptr: Tensor,
    num_rejected_ptr: Tensor,
    query_start_loc_ptr: Tensor | None,
    all_token_ids_ptr: Tensor,
    all_token_ids_stride: int,
    total_len_ptr: Tensor,
) -> Any:
    """Record the token that each request sampled, and how many tokens are now computed; slots below 0 are skipped.

    At most one token a request only.
    """
    if sampled_tokens_ptr.shape[1] != 1:
        return NotImplemented
    (num_reqs,) = grid
    slots = idx_mapping_ptr[:num_reqs].numpy()
    known = np.flatnonzero(slots >= 0)
    num_rejected = num_rejected_ptr[:num_reqs].numpy()
    query_lens = 0 if query_start_loc_ptr is None else np.diff(query_start_loc_ptr[: num_reqs + 1].numpy())
    num_computed_tokens_ptr.numpy()[slots[known]] += (query_lens - num_rejected)[known]

    sampling = known[num_sampled_ptr[:num_reqs].numpy()[known] > 0]
    slots, tokens = slots[sampling], sampled_tokens_ptr[:num_reqs, 0].numpy()[sampling]
    total_lens = total_len_ptr.numpy()
    last_sampled_tokens_ptr.view(-1).numpy()[slots] = tokens
    all_token_ids_ptr.numpy()[slots, total_lens[slots]] = tokens
    total_lens[slots] += 1
    if output_bin_counts_ptr is not None:
        output_bin_counts_ptr.numpy()[slots, tokens] += 1
    return None


def _table(address: int, num_rows: int, num_columns: int) -> np.ndarray:
    """The (num_rows, num_columns) int32 at an address."""
    memory = (ctypes.c_int32 * (num_rows * num_columns)).from_address(address)
    return np.frombuffer(memoryview(memory), dtype=np.int32).reshape(num_rows, num_columns)


def _owners(query_start_loc: Tensor, num_reqs: int) -> tuple[np.ndarray, np.ndarray]:
    """(R + 1,) first tokens of the requests, and (T,) the request of each token."""
    starts = query_start_loc[: num_reqs + 1].numpy()
    return starts, np.repeat(np.arange(num_reqs), np.diff(starts))
