"""Keys come back out of a paged cache as they went in, whatever order the back end keeps them in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm")

from vd_plugin.key_reader import KeyReader

pytestmark = [pytest.mark.engine, pytest.mark.cpu]

NUM_BLOCKS = 7


class Shuffled:
    """A back end with an order of its own; `spoil` makes it change keys on their way."""

    def __init__(self, spoil: float = 0) -> None:
        self.spoil = spoil

    def do_kv_cache_update(self, layer: Any, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
        _, block_size, _, heads, width = cache.shape
        for row, slot in enumerate(slots.tolist()):
            block, inside = divmod(slot, block_size)
            cache[block, (inside * 3 + 1) % block_size, 0] = (key[row].flip(0, 1) * (1 - self.spoil)).view(heads, width)
            cache[block, (inside * 3 + 1) % block_size, 1] = value[row]


def backend(heads: int, width: int, dtype: torch.dtype, block_size: int) -> Any:
    """A layer of the CPU back end with a cache in the layout that it chooses for this machine."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, _get_attn_isa

    impl = object.__new__(CPUAttentionBackendImpl)  # whose constructor wants the configuration of an engine
    impl.attn_type, impl.kv_cache_dtype = "decoder", "auto"
    return SimpleNamespace(
        impl=impl,
        isa=_get_attn_isa(dtype, block_size, width),
        kv_cache_dtype="auto",
        num_kv_heads=heads,
        head_size=width,
        _k_scale_float=1.0,
        _v_scale_float=1.0,
        kv_cache=torch.zeros(NUM_BLOCKS, heads, block_size, 2 * width, dtype=dtype),
    )


def write(layer: Any, keys: Tensor, table: list[int], block_size: int) -> None:
    positions = torch.arange(len(keys))
    slots = torch.tensor(table)[positions // block_size] * block_size + positions % block_size
    layer.impl.do_kv_cache_update(layer, keys, -keys, layer.kv_cache, slots)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("heads", [1, 2, 8])
@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_keys_are_read_as_they_were_written(dtype: torch.dtype, width: int, heads: int, block_size: int) -> None:
    layer = backend(heads, width, dtype, block_size)
    reader = KeyReader(layer, block_size)
    assert reader.block_shape == (block_size, heads, width)
    assert not layer.kv_cache.any(), "the cache itself is not written to learn its order"
    table = [5, 2, 6]
    keys = torch.randn(3 * block_size, heads, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    write(layer, keys, table, block_size)
    padded = torch.tensor([*table, 0, 0], dtype=torch.int32)
    for count in (1, block_size - 1, block_size, block_size + 1, 3 * block_size):
        assert torch.equal(reader.read(layer.kv_cache, padded[: -(-count // block_size)])[:count], keys[:count])


def shuffled(spoil: float = 0, kv_cache_dtype: str = "auto") -> Any:
    """A layer whose blocks hold 4 tokens."""
    cache = torch.zeros(NUM_BLOCKS, 4, 2, 2, 8)
    return SimpleNamespace(
        impl=Shuffled(spoil), kv_cache_dtype=kv_cache_dtype, num_kv_heads=2, head_size=8, kv_cache=cache
    )


def test_an_unknown_order_is_learnt() -> None:
    layer = shuffled()
    keys = torch.randn(8, 2, 8)
    write(layer, keys, [3, 1], 4)
    reader = KeyReader(layer, 4)
    assert torch.equal(reader.read(layer.kv_cache, torch.tensor([3, 1])), keys)


def test_a_back_end_that_changes_keys_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="kv_cache_dtype"):
        KeyReader(shuffled(spoil=0.5), 4)


def test_blocks_that_the_back_end_divides_are_refused() -> None:
    """Block tables would name other blocks than the cache has: FlashInfer with `block_size` 128 has blocks of 64."""
    with pytest.raises(NotImplementedError, match=r"KV blocks of 8 tokens with Shuffled, .* set block_size to 4"):
        KeyReader(shuffled(), 8)


def test_a_cache_that_the_checkpoint_quantises_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="a KV cache of fp8, which this checkpoint asks for"):
        KeyReader(shuffled(kv_cache_dtype="fp8"), 4)
