"""KV memory by stage: the layers of a stage share block tables, which hold the rows that the stage keeps and no more.

vLLM's hybrid KV-cache manager gives every kind of attention layer its own groups, block tables and metadata. A stage is
made a kind of its own by a spec that does not mix with other stages. Importing this module registers the spec; the
engine core does so when it unpickles one from a worker.

Upstream: `kv_cache_interface.py`, `core/kv_cache_manager.py` and `core/single_type_kv_cache_manager.py` of `vllm/v1/`
(vLLM 0.32).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from vd_plugin.spans import ImageSpan, dropped_before


@dataclass(frozen=True, kw_only=True)
class StagedAttentionSpec(FullAttentionSpec):
    """Full attention over the rows that are left at a stage."""

    stage: int

    @classmethod
    def of(cls, spec: FullAttentionSpec, stage: int) -> StagedAttentionSpec:
        if type(spec) is not FullAttentionSpec:
            raise NotImplementedError(
                f"VisionDrop prunes inside decoders of full attention only; this one keeps {type(spec).__name__}"
            )
        return cls(**{field.name: getattr(spec, field.name) for field in fields(FullAttentionSpec)}, stage=stage)

    @classmethod
    def merge(cls, specs: list[StagedAttentionSpec]) -> StagedAttentionSpec:
        # vLLM takes an AssertionError for "not mergeable".
        assert len({spec.stage for spec in specs}) == 1, "layers of different stages cannot share block tables"
        merged = FullAttentionSpec.merge(specs)
        return cls(
            **{field.name: getattr(merged, field.name) for field in fields(FullAttentionSpec)}, stage=specs[0].stage
        )

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return all(type(spec) is type(self) and spec.stage == self.stage for spec in kv_cache_specs.values())


class StagedKVCacheManager(FullAttentionManager):
    """Allocates blocks for a stage's rows. vLLM counts a request's tokens before pruning; here they are translated."""

    spans: dict[str, tuple[ImageSpan, ...]]
    """Request id -> its pruned images. `StagedKVCache` sets this and the next, and all stages share them."""
    cached_this_step: set[int]

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, new_computed_blocks: Sequence[KVCacheBlock], *args: Any, **kwargs: Any
    ) -> int:
        rows = self._rows(request_id, num_tokens)
        return int(super().get_num_blocks_to_allocate(request_id, rows, new_computed_blocks, *args, **kwargs))

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        rows = self._rows(request_id, num_tokens)
        blocks: list[KVCacheBlock] = super().allocate_new_blocks(request_id, rows, num_tokens_main_model)
        return blocks

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Offer to the prefix cache only what precedes the first pruned image.

        From there on rows and tokens no longer correspond, so a block's content does not match its hash.
        """
        spans = self.spans[request.request_id]
        limit = min(num_tokens, spans[0].offset) if spans else num_tokens
        if limit < self._next_offer(request.request_id):
            return
        before = self.num_cached_block.get(request.request_id, 0)
        super().cache_blocks(request, limit, *args, **kwargs)
        after = self.num_cached_block.get(request.request_id, 0)
        self.cached_this_step.update(block.block_id for block in self.req_to_blocks[request.request_id][before:after])

    def idle_until(self, request_id: str, num_tokens: int) -> int:
        """How many tokens a request may have before it needs a block or offers one to the prefix cache.

        Args:
            num_tokens: what it has now. Each further one adds a row at most.
        """
        full: int = num_tokens + len(self.req_to_blocks[request_id]) * self.block_size
        full -= self._rows(request_id, num_tokens)
        if not self.enable_caching:
            return full
        spans, next_offer = self.spans[request_id], self._next_offer(request_id)
        return full if spans and next_offer > spans[0].offset else min(full, next_offer - 1)

    def _next_offer(self, request_id: str) -> int:
        """The number of tokens that fill the next block for the prefix cache."""
        if self.block_size != self.block_pool.hash_block_size:
            return 0  # blocks are offered in part, too
        return int((self.num_cached_block.get(request_id, 0) + 1) * self.block_size)

    def _rows(self, request_id: str, num_tokens: int) -> int:
        return num_tokens - dropped_before(self.spans[request_id], self.kv_cache_spec.stage, num_tokens)


class StagedKVCache(KVCacheManager):
    """vLLM's manager of all groups, which asks them only when there is something to do.

    A decode step adds one token to each of hundreds of requests. Mostly every stage has room for it and no block
    becomes full: vLLM would go through all groups and change nothing.
    """

    def __init__(self, stock: KVCacheManager, spans_of: Callable[[Request], tuple[ImageSpan, ...]]) -> None:
        """Take over the blocks of `stock`, which is not to be used any more."""
        self.__dict__.update(vars(stock))
        self.cached_this_step: set[int] = set()
        """Blocks offered to the prefix cache while the current step is being scheduled: no step has filled them yet.

        The scheduler empties it as a step begins.
        """
        self._spans_of = spans_of
        self._spans: dict[str, tuple[ImageSpan, ...]] = {}
        self._idle_until: dict[str, int] = {}
        """Request id -> the number of tokens up to which all groups are idle. It stays true until the request's blocks
        are freed: before that none is taken away, and no request with pruned images loses tokens."""
        for manager in self.coordinator.single_type_managers:
            manager.spans = self._spans
            manager.cached_this_step = self.cached_this_step

    def allocate_slots(
        self, request: Request, num_new_tokens: int, *args: Any, num_lookahead_tokens: int = 0, **kwargs: Any
    ) -> KVCacheBlocks | None:
        """As vLLM's. It asks without further arguments for a request that runs, with many for one that is to begin."""
        running = not (args or num_lookahead_tokens or kwargs)
        num_tokens = request.num_computed_tokens + num_new_tokens
        if running and num_tokens <= self._idle_until.get(request.request_id, 0):
            return self.empty_kv_cache_blocks
        self._spans[request.request_id] = self._spans_of(request)
        blocks: KVCacheBlocks | None = super().allocate_slots(
            request, num_new_tokens, *args, num_lookahead_tokens=num_lookahead_tokens, **kwargs
        )
        if running:
            self._idle_until[request.request_id] = min(
                manager.idle_until(request.request_id, num_tokens) for manager in self.coordinator.single_type_managers
            )
        return blocks

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        if num_computed_tokens > self._idle_until.get(request.request_id, 0):
            super().cache_blocks(request, num_computed_tokens)

    def free(self, request: Request) -> None:
        super().free(request)
        self._forget(request)

    def pop_blocks_for_free(self, request: Request) -> list[KVCacheBlock]:
        blocks: list[KVCacheBlock] = super().pop_blocks_for_free(request)
        self._forget(request)
        return blocks

    def _forget(self, request: Request) -> None:
        self._spans.pop(request.request_id, None)
        self._idle_until.pop(request.request_id, None)


KVCacheSpecRegistry._ensure_registered()  # else ours would be taken for all that there is
KVCacheSpecRegistry.register(StagedAttentionSpec, StagedKVCacheManager, uniform_type_base_spec=StagedAttentionSpec)
