"""Decode steps that are replayed as CUDA graphs answer as eager ones do: see `graph_replay.py`.

Requests come while others decode, grow until one is preempted, and go; replays of one to eight of them alternate with
steps that prune. Each run begins in a KV cache full of other numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import engines
import pytest
import sabotage
from engines import Answer, Engine, draw, request
from graph_replay import replayed
from sabotage import Sabotage
from staged import (
    LAYERS,
    SAME,
    Stepper,
    assert_same,
    checkpoint,
    difference,
    dirty,
    greedy,
    recorded_steps,
    step_size,
    wipe,
    words,
)

pytestmark = [pytest.mark.engine, pytest.mark.slow]

NUM_BLOCKS = 161
"""Of 32 rows: enough for all, until some are taken away."""

ARRIVALS: list[tuple[dict[str, Any], int]] = [
    (request(f"{words(20, 1)} <image> {words(10, 2)}", [draw(336, 336)], visual_token_budget=64), 20),
    (request(words(60, 4)), 19),
    (request(f"<image> {words(20, 3)}", [draw(336, 336, seed=1)], visual_token_budget=48), 18),
    (request(words(25, 8)), 40),
    (request(f"{words(5, 5)} <image> w7 <image>", [draw(90, 90), draw(336, 336)], visual_token_budget=32), 14),
    (request(f"{words(130, 7)} <image>", [draw(336, 336, seed=2)], visual_token_budget=32), 13),
    (request(words(9, 11)), 12),
    (request(f"<image> {words(30, 10)}", [draw(336, 336, seed=3)], visual_token_budget=64), 10),
]
"""What is asked, and how many tokens are generated. One more comes every other step."""
GONE = 3
"""Is aborted while all others decode."""


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


@pytest.fixture
def breakable(engine: Engine) -> Iterator[Engine]:
    yield engine
    wipe(engine)


def play(engine: Engine) -> tuple[list[Answer], int]:
    """All answers but that of the request that is aborted, and how often one was preempted."""
    dirty(engine)
    stepper = Stepper(engine)
    for number, (asked, num_tokens) in enumerate(ARRIVALS):
        stepper.add(str(number), asked, greedy(num_tokens))
        stepper.step(2)
    requests = list(stepper.scheduler.requests.values())
    stepper.abort(str(GONE))
    lent = stepper.pool.get_new_blocks(stepper.free_blocks)
    answers = stepper.answers([str(number) for number in range(len(ARRIVALS)) if number != GONE])
    stepper.pool.free_blocks(lent)
    return answers, sum(each.num_preemptions for each in requests)


@pytest.fixture(scope="module")
def eager(engine: Engine) -> list[Answer]:
    answers, preemptions = play(engine)
    assert preemptions > 0
    return answers


@pytest.mark.parametrize(
    ("sizes", "tolerance"), [(range(1, 9), 0.0), ((1, 2, 4, 8), SAME)], ids=["not padded", "padded"]
)
def test_replayed_steps_answer_as_eager_ones(
    engine: Engine, eager: list[Answer], sizes: Sequence[int], tolerance: float
) -> None:
    """Of as many rows to the last digit, on a CPU."""
    with replayed(engine, sizes) as replays:
        answers, preemptions = play(engine)
    assert preemptions > 0
    assert {num_reqs for num_reqs, _ in replays.sizes} == set(range(1, 9))
    assert {num_rows for _, num_rows in replays.sizes} == set(sizes)
    for one, answer in zip(eager, answers, strict=True):
        assert_same(one, answer, tolerance)


def ends_in_single_tokens(engine: Engine) -> Answer:
    """A prompt of which two steps hold one token each: the text between its images, and the text behind them."""
    dirty(engine)
    stepper = Stepper(engine)
    images = [draw(90, 90), draw(336, 336)]
    stepper.add("prompt", request("<image> w7 <image> w9", images, visual_token_budget=[48, 64]))
    with recorded_steps(engine) as chunks:
        for size in (72, 96, 96, 1):
            with step_size(engine, size):
                stepper.step()
        (answer,) = stepper.answers(["prompt"])
    assert [chunk.end - chunk.start for chunk in chunks][:5] == [72, 1, 96, 1, 1]
    return answer


def test_single_tokens_of_a_prompt_may_be_replayed(engine: Engine) -> None:
    """vLLM takes them for decodes. Only images that have passed may count."""
    expected = ends_in_single_tokens(engine)
    with replayed(engine) as replays:
        answer = ends_in_single_tokens(engine)
    assert len(replays.sizes) == 2 + len(answer.token_ids) - 1
    assert_same(expected, answer, tolerance=0)


@pytest.mark.parametrize(
    ("broken", "found"),
    [
        (sabotage.measure_outside_of_buffers, r"metadata\..*\.seq_lens"),
        (sabotage.lay_out_outside_of_buffers, r"inputs\.layout\.positions\.0"),
    ],
    ids=lambda sabotage: getattr(sabotage, "__name__", ""),
)
def test_the_watch_over_addresses_can_fail(
    breakable: Engine, monkeypatch: pytest.MonkeyPatch, broken: Sabotage, found: str
) -> None:
    broken(monkeypatch)
    with pytest.raises(AssertionError, match=f"a graph would read something else than .*{found}"), replayed(breakable):
        breakable.generate(ARRIVALS[0][0])


@pytest.mark.parametrize(
    "broken",
    [sabotage.measure_outside_of_buffers, sabotage.store_padding],
    ids=lambda sabotage: sabotage.__name__,
)
def test_the_law_of_replays_can_fail(breakable: Engine, monkeypatch: pytest.MonkeyPatch, broken: Sabotage) -> None:
    """What breaks replays alone: eager steps answer right."""
    batch = [asked for asked, _ in ARRIVALS[:3]]
    breakable.forget()
    expected = breakable.generate(*batch)
    broken(monkeypatch)
    breakable.forget()
    for one, answer in zip(expected, breakable.generate(*batch), strict=True):
        assert_same(one, answer)
    breakable.forget()
    with contextlib.suppress(AssertionError), replayed(breakable):
        answers = breakable.generate(*batch)
    assert max(difference(one, answer) for one, answer in zip(expected, answers, strict=True)) > 100 * SAME
