"""Reading keys back from a paged KV cache, whatever order an attention backend keeps them in.

Scoring an image needs the keys of the text before it, which may have been computed in earlier steps or come from the
prefix cache. Backends differ in how they arrange a block (the CPU one packs keys for its vector units). Instead of
knowing each arrangement, the reader learns it once: it has the backend itself write numbered keys into a scratch block
and notes where they land.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_BASE = 128
"""Numbers are written digit by digit in this base: every digit is exact in bfloat16 and float16."""


class KeyReader:
    def __init__(self, attention: Any, block_size: int) -> None:
        """Learn the arrangement of a layer's KV cache.

        Args:
            attention: a vLLM `Attention` layer, bound to its cache.
            block_size: rows of a block as block tables count them.

        Raises:
            NotImplementedError: the backend changes keys when it stores them, or divides blocks into smaller ones.
        """
        if attention.kv_cache_dtype != "auto":
            # vLLM lets a checkpoint choose it while the layers are built, after our check of the settings.
            raise NotImplementedError(
                f"VisionDrop does not support a KV cache of {attention.kv_cache_dtype}, which this checkpoint asks "
                "for: serve one without a KV-cache scheme, or set visiondrop.layers to []"
            )
        cache: Tensor = attention.kv_cache
        heads, width = attention.num_kv_heads, attention.head_size
        self.block_shape = (cache.numel() // cache.shape[0] // (2 * heads * width), heads, width)
        if self.block_shape[0] != block_size:
            raise NotImplementedError(
                f"VisionDrop does not support KV blocks of {block_size} tokens with {type(attention.impl).__name__}, "
                f"which divides them: set block_size to {self.block_shape[0]}"
            )
        count = block_size * heads * width
        # The block's place in the scratch cache must be a real one: some kernels take block 0 for none.
        scratch = torch.zeros(2, *cache.shape[1:], dtype=cache.dtype, device=cache.device)
        slots = torch.arange(block_size, 2 * block_size, device=cache.device)
        numbers = torch.arange(count, device=cache.device)
        found = torch.zeros(scratch[1].numel(), dtype=torch.int64, device=cache.device)
        digits, scale = 0, 1
        while digits == 0 or scale < count:
            key = (numbers // scale % _BASE + 1).view(self.block_shape).to(cache.dtype)
            attention.impl.do_kv_cache_update(attention, key, torch.zeros_like(key), scratch, slots)
            found += (scratch[1].flatten().to(torch.int64) - 1).clamp(min=0) * scale
            digits, scale = digits + 1, scale * _BASE
        is_key = scratch[1].flatten() != 0
        places = is_key.nonzero().squeeze(-1)
        if len(places) != count or not torch.equal(found[places].sort().values, numbers):
            raise NotImplementedError(
                f"VisionDrop cannot read keys from the KV cache of {type(attention.impl).__name__}: "
                "set kv_cache_dtype to 'auto' or choose another attention backend"
            )
        self.places = torch.empty_like(numbers).scatter_(0, found[places], places)

    def read(self, cache: Tensor, blocks: Tensor) -> Tensor:
        """The keys of some blocks, one block after another: (blocks * block size, kv_heads, head_size).

        Args:
            cache: KV cache of a layer of the same arrangement.
            blocks: (blocks,) their numbers.
        """
        rows = cache.index_select(0, blocks).flatten(1)
        return rows.index_select(1, self.places).view(-1, *self.block_shape[1:])
