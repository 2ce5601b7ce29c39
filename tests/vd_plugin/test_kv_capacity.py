"""Laws of the KV cache's arithmetic: blocks as vLLM makes them, and a cost that fits whatever it is made of."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity, get_kv_cache_configs
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig
from vllm.v1.kv_cache_layout import KVCacheLayout

from vd_plugin.kv_cache import StagedAttentionSpec
from vd_plugin.kv_capacity import (
    KVCapacity,
    block_bytes,
    describe_capacity,
    divide_layers,
    image_blocks,
    largest_image,
    max_cost,
    request_blocks,
    rows_per_cost,
)
from vd_plugin.schedule import FULL, DecoderShape, Geometry, Schedule, resolve

LAWS = settings(deadline=None, max_examples=200)
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
DTYPES = {2: torch.float16, 4: torch.float32}


def make_geometry(num_layers: int, boundaries: tuple[int, ...], heads: int = 2, head_dim: int = 32) -> Geometry:
    return Geometry(
        1, 336, 14, PINPOINTS, boundaries, DecoderShape(num_layers, 192, 512, heads, heads, head_dim)
    )  # fmt: skip


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    num_layers = draw(st.integers(4, 80))
    depths = st.lists(st.integers(1, num_layers - 1), min_size=3, max_size=3, unique=True)
    boundaries = tuple(sorted(draw(depths | st.just([])) or []))
    return make_geometry(num_layers, boundaries, draw(st.sampled_from((1, 2, 3, 8))), draw(st.sampled_from((32, 80))))


def vllm_config(max_model_len: int, layout: KVCacheLayout, tensor_parallel_size: int) -> Any:
    return SimpleNamespace(
        attention_config=SimpleNamespace(hisparse_config=None),
        cache_config=SimpleNamespace(
            get_resolved_kv_cache_layout=lambda: layout,
            num_gpu_blocks_override=None,
            prefix_cache_retention_interval=None,
        ),
        model_config=SimpleNamespace(max_model_len=max_model_len, original_max_model_len=max_model_len),
        num_prefill_lookahead_tokens=0,
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, tensor_parallel_size=tensor_parallel_size, pipeline_parallel_size=1
        ),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        speculative_config=None,
    )


def make_kv_cache(
    geometry: Geometry, kv_bytes: int, block_size: int, element_bytes: int, gpus: int, config: Any
) -> KVCacheConfig:
    """What vLLM's engine core makes of a model's layers."""
    shape = geometry.decoder
    spec = FullAttentionSpec(
        block_size=block_size,
        num_kv_heads=max(1, shape.num_kv_heads // gpus),
        head_size=shape.head_dim,
        dtype=DTYPES[element_bytes],
    )
    stages = [stage for stage, layers in enumerate(geometry.layers_per_stage) for _ in range(layers)]
    layers = {
        f"layers.{i}": StagedAttentionSpec.of(spec, stage) if geometry.boundaries else spec
        for i, stage in enumerate(stages)
    }
    worker, *others = get_kv_cache_configs(config, [dict(layers)] * gpus, [kv_bytes] * gpus)
    assert all(other.num_blocks == worker.num_blocks for other in others)
    return worker


@LAWS
@example(make_geometry(8, (2, 3, 6)), 2**30, 128, 4, 1, 4096, KVCacheLayout.LBHNC)
@example(make_geometry(13, (5, 8, 11)), 2**30, 16, 2, 2, 4096, KVCacheLayout.BLNHC)
@given(
    geometry=geometries(),
    kv_bytes=st.integers(2**20, 2**36),
    block_size=st.sampled_from((16, 32, 128)),
    element_bytes=st.sampled_from((2, 4)),
    gpus=st.sampled_from((1, 2, 4)),
    max_model_len=st.integers(1, 32768),
    layout=st.sampled_from(KVCacheLayout),
)
def test_blocks_and_groups_are_those_that_vllm_makes(
    geometry: Geometry,
    kv_bytes: int,
    block_size: int,
    element_bytes: int,
    gpus: int,
    max_model_len: int,
    layout: KVCacheLayout,
) -> None:
    capacity = KVCapacity.of_memory(geometry, kv_bytes, block_size, element_bytes, gpus)
    fits = request_blocks(max_model_len, (), capacity.groups) <= capacity.usable_blocks
    assert fits == (max_model_len <= capacity.text_tokens)
    config = vllm_config(max_model_len, layout, gpus)
    if not fits:
        with pytest.raises(ValueError, match="available"):
            make_kv_cache(geometry, kv_bytes, block_size, element_bytes, gpus, config)
        return
    made = make_kv_cache(geometry, kv_bytes, block_size, element_bytes, gpus, config)
    assert capacity.num_blocks == made.num_blocks
    if geometry.boundaries:
        theirs = KVCapacity.of_engine(made)
        assert sorted(theirs.groups) == sorted(capacity.groups)
        assert describe_capacity(geometry, capacity) == describe_capacity(geometry, theirs)
    else:
        assert len(made.kv_cache_groups) == len(capacity.groups) == 1
    (size,) = {tensor.size for tensor in made.kv_cache_tensors}
    assert size == made.num_blocks * block_bytes(geometry, block_size, element_bytes, gpus)
    concurrency = capacity.num_blocks / request_blocks(max_model_len, (), capacity.groups)
    assert get_kv_cache_capacity(config, made) == (int(concurrency * max_model_len), concurrency)


@pytest.mark.parametrize(
    ("layers", "groups", "size"),
    [
        ((32,), (1,), 32),
        ((8, 8, 8, 8), (1, 1, 1, 1), 8),
        ((2, 1, 3, 2), (2, 1, 3, 2), 1),  # 2, 3, 6 of 8
        ((7, 7, 7, 9), (1, 1, 1, 1), 9),  # nearly equal: padded
        ((6, 6, 6, 9), (1, 1, 1, 2), 6),  # no longer nearly
        ((5, 3, 3, 2), (3, 2, 2, 1), 2),
    ],
)
def test_layers_are_divided_as_in_these_cases(layers: tuple[int, ...], groups: tuple[int, ...], size: int) -> None:
    assert divide_layers(layers) == (groups, size)


def test_the_null_block_holds_no_image() -> None:
    """vLLM keeps one block for itself: two images of 92 blocks need 185."""
    geometry = make_geometry(8, (2, 4, 6))
    schedule = resolve(geometry, 672, 672, FULL)
    groups = tuple((stage, 128) for stage in range(4))
    assert image_blocks(schedule, groups) == 92
    assert [KVCapacity(blocks, groups).num_images(schedule) for blocks in (0, 1, 92, 93, 184, 185)] == [
        0,
        0,
        0,
        1,
        1,
        2,
    ]
    sentence = describe_capacity(geometry, KVCapacity(184, groups))
    assert sentence.startswith("VisionDrop: the KV cache of 184 blocks holds images of 672x672: 1 at full (92 blocks ")


def test_the_sentence_names_width_before_height() -> None:
    geometry = Geometry(1, 336, 14, ((336, 1008),), (2, 4, 6), DecoderShape(8, 192, 512, 6, 2, 32))
    assert largest_image(geometry) == (336, 1008)
    assert "images of 1008x336" in describe_capacity(geometry, KVCapacity(999, ((0, 16), (1, 16), (2, 16), (3, 16))))


Asked = tuple[int, list[Schedule]]
"""Tokens of text, and images."""


@st.composite
def requests(draw: st.DrawFn, geometry: Geometry) -> Asked:
    def image() -> Schedule:
        height, width = draw(st.integers(50, 1500)), draw(st.integers(50, 1500))
        return resolve(geometry, height, width, draw(st.integers(32, 3200) | st.just(FULL)))

    return draw(st.integers(1, 5) | st.integers(1, 4000)), [image() for _ in range(draw(st.integers(0, 3)))]


def cost_of(request: Asked) -> int:
    text, images = request
    return text + sum(image.kept for image in images)


@LAWS
@given(data=st.data(), geometry=geometries(), block_size=st.sampled_from((16, 128)), answer=st.integers(1, 600))
def test_whatever_is_admitted_fits(data: st.DataObject, geometry: Geometry, block_size: int, answer: int) -> None:
    """The cache is as small as the mix allows: one block less would lower the limit below the mix's cost."""
    counts, _ = divide_layers(geometry.layers_per_stage)
    groups = tuple((stage, block_size) for stage, count in enumerate(counts) for _ in range(count))
    mix = data.draw(st.lists(requests(geometry), min_size=1, max_size=12))
    num_seqs = len(mix) + data.draw(st.integers(0, 3))
    cost = sum(map(cost_of, mix))
    num_blocks = 1 + smallest(
        lambda usable: max_cost(KVCapacity(1 + usable, groups), geometry.layers_per_stage, num_seqs, answer) >= cost
    )
    capacity = KVCapacity(num_blocks, groups)
    assert max_cost(KVCapacity(num_blocks - 1, groups), geometry.layers_per_stage, num_seqs, answer) < cost
    assert sum(request_blocks(text + answer, images, groups) for text, images in mix) <= capacity.usable_blocks


def smallest(holds: Any) -> int:
    """The smallest number from 0 up at which a condition that stays true becomes true."""
    high = 1
    while not holds(high):
        high *= 2
    low = 0
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


@LAWS
@given(num_seqs=st.integers(1, 64), blocks=st.integers(100, 10_000), answer=st.integers(1, 300))
def test_the_limit_is_tight(num_seqs: int, blocks: int, answer: int) -> None:
    """A block's worth of text more for each request overflows: there the rounding was all that was kept back."""
    block_size, groups = 16, tuple((stage, 16) for stage in range(4))
    limit = max_cost(KVCapacity(blocks, groups), (8, 8, 8, 8), num_seqs, answer)
    assume(limit > num_seqs)
    texts = [limit // num_seqs + block_size + (i < limit % num_seqs) for i in range(num_seqs)]
    assert sum(texts) == limit + num_seqs * block_size
    assert sum(request_blocks(text + answer, (), groups) for text in texts) > blocks - 1


def test_padding_makes_an_image_dearer_than_text() -> None:
    """Seven layers and nine: each stage is one group of nine, so the first stages take more than their share."""
    layers = (7, 7, 7, 9)
    groups = tuple((stage, 16) for stage in range(4))
    assert rows_per_cost(layers, groups) == Fraction(30, 7) > len(groups)
    assert rows_per_cost((8, 8, 8, 8), groups) == 4
    assert rows_per_cost((32,), groups[:1]) == 1
