"""Sums over the attention heads of all tensor-parallel ranks, equal to the last bit on every rank."""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather


def sum_over_ranks(*partials: Tensor) -> list[Tensor]:
    """Sum what each rank computed over its own heads; tensors of one dtype travel together.

    Gathered, then summed in rank order by every rank, not all-reduced: the ranks must select the same tokens, so their
    sums must agree to the last bit, which the order of an all-reduce does not promise.
    """
    num_ranks = get_tensor_model_parallel_world_size()
    if num_ranks == 1:
        return list(partials)
    packed = torch.cat([partial.flatten() for partial in partials])
    gathered = tensor_model_parallel_all_gather(packed, dim=0)
    totals = gathered.unflatten(0, (num_ranks, -1)).sum(dim=0).split([partial.numel() for partial in partials])
    return [total.view(partial.shape) for total, partial in zip(totals, partials, strict=True)]


def mean_over_ranks(*partials: Tensor) -> list[Tensor]:
    """Mean of what each rank computed as a mean over its own heads, of which every rank has as many."""
    num_ranks: int = get_tensor_model_parallel_world_size()
    sums = sum_over_ranks(*partials)
    return sums if num_ranks == 1 else [total / num_ranks for total in sums]
