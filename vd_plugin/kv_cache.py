"""KV memory by stage: the layers of a stage share block tables, which hold the rows that the stage keeps and no more.

vLLM's hybrid KV-cache manager gives every kind of attention layer its own groups, block tables and metadata. A stage is
made a kind of its own by a spec that does not mix with other stages. Importing this module registers the spec; the
engine core does so when it unpickles one from a worker.

Upstream: `vllm/v1/kv_cache_interface.py`, `vllm/v1/core/single_type_kv_cache_manager.py` (vLLM 0.32).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

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

    spans_of: Callable[[str], tuple[ImageSpan, ...]]
    """Request id -> its pruned images; set by the scheduler, which knows the requests."""
    cached_this_step: set[int]
    """Blocks offered to the prefix cache while the current step is being scheduled: no step has filled them yet.

    Set by the scheduler, which empties it as a step begins; all managers share one.
    """

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
        spans = self.spans_of(request.request_id)
        limit = min(num_tokens, spans[0].offset) if spans else num_tokens
        before = self.num_cached_block.get(request.request_id, 0)
        super().cache_blocks(request, limit, *args, **kwargs)
        after = self.num_cached_block.get(request.request_id, 0)
        self.cached_this_step.update(block.block_id for block in self.req_to_blocks[request.request_id][before:after])

    def _rows(self, request_id: str, num_tokens: int) -> int:
        return num_tokens - dropped_before(self.spans_of(request_id), self.kv_cache_spec.stage, num_tokens)


KVCacheSpecRegistry._ensure_registered()  # else ours would be taken for all that there is
KVCacheSpecRegistry.register(StagedAttentionSpec, StagedKVCacheManager, uniform_type_base_spec=StagedAttentionSpec)
