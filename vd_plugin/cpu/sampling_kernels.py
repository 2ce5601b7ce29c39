"""Kernels of the sampler in numpy: see `kernels`.

Numpy, not torch, since the interpreter computes with numpy, whose logarithm and exponential differ from torch's in the
last bit. R rows of logits, V words of the vocabulary, S request slots.
"""

# ruff: noqa: N803  # parameters have the kernels' names

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

Grid = tuple[int, ...]


def apply_temperature(
    grid: Grid,
    logits_ptr: Tensor,
    logits_stride: int,
    expanded_idx_mapping_ptr: Tensor,
    temperature_ptr: Tensor,
    vocab_size: int,
    BLOCK_SIZE: int,
) -> Any:
    """Divide logits (R, V) float32 by the temperatures of their requests, unless these are 0."""
    if logits_ptr.dtype != torch.float32:
        return NotImplemented
    temperatures = temperature_ptr.numpy()[expanded_idx_mapping_ptr[: grid[0]].numpy()]
    rows = np.flatnonzero(temperatures)
    logits_ptr.numpy()[rows] /= temperatures[rows, None]
    return None


def gumbel_sample(
    grid: Grid,
    local_argmax_ptr: Tensor,
    local_argmax_stride: int,
    local_max_ptr: Tensor,
    local_max_stride: int,
    logits_cache_ptr: Tensor | None,
    logits_cache_stride_0: int,
    logits_cache_stride_1: int,
    logits_cache_col_ptr: Tensor | None,
    logits_cache_source_ptr: Tensor | None,
    logits_cache_source_stride: int,
    logits_ptr: Tensor,
    logits_stride: int,
    expanded_idx_mapping_ptr: Tensor,
    seeds_ptr: Tensor,
    pos_ptr: Tensor,
    temp_ptr: Tensor,
    vocab_size: int,
    BLOCK_SIZE: int,
    IS_DRAFTING: bool,
    APPLY_TEMPERATURE: bool,
    USE_FP64: bool,
    PER_TOKEN_COL: bool,
) -> Any:
    """Largest logit of each block of the vocabulary and where it is, (R, blocks), under Gumbel noise where sampled.

    In float32 and without draft tokens only.
    """
    if logits_cache_ptr is not None or IS_DRAFTING or APPLY_TEMPERATURE or USE_FP64:
        return NotImplemented
    num_rows, num_blocks = grid
    logits = np.full((num_rows, num_blocks * BLOCK_SIZE), -np.inf, dtype=np.float32)
    logits[:, :vocab_size] = logits_ptr.float().numpy()
    slots = expanded_idx_mapping_ptr[:num_rows].numpy()
    sampled = np.flatnonzero((slots >= 0) & (temp_ptr.numpy()[slots] != 0))
    if sampled.size:
        seeds, positions = seeds_ptr.numpy()[slots[sampled]], pos_ptr.numpy()[sampled]
        logits[sampled, :vocab_size] += _gumbel_noise(seeds, positions, vocab_size)
    blocks = logits.reshape(num_rows, num_blocks, BLOCK_SIZE)
    best = np.nanargmax(blocks, axis=-1)
    local_argmax_ptr.numpy()[:] = best + np.arange(num_blocks) * BLOCK_SIZE
    local_max_ptr.numpy()[:] = np.take_along_axis(blocks, best[..., None], axis=-1)[..., 0]
    return None


def token_logprobs(
    grid: Grid,
    output_ptr: Tensor,
    logits_ptr: Tensor,
    logits_stride: int,
    topk_ids_ptr: Tensor,
    topk_ids_stride: int,
    topk: int,
    vocab_size: int,
    BLOCK_SIZE: int,
    TOPK_BLOCK_SIZE: int,
) -> None:
    """Log-probabilities (R, K) float32 of words (R, K) under logits (R, V)."""
    logits = logits_ptr.float().numpy()
    largest = logits.max(axis=1, keepdims=True)
    num_blocks = -(-vocab_size // BLOCK_SIZE)
    exponentials = np.zeros((len(logits), num_blocks * BLOCK_SIZE), dtype=np.float32)
    np.exp(logits - largest, out=exponentials[:, :vocab_size])
    # In the kernel's order: float sums depend on it.
    sums = exponentials.reshape(len(logits), num_blocks, BLOCK_SIZE).sum(axis=-1)
    total = np.add.accumulate(sums, axis=1)[:, -1:]
    chosen = np.take_along_axis(logits, topk_ids_ptr.numpy(), axis=1)
    output_ptr.numpy()[:] = chosen - largest - np.log(total)


def token_ranks(
    grid: Grid,
    output_ptr: Tensor,
    logits_ptr: Tensor,
    logits_stride: int,
    token_ids_ptr: Tensor,
    vocab_size: int,
    BLOCK_SIZE: int,
) -> None:
    """(R,) how many logits of a row are at least that of its word; behind the vocabulary, the kernel reads -inf."""
    logits = logits_ptr.float().numpy()
    chosen = np.take_along_axis(logits, token_ids_ptr.numpy()[:, None], axis=1)
    padding = -vocab_size % BLOCK_SIZE
    output_ptr.numpy()[:] = (logits >= chosen).sum(axis=1) + padding * np.isneginf(chosen[:, 0])


def apply_grammar_bitmask(
    grid: Grid,
    logits_ptr: Tensor,
    logits_stride: int,
    logits_indices_ptr: Tensor,
    cu_num_logits_ptr: Tensor,
    bitmask_ptr: Tensor,
    bitmask_stride: int,
    vocab_size: int,
    MASK_STRIDE: int,
    BLOCK_SIZE: int,
) -> None:
    """Set the logits of words that a grammar forbids, whose bits of (masks, V / 32) int32 are 0, to minus infinity."""
    mapping = logits_indices_ptr[: grid[0]].numpy()
    requests, places = mapping // MASK_STRIDE, mapping % MASK_STRIDE
    starts = cu_num_logits_ptr.numpy()
    active = np.flatnonzero(places < starts[requests + 1] - starts[requests])
    words = bitmask_ptr.numpy()[active].astype("<u4").view(np.uint8)
    forbidden = np.unpackbits(words, axis=1, count=vocab_size, bitorder="little") == 0
    rows = (starts[requests] + places)[active]
    for row, mask in zip(rows.tolist(), torch.from_numpy(forbidden), strict=True):
        logits_ptr[row, :vocab_size].masked_fill_(mask, -torch.inf)


def _gumbel_noise(seeds: np.ndarray, positions: np.ndarray, vocab_size: int) -> np.ndarray:
    """(R, V) float32 noise by seed and position of each row: `murmur3_uniform32` and `_log1p_neg_stable` upstream."""
    hashed: np.ndarray = np.zeros((len(seeds), 1), dtype=np.uint32)
    for key in (seeds, seeds >> 32, positions):
        hashed = _mix(hashed, key.astype(np.uint32)[:, None])
    hashed = _mix(hashed, np.arange(vocab_size, dtype=np.uint32)) ^ 16
    hashed ^= hashed >> 16
    hashed *= np.uint32(0x85EBCA6B)
    hashed ^= hashed >> 13
    hashed *= np.uint32(0xC2B2AE35)
    hashed ^= hashed >> 16
    high, low = (hashed >> 16).astype(np.float32), (hashed & 0xFFFF).astype(np.float32)
    uniform = high * np.float32(2**-16) + (low + np.float32(0.5)) * np.float32(2**-32)
    series: np.ndarray = np.full_like(uniform, 1 / 8)
    for divisor in range(7, 0, -1):
        series = np.float32(1 / divisor) + uniform * series
    direct = np.log(np.maximum(1 - uniform, np.float32(2**-24)))
    noise: np.ndarray = -np.log(-np.where(uniform < 0.25, -uniform * series, direct))
    return noise


def _mix(hashed: np.ndarray, key: np.ndarray) -> np.ndarray:
    """One round of MurmurHash3 on 32 bits."""
    key = _rotate(key * np.uint32(0xCC9E2D51), 15) * np.uint32(0x1B873593)
    return _rotate(hashed ^ key, 13) * np.uint32(5) + np.uint32(0xE6546B64)


def _rotate(value: np.ndarray, bits: int) -> np.ndarray:
    return (value << bits) | (value >> (32 - bits))
