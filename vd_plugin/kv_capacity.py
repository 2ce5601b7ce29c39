"""How many images the KV cache holds at each budget: blocks by stage, and the line about them at start-up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vd_plugin.schedule import FULL, PRESETS, Geometry, Schedule, parse_budget, resolve

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig


def image_blocks(schedule: Schedule, groups: Sequence[tuple[int, int]]) -> int:
    """KV blocks that a prompt of this image alone takes.

    Args:
        groups: stage and block size of every KV-cache group.
    """
    return sum(-(-schedule.rows[stage] // block_size) for stage, block_size in groups)


def describe_capacity(geometry: Geometry, kv_cache_config: KVCacheConfig) -> str:
    """One sentence: how many of the largest images fit the KV cache at every preset."""
    groups = [(group.kv_cache_spec.stage, group.kv_cache_spec.block_size) for group in kv_cache_config.kv_cache_groups]
    sizes = geometry.grid_pinpoints or ((geometry.tile_size, geometry.tile_size),)
    size = max(sizes, key=lambda size: geometry.full_tokens(*size))
    presets = sorted(PRESETS, key=lambda name: PRESETS[name], reverse=True)
    counts = []
    for name in (FULL, *presets):
        blocks = image_blocks(resolve(geometry, *size, parse_budget(name)), groups)
        counts.append(f"{kv_cache_config.num_blocks // blocks} at {name} ({blocks} blocks each)")
    return f"VisionDrop: the KV cache of {kv_cache_config.num_blocks} blocks holds images of {size[0]}x{size[1]}: " + (
        ", ".join(counts)
    )
