"""How much the KV cache holds: blocks by stage, images at each budget, and the cost that the gateway may admit.

The engine describes its own cache with this arithmetic at start-up, and `visiondrop plan` predicts it from a
configuration. Standard library only, so that a plan needs no engine.

Words: a *block* is one page of `block_size` rows for each layer of a KV-cache *group*. Groups have equally many layers,
padded where a stage's do not divide evenly. All layers of a group belong to one stage, and all groups take their blocks
from one pool.

Upstream: `vllm/v1/core/kv_cache_utils.py` (vLLM 0.32), `_get_kv_cache_groups_uniform_page_size` and
`get_kv_cache_config_from_groups`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import Any

from vd_plugin.schedule import FULL, PRESETS, Geometry, Schedule, parse_budget, resolve


@dataclass(frozen=True, slots=True)
class KVCapacity:
    """The KV cache of one engine."""

    num_blocks: int
    """As vLLM counts them: one, the null block, never holds rows."""
    groups: tuple[tuple[int, int], ...]
    """Stage and block size of every KV-cache group."""

    @classmethod
    def of_engine(cls, kv_cache_config: Any) -> KVCapacity:
        """Of a `vllm.v1.kv_cache_interface.KVCacheConfig` with a group for each stage."""
        specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
        return cls(kv_cache_config.num_blocks, tuple((spec.stage, spec.block_size) for spec in specs))

    @classmethod
    def of_memory(
        cls, geometry: Geometry, kv_bytes: int, block_size: int, element_bytes: int, tensor_parallel_size: int = 1
    ) -> KVCapacity:
        """What vLLM makes of `kv_bytes` on each GPU."""
        block = block_bytes(geometry, block_size, element_bytes, tensor_parallel_size)
        counts, _ = divide_layers(geometry.layers_per_stage)
        groups = tuple((stage, block_size) for stage, count in enumerate(counts) for _ in range(count))
        return cls(max(kv_bytes // block, 0), groups)

    @property
    def usable_blocks(self) -> int:
        return max(self.num_blocks - 1, 0)

    def num_images(self, schedule: Schedule) -> int:
        """Prompts of this image alone that fit at once."""
        return self.usable_blocks // image_blocks(schedule, self.groups)

    @property
    def text_tokens(self) -> int:
        """The longest text that fits alone: it takes as many blocks in every group."""
        (block_size,) = {size for _, size in self.groups}
        return self.usable_blocks // len(self.groups) * block_size


def divide_layers(layers_per_stage: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """How vLLM divides layers into groups: the number of groups of each stage, and the layers of one group.

    Of stages that are nearly equal (to less than half), each is a group, padded to the largest. Otherwise the smallest
    stage is the measure.
    """
    smallest, largest = min(layers_per_stage), max(layers_per_stage)
    size = largest if 2 * largest < 3 * smallest else smallest
    return tuple(-(-layers // size) for layers in layers_per_stage), size


def block_bytes(geometry: Geometry, block_size: int, element_bytes: int, tensor_parallel_size: int = 1) -> int:
    """Bytes of one block on each GPU: keys and values of `block_size` rows in the layers of a group."""
    _, num_layers = divide_layers(geometry.layers_per_stage)
    kv_heads = max(1, geometry.decoder.num_kv_heads // tensor_parallel_size)  # replicated where there are too few
    return num_layers * block_size * 2 * kv_heads * geometry.decoder.head_dim * element_bytes


def request_blocks(text_tokens: int, images: Iterable[Schedule], groups: Sequence[tuple[int, int]]) -> int:
    """KV blocks of a request of `text_tokens` (prompt and answer so far) and some images."""
    rows = [schedule.rows for schedule in images]
    return sum(-(-(text_tokens + sum(image[stage] for image in rows)) // block_size) for stage, block_size in groups)


def image_blocks(schedule: Schedule, groups: Sequence[tuple[int, int]]) -> int:
    """KV blocks that a prompt of this image alone takes.

    Args:
        groups: stage and block size of every KV-cache group.
    """
    return request_blocks(0, [schedule], groups)


def rows_per_cost(layers_per_stage: Sequence[int], groups: Sequence[tuple[int, int]]) -> Fraction:
    """Rows that one token of the gateway's cost takes at most, summed over the groups.

    A text token costs 1 and is one row in every group. An image costs its layer average (`Schedule.kept`), and its rows
    never grow from stage to stage: they are stacks of rows that reach through the first 1, 2, .. stages, and the worst
    ratio is that of one of those, at any budget. It exceeds the number of groups only where groups are padded.
    """
    num_groups = [sum(stage == number for stage, _ in groups) for number in range(len(layers_per_stage))]
    depths = accumulate(layers_per_stage)
    total = sum(layers_per_stage)
    return max(Fraction(reached * total, depth) for reached, depth in zip(accumulate(num_groups), depths, strict=True))


def max_cost(capacity: KVCapacity, layers_per_stage: Sequence[int], num_seqs: int, answer_tokens: int) -> int:
    """The cost of requests that fit the KV cache together, whatever they are; negative if not even answers fit.

    In every group, a request takes rows for its answer, and fewer than `block_size` rows of its last block stay empty.
    For `num_seqs` requests that comes first; what is left for prompts is divided by `rows_per_cost`. So any mix of at
    most `num_seqs` requests, at any budgets, fits if the sum of its costs is no larger.

    A cost is text tokens plus kept visual tokens, as the gateway counts them. A request for several answers (`n`) holds
    its prompt several times: here it is several requests.
    """
    (block_size,) = {size for _, size in capacity.groups}
    reserved = num_seqs * len(capacity.groups) * (answer_tokens + block_size - 1)
    left = capacity.usable_blocks * block_size - reserved
    return left // rows_per_cost(layers_per_stage, capacity.groups)


def largest_image(geometry: Geometry) -> tuple[int, int]:
    """(height, width) of an image that has as many tokens as any can."""
    sizes = geometry.grid_pinpoints or ((geometry.tile_size, geometry.tile_size),)
    return max(sizes, key=lambda size: geometry.full_tokens(*size))


def preset_names() -> tuple[str, ...]:
    """Every preset, the most expensive first."""
    return FULL, *sorted(PRESETS, key=lambda name: PRESETS[name], reverse=True)


def describe_capacity(geometry: Geometry, capacity: KVCapacity) -> str:
    """One sentence: how many of the largest images fit the KV cache at every preset."""
    height, width = largest_image(geometry)
    counts = []
    for name in preset_names():
        schedule = resolve(geometry, height, width, parse_budget(name))
        blocks = image_blocks(schedule, capacity.groups)
        counts.append(f"{capacity.num_images(schedule)} at {name} ({blocks} blocks each)")
    return f"VisionDrop: the KV cache of {capacity.num_blocks} blocks holds images of {width}x{height}: " + (
        ", ".join(counts)
    )
