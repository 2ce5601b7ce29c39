"""Sums over the attention heads of all tensor-parallel ranks, equal to the last bit on every rank."""

from __future__ import annotations

from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather


def sum_over_ranks(partial: Tensor) -> Tensor:
    """Sum what each rank computed over its own heads.

    Gathered, then summed in rank order by every rank, not all-reduced: the ranks must select the same tokens, so their
    sums must agree to the last bit, which the order of an all-reduce does not promise.
    """
    num_ranks = get_tensor_model_parallel_world_size()
    if num_ranks == 1:
        return partial
    gathered = tensor_model_parallel_all_gather(partial.contiguous(), dim=0)
    total: Tensor = gathered.unflatten(0, (num_ranks, -1)).sum(dim=0)
    return total


def mean_over_ranks(partial: Tensor) -> Tensor:
    """Mean of what each rank computed as a mean over its own heads, of which every rank has as many."""
    num_ranks: int = get_tensor_model_parallel_world_size()
    return sum_over_ranks(partial) / num_ranks
