"""KV blocks by stage without an engine: vLLM's scheduler with our managers, and beside them vLLM's own code."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from vd_plugin.demo import MODEL_PATH
from vd_plugin.kv_cache import StagedAttentionSpec, StagedKVCache
from vd_plugin.options import engine_args
from vd_plugin.schedule import Schedule, TokenSplit
from vd_plugin.scheduler import VisionDropScheduler
from vd_plugin.spans import ImageSpan, identify, read_spans

BLOCK_SIZE = 4
NUM_STAGES = 4
MAX_STEP_TOKENS = 48
"""The largest image beside all decodes."""
FULL = Schedule(None, 30, 1, None, (None, None, None), (2, 2, 2, 2))
SCHEDULES = [
    FULL,
    Schedule(None, 30, 1, None, (TokenSplit(20, 1), TokenSplit(9, 0), TokenSplit(2, 0)), (2, 2, 2, 2)),
    Schedule(None, 30, 1, TokenSplit(18, 0), (None, TokenSplit(8, 2), None), (2, 2, 2, 2)),
    Schedule(None, 30, 1, TokenSplit(7, 0), (None, None, TokenSplit(1, 0)), (2, 2, 2, 2)),
]
seen: Counter[str] = Counter()
"""What happened in histories, so that they are known to be worth something."""


class ReferenceManager(FullAttentionManager):
    """vLLM's manager of one group, told the rows of its stage. It remembers and skips nothing."""

    spans_of: Callable[[str], tuple[ImageSpan, ...]]
    cached_this_step: set[int]

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> int:
        return super().get_num_blocks_to_allocate(request_id, self._rows(request_id, num_tokens), *args, **kwargs)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, *args: Any) -> Any:
        return super().allocate_new_blocks(request_id, self._rows(request_id, num_tokens), *args)

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        first = min((span.offset for span in self.spans_of(request.request_id)), default=num_tokens)
        before = self.num_cached_block.get(request.request_id, 0)
        super().cache_blocks(request, min(num_tokens, first), *args, **kwargs)
        cached = self.req_to_blocks[request.request_id][before : self.num_cached_block.get(request.request_id, 0)]
        self.cached_this_step |= {block.block_id for block in cached}

    def _rows(self, request_id: str, num_tokens: int) -> int:
        spans = [span for span in self.spans_of(request_id) if span.end <= num_tokens]
        return num_tokens - sum(span.rows[0] - span.rows[self.kv_cache_spec.stage] for span in spans)


class Twin(StagedKVCache):
    """Our cache, which does everything with vLLM's, too, and asserts that both have come to the same."""

    def __init__(self, ours: StagedKVCache, scheduler: VisionDropScheduler, reference: KVCacheManager) -> None:
        super().__init__(ours, scheduler._spans_of)
        self.reference = reference
        self.cached_by_reference: set[int] = set()
        for manager in reference.coordinator.single_type_managers:
            manager.__class__ = ReferenceManager
            manager.spans_of = lambda request_id: read_spans(scheduler.requests[request_id].mm_features)
            manager.cached_this_step = self.cached_by_reference

    def new_step_starts(self) -> None:
        assert not self.cached_this_step
        self.cached_by_reference.clear()
        self._both("new_step_starts")

    def get_computed_blocks(self, request: Request) -> Any:
        ours, *others = super().get_computed_blocks(request)
        theirs, *expected = self.reference.get_computed_blocks(request)
        assert (ours.get_block_ids(), others) == (theirs.get_block_ids(), expected)
        seen["hits"] += others[0] > 0
        return ours, *others

    def allocate_slots(self, request: Request, num_new_tokens: int, **options: Any) -> Any:
        theirs = dict(options)
        if options.get("new_computed_blocks") is self.empty_kv_cache_blocks:
            theirs["new_computed_blocks"] = self.reference.empty_kv_cache_blocks
        elif "new_computed_blocks" in options:
            blocks, groups = self.reference.block_pool.blocks, options["new_computed_blocks"].blocks
            copies = tuple([blocks[block.block_id] for block in group] for group in groups)
            theirs["new_computed_blocks"] = KVCacheBlocks(copies)
        ours = super().allocate_slots(request, num_new_tokens, **options)
        expected = self.reference.allocate_slots(request, num_new_tokens, **theirs)
        assert (ours and ours.get_block_ids()) == (expected and expected.get_block_ids())
        assert (ours is self.empty_kv_cache_blocks) == (expected is self.reference.empty_kv_cache_blocks)
        self._assert_equal()
        seen["refused"] += ours is None
        return ours

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        self._both("cache_blocks", request, num_computed_tokens)

    def free(self, request: Request) -> None:
        self._both("free", request)

    def reset_prefix_cache(self) -> Any:
        return self._both("reset_prefix_cache")

    def _both(self, name: str, *args: Any) -> Any:
        answer = getattr(super(), name)(*args)
        assert getattr(self.reference, name)(*args) == answer
        self._assert_equal()
        return answer

    def _assert_equal(self) -> None:
        assert _state(self) == _state(self.reference)
        assert self.cached_this_step == self.cached_by_reference


def _state(manager: KVCacheManager) -> Any:
    pool = manager.block_pool
    return (
        [
            ({name: [block.block_id for block in blocks] for name, blocks in group.req_to_blocks.items() if blocks})
            for group in manager.coordinator.single_type_managers
        ],
        [group.num_cached_block for group in manager.coordinator.single_type_managers],
        [block.block_id for block in pool.free_block_queue.get_all_free_blocks()],
        [(block.block_hash, block.ref_cnt) for block in pool.blocks],
        set(pool.cached_block_hash_to_block._cache),
    )


@cache
def _config(caching: bool) -> VllmConfig:
    options = {"max_model_len": 256, "max_num_batched_tokens": 2048, "max_num_seqs": 6}
    arguments = engine_args(str(MODEL_PATH), **options, enable_prefix_caching=caching)
    config = EngineArgs(**arguments).create_engine_config()
    config.cache_config.num_gpu_blocks = 1  # not read after this
    return config


class History(RuleBasedStateMachine):
    """Requests come, grow, are preempted and go, on a scheduler that no engine runs."""

    @initialize(
        caching=st.sampled_from(["off", "on", "on", "fine"]),
        num_blocks=st.integers(60, 120),
        depth=st.integers(0, 1),
    )
    def start(self, caching: str, num_blocks: int, depth: int) -> None:
        config = _config(caching != "off")
        spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=32, dtype=torch.float32)
        specs = [StagedAttentionSpec.of(spec, stage) for stage in range(NUM_STAGES)]
        groups = [KVCacheGroupSpec([f"layer.{stage}"], spec) for stage, spec in enumerate(specs)]
        hash_size = BLOCK_SIZE // 2 if caching == "fine" else BLOCK_SIZE
        kv_config = KVCacheConfig(num_blocks, [], groups)
        manager = StructuredOutputManager(config)
        self.scheduler = VisionDropScheduler(config, kv_config, manager, BLOCK_SIZE, hash_size)
        self.scheduler.max_num_scheduled_tokens = MAX_STEP_TOKENS
        reference = KVCacheManager(kv_config, 256, BLOCK_SIZE, hash_size, enable_caching=caching != "off")
        ours = self.scheduler.kv_cache_manager
        assert type(ours) is StagedKVCache
        self.scheduler.kv_cache_manager = Twin(ours, self.scheduler, reference)
        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(hash_size, sha256)
        self.depth = depth
        self.in_flight: deque[tuple[SchedulerOutput, list[list[int]]]] = deque()
        self.num_requests = 0

    @rule(
        prompts=st.lists(st.lists(st.integers(1, 30) | st.sampled_from(SCHEDULES), min_size=1, max_size=4), min_size=1),
        num_answers=st.integers(1, 60),
    )
    def add(self, prompts: list[list[Any]], num_answers: int) -> None:
        for parts in prompts:
            self.num_requests += 1
            self.scheduler.add_request(self._request(str(self.num_requests), parts, num_answers, session=False))

    @rule(parts=st.lists(st.integers(1, 20) | st.just(FULL), min_size=1, max_size=3))
    def begin_session(self, parts: list[Any]) -> None:
        self.num_requests += 1
        self.scheduler.add_request(self._request(str(self.num_requests), parts, 7, session=True))

    @precondition(lambda self: self._sessions())
    @rule(
        parts=st.lists(st.integers(1, 20) | st.sampled_from(SCHEDULES), min_size=1, max_size=2),
        num_answers=st.integers(1, 9),
        data=st.data(),
    )
    def extend_session(self, parts: list[Any], num_answers: int, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self._sessions()))
        self.scheduler.add_request(self._request(name, parts, num_answers, session=True))
        seen["extended"] += 1

    @rule(num_steps=st.integers(5, 40))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            scheduled = self.scheduler.schedule()
            requests = [self.scheduler.requests[name] for name in scheduled.num_scheduled_tokens]
            sampled = [[] if request.is_prefill_chunk else [1] for request in requests]
            self.in_flight.append((scheduled, sampled))
            while len(self.in_flight) > self.depth:
                self._update()
            seen["preempted"] += len(scheduled.preempted_req_ids or ())
            seen["sampled"] += sum(map(len, sampled))

    @precondition(lambda self: self.scheduler.requests)
    @rule(how=st.sampled_from(["abort", "abort", "abort", "reset", "preempt"]), data=st.data())
    def disturb(self, how: str, data: st.DataObject) -> None:
        if how == "abort":
            name = data.draw(st.sampled_from(list(self.scheduler.requests)))
            self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        else:
            # vLLM raises where a session that waits for input holds blocks.
            preempt = how == "preempt" and not self._sessions()
            self.scheduler.reset_prefix_cache(reset_running_requests=preempt)

    def teardown(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
            ours = self.scheduler.kv_cache_manager
            assert ours.usage == 0
            assert not ours._spans
            assert not ours._idle_until

    def _update(self) -> None:
        scheduled, sampled = self.in_flight.popleft()
        names = list(scheduled.num_scheduled_tokens)
        numbers = {name: number for number, name in enumerate(names)}
        self.scheduler.update_from_output(scheduled, ModelRunnerOutput(names, numbers, sampled))

    def _sessions(self) -> list[str]:
        return [name for name, request in self.scheduler.requests.items() if request.resumable]

    def _request(self, name: str, parts: list[Any], num_answers: int, session: bool) -> Request:
        ids: list[int] = []
        features = []
        for part in parts:
            length = part if isinstance(part, int) else part.num_placeholders
            if not isinstance(part, int):
                identifier = identify("image", part)
                place = PlaceholderRange(offset=len(ids), length=length)
                features.append(MultiModalFeatureSpec(None, "image", identifier, place))
            ids += [2] * length  # all texts begin alike, so caches are hit
        return Request(
            request_id=name,
            prompt_token_ids=ids,
            sampling_params=SamplingParams(max_tokens=num_answers, ignore_eos=True),
            pooling_params=None,
            mm_features=features,
            block_hasher=self.hasher,
            resumable=session,
        )


def test_what_our_cache_skips_would_have_changed_nothing() -> None:
    """Equal block tables, free blocks, cached hashes and blocks of the step after every call, in random histories."""
    seen.clear()
    run_state_machine_as_test(History, settings=settings(max_examples=100, stateful_step_count=20, deadline=None))
    assert all(seen[what] for what in ("extended", "hits", "preempted", "refused", "sampled")), seen
