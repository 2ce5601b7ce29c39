"""Laws of staged pruning on the real engine: preemption changes nothing, and a request leaves no block behind.

The KV cache is far too small for the load. Requests of every kind fill it, and grow until they push each other out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import engines
import pytest
import sabotage
from engines import Answer, Engine, draw, request
from sabotage import Sabotage
from staged import (
    LAYERS,
    SAME,
    Stepper,
    assert_same,
    checkpoint,
    difference,
    greedy,
    recorded_steps,
    step_size,
    wipe,
    words,
)

from vd_plugin.kv_cache import StagedKVCacheManager

pytestmark = [pytest.mark.engine, pytest.mark.slow]

NUM_BLOCKS = 81
"""20 for each of four stages, of 32 rows each, and vLLM's empty one: a single request of the full length fits."""
NUM_TOKENS = 40

LOAD = [
    request(f"{words(20, 1)} <image> {words(10, 2)}", [draw(336, 336)], visual_token_budget=64),
    request(f"<image> {words(20, 3)}", [draw(336, 336, seed=1)], visual_token_budget=48),
    request(words(60, 4)),
    request(f"{words(5, 5)} <image> {words(9, 6)} <image>", [draw(90, 90), draw(336, 336)], visual_token_budget=32),
    request(f"{words(130, 7)} <image>", [draw(336, 336, seed=2)], visual_token_budget=32),
    request(words(25, 8)),
    request(f"{words(9, 9)} <image>", [draw(336, 336, seed=3)], visual_token_budget=48),
    request(f"<image> {words(3, 10)}", [draw(90, 90)], visual_token_budget=64),
]


@pytest.fixture(scope="module", params=[False, True], ids=["synchronous", "asynchronous"])
def engine(request: pytest.FixtureRequest, llava15: Path) -> Engine:
    return engines.start(
        checkpoint("llava15_gqa8", llava15),
        layers=LAYERS,
        block_size=32,
        max_model_len=640,
        num_gpu_blocks_override=NUM_BLOCKS,
        asynchronous=request.param,
    )


synchronous = pytest.mark.parametrize("engine", [False], indirect=True, ids=["synchronous"])
"""For what the way to schedule has nothing to do with."""


@pytest.fixture
def breakable(engine: Engine) -> Iterator[Engine]:
    yield engine
    wipe(engine)


@pytest.fixture(scope="module")
def alone(engine: Engine) -> list[Answer]:
    answers = []
    for asked in LOAD:
        engine.forget()
        answers += engine.generate(asked, num_tokens=NUM_TOKENS)
    return answers


def crowded(engine: Engine) -> tuple[list[Answer], int, bool]:
    """Answers to the whole load at once, how often a request was preempted, and whether all images stayed whole."""
    engine.forget()
    stepper = Stepper(engine)
    preempted = 0
    preempt = stepper.scheduler._preempt_request

    def count(*args: Any, **kwargs: Any) -> None:
        nonlocal preempted
        preempted += 1
        preempt(*args, **kwargs)

    stepper.scheduler._preempt_request = count
    try:
        with recorded_steps(engine) as chunks:
            names = [stepper.add(f"load {number}", asked, greedy(NUM_TOKENS)) for number, asked in enumerate(LOAD)]
            answers = stepper.answers(names)
    finally:
        del stepper.scheduler._preempt_request
    return answers, preempted, all(chunk.is_whole for chunk in chunks)


def test_preempted_requests_give_the_same_answers(engine: Engine, alone: list[Answer]) -> None:
    free = Stepper(engine).free_blocks
    answers, preempted, whole = crowded(engine)
    assert preempted >= 2
    assert whole
    for one, answer in zip(alone, answers, strict=True):
        assert_same(one, answer)
    assert Stepper(engine).free_blocks == free


def test_preempted_and_chunked_requests_give_the_same_answers(engine: Engine, alone: list[Answer]) -> None:
    with step_size(engine, 203):
        answers, preempted, whole = crowded(engine)
    assert preempted >= 2
    assert whole
    for one, answer in zip(alone, answers, strict=True):
        assert_same(one, answer)


@synchronous
@pytest.mark.parametrize(
    "broken", [sabotage.keep_the_slot_of_another, sabotage.shift_slots], ids=lambda sabotage: sabotage.__name__
)
def test_the_law_of_preemption_can_fail(
    breakable: Engine, alone: list[Answer], monkeypatch: pytest.MonkeyPatch, broken: Sabotage
) -> None:
    broken(monkeypatch)
    answers, _, _ = crowded(breakable)
    assert max(difference(one, answer) for one, answer in zip(alone, answers, strict=True)) > 100 * SAME


MOMENTS: dict[str, Callable[[Stepper], bool]] = {
    "waiting": lambda stepper: True,
    "between chunks, before the image": lambda stepper: stepper.computed("gone") > 0,
    "between chunks, before the second image": lambda stepper: stepper.computed("gone") >= 150,
    "right after the last image": lambda stepper: stepper.num_tokens("gone") == 1,
    "decoding": lambda stepper: stepper.num_tokens("gone") == 5,
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_abort_frees_every_block_of_every_group(engine: Engine, alone: list[Answer], moment: str) -> None:
    """And the neighbour, which goes on, notices nothing."""
    engine.forget()
    stepper = Stepper(engine)
    free = stepper.free_blocks
    gone = request(
        f"{words(70, 8)} <image> {words(30, 9)} <image>", [draw(90, 90), draw(336, 336)], visual_token_budget=48
    )
    with step_size(engine, 100):
        stepper.add("neighbour", LOAD[0], greedy(NUM_TOKENS))
        stepper.step(3)
        stepper.add("gone", gone, greedy(NUM_TOKENS))
        stepper.run(lambda: MOMENTS[moment](stepper))
        held = stepper.blocks("gone")
        assert all(held) is (moment != "waiting")
        before = stepper.free_blocks
        stepper.abort("gone")
        assert stepper.free_blocks == before + sum(held)
        (answer,) = stepper.answers(["neighbour"])
    assert not stepper.scheduler.requests
    assert stepper.free_blocks == free
    assert_same(answer, alone[0])


@synchronous
def test_the_law_of_aborts_can_fail(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block of each group stays behind."""
    engine.forget()
    stepper = Stepper(engine)
    free = stepper.free_blocks
    leaked: list[Any] = []
    pop = StagedKVCacheManager.pop_blocks_for_free

    def leak(self: StagedKVCacheManager, request_id: str) -> list[Any]:
        blocks = pop(self, request_id)
        leaked.extend(blocks[:1])
        return blocks[1:]

    stepper.add("gone", LOAD[0], greedy(NUM_TOKENS))
    stepper.step(2)
    with monkeypatch.context() as patch:
        patch.setattr(StagedKVCacheManager, "pop_blocks_for_free", leak)
        stepper.abort("gone")
    assert stepper.free_blocks == free - len(stepper.managers)
    stepper.managers[0].block_pool.free_blocks(leaked)
    assert stepper.free_blocks == free


def test_the_runner_forgets_requests_that_are_gone(engine: Engine) -> None:
    state = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner.model_state
    stepper = Stepper(engine)
    with step_size(engine, 100):
        stepper.add("gone", LOAD[4], greedy(NUM_TOKENS))
        stepper.step()
        assert state.pending
        stepper.abort("gone")
        stepper.add("other", LOAD[2], greedy(1))
        stepper.run()
        stepper.step()
    assert not state.pending
    assert len(state.known) <= 1
