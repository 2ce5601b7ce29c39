"""vLLM's scheduler, with four additions:

1. Images are computed whole.
2. KV-cache managers know where images lie.
3. No image is scored against keys that the same step is still to write. vLLM offers a block to the prefix cache when it
   schedules the step that will fill it. Attention may use the block at once, since each layer writes all keys of a step
   before it attends. Pruning reads the keys of the *next* layer, before that layer has run (docs/decisions/0008): an
   image whose text was found in such a block waits for the next step. What counts is the order of steps on the device,
   so this holds for steps that are prepared ahead of time, too.
4. No request is taken out of a step that has scheduled it (see `schedule`).

Base class: the asynchronous scheduler, which also runs synchronous engines.
Upstream: `vllm/v1/core/sched/scheduler.py` (vLLM 0.32).
"""

from __future__ import annotations

import math
from typing import Any
from weakref import WeakKeyDictionary

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.request import Request

from vd_plugin.kv_cache import StagedKVCache
from vd_plugin.request_checks import unsupported
from vd_plugin.spans import ImageSpan, before_images, read_spans, whole_images
from vd_plugin.validation import check_final

logger = init_logger(f"vllm.{__name__}")


class VisionDropScheduler(AsyncScheduler):
    kv_cache_manager: StagedKVCache

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_final(self.vllm_config)
        self._spans: WeakKeyDictionary[Request, tuple[ImageSpan, ...]] = WeakKeyDictionary()
        self._found_unfilled: Request | None = None
        """The request that is being admitted, if its beginning was found in blocks that the same step is to fill."""
        self.kv_cache_manager = StagedKVCache(self.kv_cache_manager, self._spans_of)

    def _spans_of(self, request: Request) -> tuple[ImageSpan, ...]:
        if request.streaming_queue is not None:  # a session, which grows
            return read_spans(request.mm_features)
        if request not in self._spans:
            self._spans[request] = read_spans(request.mm_features)
        return self._spans[request]

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        self.kv_cache_manager.cached_this_step.clear()
        self._found_unfilled = None
        if self.policy == SchedulingPolicy.PRIORITY:
            # vLLM preempts the least urgent request, even one that this step has scheduled already. Its blocks and its
            # images would stay in the prefix cache and the encoder cache, though no step computes them: later requests
            # read garbage, or end the engine. In this order the victim is always last, and not yet scheduled.
            # REMOVE WHEN: vLLM takes back from its caches what it takes out of a step.
            self.running.sort(key=lambda request: (request.priority, request.arrival_time))
        return super().schedule(*args, **kwargs)

    def add_request(self, request: Request) -> None:
        if self.policy == SchedulingPolicy.PRIORITY:
            # A strict order: answers of one request (`n` > 1) arrive at one time; of equals vLLM preempts the first.
            taken = {other.arrival_time for other in self.requests.values()}
            while request.arrival_time in taken:
                request.arrival_time = math.nextafter(request.arrival_time, math.inf)
        super().add_request(request)

    def _get_local_prefix_cache_hit(self, request: Request) -> tuple[KVCacheBlocks, int, int, bool]:
        hit: tuple[KVCacheBlocks, int, int, bool] = super()._get_local_prefix_cache_hit(request)
        self._found_unfilled = None if self._is_filled(hit[0]) else request
        return hit

    def _is_filled(self, blocks: KVCacheBlocks) -> bool:
        """Whether earlier steps have written all of these blocks."""
        unfilled = self.kv_cache_manager.cached_this_step
        return not unfilled or all(block.block_id not in unfilled for group in blocks.blocks for block in group)

    def _try_schedule_encoder_inputs(
        self,
        request: Request,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        shift_computed_tokens: int = 0,
    ) -> tuple[list[int], int, int, list[int], list[int]]:
        """End the step before an image that does not fit in it, or whose text the step is still to write.

        vLLM's own `disable_chunked_mm_input` does not hold for an image that begins where the step begins. It cannot
        starve: running requests are served in order, and a step has room for every decode beside the largest image.
        """
        last = request.mm_features[-1].mm_position
        if num_computed_tokens >= last.offset + last.length:
            return [], num_new_tokens, encoder_compute_budget, [], []
        spans = self._spans_of(request)
        reason = unsupported(request.sampling_params, request.streaming_queue is not None) if spans else None
        if reason:
            # The front end has refused it with a sentence; past the front end, this is how a scheduler ends a request.
            logger.warning("request %s: %s", request.request_id, reason[0])
            self.encoder_cache_mismatch_reqs.add(request.request_id)
            return [], 0, encoder_compute_budget, [], []
        end = whole_images(spans, num_computed_tokens, num_computed_tokens + num_new_tokens)
        if request is self._found_unfilled:
            end = before_images(spans, num_computed_tokens, end)
        answer: tuple[list[int], int, int, list[int], list[int]] = super()._try_schedule_encoder_inputs(
            request, num_computed_tokens, end - num_computed_tokens, encoder_compute_budget, shift_computed_tokens
        )
        return answer
