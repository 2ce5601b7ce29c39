"""Engines that prune inside the decoder, driven and watched step by step: what the tests of stages share.

Everything looks into the running engine, which lives in this process: its scheduler, its block pool, its model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import engines
import golden
import numpy as np
import torch
from engines import Answer, Engine
from torch import Tensor
from vllm import SamplingParams

from vd_plugin.selection import Plan
from vd_plugin.spans import ImageSpan, read_spans

LAYERS = [2, 4, 6]
"""Of every checkpoint of eight layers: those recorded (but one), and those built here."""

SAME = 1e-4
"""Largest difference of log-probabilities between two ways to compute one thing: float32 sums in another order."""


def checkpoint(name: str, fallback: Path) -> Path:
    """A recorded checkpoint, whose attention is not flat, or where there are none the random one."""
    folder = golden.ROOT / "public" / name / "model"
    return folder if folder.is_dir() else fallback


def start_large(random_model: Path) -> Engine:
    """The random checkpoint, with 16 seats and a KV cache that just holds two images of 2,928 tokens in full."""
    if engines._running is not None and engines._running[1].llm.llm_engine.has_unfinished_requests():
        engines.stop()  # a failed test has left it broken
    return engines.start(
        random_model,
        layers=LAYERS,
        max_num_seqs=16,
        num_gpu_blocks_override=1 + 2 * 4 * 23,
        # A random model, left free to, writes white space for ever.
        structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
    )


def words(count: int, seed: int = 0) -> str:
    """Text that every tokenizer here can read; one token a word with the recorded ones."""
    numbers = np.random.default_rng(seed).integers(4, 511, count)
    return " ".join(f"w{number}" for number in numbers)


def greedy(num_tokens: int = engines.NUM_TOKENS, **others: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=engines.VOCABULARY, **others)


def difference(one: Answer, other: Answer) -> float:
    """Largest difference of log-probabilities up to where tokens part, if they do."""
    steps = 1
    for first, second in zip(one.token_ids, other.token_ids, strict=True):
        steps += first == second
        if first != second:
            break
    return largest(one.logprobs[:steps] - other.logprobs[:steps])


def largest(differences: Tensor) -> float:
    """Not a number is as different as can be: every comparison with it would be false."""
    return float(differences.abs().nan_to_num(nan=torch.inf).max())


def wipe(engine: Engine) -> None:
    """After an engine was broken on purpose: what it wrote into the KV cache may be no numbers at all.

    Attention multiplies rows that it must not see by zero, which leaves NaN as it is.
    """

    def clear(model: Any) -> None:
        for layer in model.language_model.model.layers:
            layer.self_attn.attn.kv_cache.zero_()

    engine.on_model(clear)
    engine.forget()


def dirty(engine: Engine, seed: int = 0) -> None:
    """Make it cold, and fill its KV cache with what other people might have left there.

    A new cache holds zeros, and a used one often the very keys that a test is about: both hide reads of wrong blocks.
    """

    def fill(model: Any) -> None:
        generator = torch.Generator().manual_seed(seed)
        for layer in model.language_model.model.layers:
            cache = layer.self_attn.attn.kv_cache
            cache.copy_(torch.randn(cache.shape, generator=generator) * 3)

    engine.on_model(fill)
    engine.forget()


def assert_same(one: Answer, other: Answer, tolerance: float = SAME) -> None:
    assert one.prompt_token_ids == other.prompt_token_ids
    assert difference(one, other) <= engines.within(tolerance)
    assert one.token_ids == other.token_ids or not engines.IS_EXACT


@dataclass(frozen=True)
class SeenPlan:
    stage: int
    req_id: str
    span: ImageSpan
    scores: Tensor
    plan: Plan


@contextlib.contextmanager
def observed(engine: Engine) -> Iterator[list[SeenPlan]]:
    """Every plan that the decoder makes meanwhile, through the hook that `explain` uses."""
    seen: list[SeenPlan] = []

    def observe(stage: int, req_id: str, span: ImageSpan, scores: Tensor, plan: Plan) -> None:
        seen.append(SeenPlan(stage, req_id, span, scores.cpu().clone(), Plan(*(part.cpu() for part in plan))))

    decoder = engine.llm.apply_model(lambda model: model.decoder)[0]
    decoder.observer = observe
    try:
        yield seen
    finally:
        decoder.observer = None


@dataclass(frozen=True)
class Chunk:
    """Tokens start..end of a request, computed in one step."""

    step: int
    req_id: str
    start: int
    end: int
    spans: tuple[ImageSpan, ...]

    @property
    def is_whole(self) -> bool:
        """Whether it begins and ends outside of images."""
        return not any(span.offset < edge < span.end for span in self.spans for edge in (self.start, self.end))


class Stepper:
    """An engine, one step at a time."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.llm_engine = engine.llm.llm_engine
        self.core = self.llm_engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        self.outputs: dict[str, list[Any]] = {}
        self.count = 0

    @property
    def free_blocks(self) -> int:
        return int(self.pool.get_num_free_blocks())

    def internal_id(self, name: str) -> str:
        """vLLM gives every request an id of its own, which begins with the one that it came with."""
        (found,) = [req_id for req_id in self.scheduler.requests if req_id.rpartition("-")[0] == name]
        return str(found)

    def blocks(self, name: str) -> list[int]:
        """Blocks that a request holds in every group."""
        req_id = self.internal_id(name)
        return [len(manager.req_to_blocks[req_id]) for manager in self.managers]

    def computed(self, name: str) -> int:
        return int(self.scheduler.requests[self.internal_id(name)].num_computed_tokens)

    def add(self, name: str, asked: dict[str, Any], params: SamplingParams | None = None) -> str:
        self.outputs[name] = []
        self.llm_engine.add_request(name, asked, params or greedy())
        return name

    def abort(self, name: str) -> None:
        self.llm_engine.abort_request([name])

    def abort_all(self) -> None:
        self.llm_engine.abort_request([name for name in self.outputs if not self.is_done(name)])

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.count += 1
            for output in self.llm_engine.step():
                self.outputs[output.request_id].append(output)

    def run(self, until: Callable[[], bool] = lambda: False, limit: int = 400) -> None:
        """Step until a condition holds or nothing is left to do."""
        for _ in range(limit):
            if until() or not self.llm_engine.has_unfinished_requests():
                return
            self.step()
        raise AssertionError(f"not done after {limit} steps")

    def is_done(self, name: str) -> bool:
        return bool(self.outputs[name]) and self.outputs[name][-1].finished

    def num_tokens(self, name: str) -> int:
        """Of the answer, so far."""
        return len(self.outputs[name][-1].outputs[0].token_ids) if self.outputs[name] else 0

    def answer(self, name: str) -> Answer:
        assert self.is_done(name)
        return engines._answer(self.outputs[name][-1])

    def answers(self, names: Sequence[str]) -> list[Answer]:
        self.run()
        return [self.answer(name) for name in names]


@contextlib.contextmanager
def recorded_steps(engine: Engine) -> Iterator[list[Chunk]]:
    """What the scheduler gives to every step meanwhile."""
    scheduler = engine.llm.llm_engine.engine_core.engine_core.scheduler
    chunks: list[Chunk] = []
    steps = 0

    def schedule(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        output = type(scheduler).schedule(scheduler, *args, **kwargs)
        for req_id, count in output.num_scheduled_tokens.items():
            request = scheduler.requests[req_id]
            end = request.num_computed_tokens
            chunks.append(Chunk(steps, req_id, end - count, end, read_spans(request.mm_features)))
        steps += 1
        return output

    scheduler.schedule = schedule
    try:
        yield chunks
    finally:
        del scheduler.schedule


@contextlib.contextmanager
def step_size(engine: Engine, num_tokens: int) -> Iterator[None]:
    """A live engine with a smaller `max_num_batched_tokens`, as its scheduler reads it."""
    scheduler = engine.llm.llm_engine.engine_core.engine_core.scheduler
    config = scheduler.scheduler_config
    before = scheduler.max_num_scheduled_tokens, config.max_num_batched_tokens
    assert num_tokens <= before[1]
    scheduler.max_num_scheduled_tokens = config.max_num_batched_tokens = num_tokens
    try:
        yield
    finally:
        scheduler.max_num_scheduled_tokens, config.max_num_batched_tokens = before


def rows_of(plan: Plan) -> dict[str, list[int]]:
    return {name: torch.as_tensor(getattr(plan, name)).tolist() for name in plan._fields}
