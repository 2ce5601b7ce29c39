"""Laws of staged pruning on the real engine: how a prompt is cut into steps must not matter, and no image is cut.

One engine runs them all: the size of a step is changed in its live scheduler, which reads it anew at every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engines
import pytest
import sabotage
from engines import Answer, Engine, draw, request
from inplace_norm import norms_in_place
from sabotage import Sabotage
from staged import (
    LAYERS,
    SAME,
    Chunk,
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

pytestmark = [pytest.mark.engine, pytest.mark.slow]

NUM_SEQS = 16
SMALLEST = 576 + NUM_SEQS
"""What the engine itself demands of `max_num_batched_tokens`: the largest image beside every decode."""

LONG = request(
    f"{words(1100)} <image> {words(30, 1)} <image> {words(5, 2)}",
    [draw(336, 336), draw(200, 300, seed=1)],
    visual_token_budget=[64, 48],
)
FIRST = request(f"<image> {words(8, 3)}", [draw(336, 336, seed=2)], visual_token_budget=64)
LAST = request(f"{words(300, 4)} <image>", [draw(336, 336, seed=3)], visual_token_budget=64)
PROMPTS = {"long text before, text between": LONG, "image first": FIRST, "image last": LAST}


@pytest.fixture(scope="module", params=[False, True], ids=["synchronous", "asynchronous"])
def engine(request: pytest.FixtureRequest, llava15: Path) -> Engine:
    return engines.start(
        checkpoint("llava15_gqa8", llava15),
        layers=LAYERS,
        max_num_seqs=NUM_SEQS,
        enable_prefix_caching=False,
        asynchronous=request.param,
    )


synchronous = pytest.mark.parametrize("engine", [False], indirect=True, ids=["synchronous"])
"""For what the way to schedule has nothing to do with."""


@pytest.fixture
def breakable(engine: Engine) -> Iterator[Engine]:
    yield engine
    wipe(engine)


@pytest.fixture(scope="module")
def at_once(engine: Engine) -> dict[str, Answer]:
    """Each prompt alone and in a single step."""
    answers = {}
    for name, asked in PROMPTS.items():
        with recorded_steps(engine) as chunks:
            (answers[name],) = engine.generate(asked)
        assert len([chunk for chunk in chunks if chunk.end - chunk.start > 1]) == 1
    return answers


def cut(engine: Engine, asked: dict[str, Any], num_tokens: int) -> tuple[Answer, list[Chunk]]:
    with step_size(engine, num_tokens), recorded_steps(engine) as chunks:
        (answer,) = engine.generate(asked)
    return answer, chunks


@synchronous
def test_the_engine_makes_room_for_its_largest_image(engine: Engine) -> None:
    assert engine.llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens >= SMALLEST


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("num_tokens", [SMALLEST, 1024, 120, 97])
def test_steps_of_any_size_give_the_same_answer(
    engine: Engine, at_once: dict[str, Answer], name: str, num_tokens: int
) -> None:
    answer, chunks = cut(engine, PROMPTS[name], num_tokens)
    assert all(chunk.is_whole for chunk in chunks)
    if len(answer.prompt_token_ids) > num_tokens:
        assert sum(chunk.end - chunk.start > 1 for chunk in chunks) > 1
    assert_same(answer, at_once[name])


@synchronous
def test_norms_may_overwrite_what_they_are_given(engine: Engine, at_once: dict[str, Answer]) -> None:
    """As a GPU's do."""
    with norms_in_place(engine):
        answer, _ = cut(engine, LONG, SMALLEST)
    assert_same(answer, at_once["long text before, text between"])


@synchronous
@pytest.mark.parametrize(
    ("edge", "shift", "reached"),
    [("offset", -1, -1), ("offset", 0, 0), ("offset", 1, 0), ("end", -1, -96), ("end", 0, 0), ("end", 1, 1)],
)
def test_a_step_that_ends_near_the_edge_of_an_image_gives_the_same_answer(
    engine: Engine, at_once: dict[str, Answer], edge: str, shift: int, reached: int
) -> None:
    with recorded_steps(engine) as chunks:
        engine.generate(LONG, num_tokens=1)
    span = chunks[0].spans[0]
    assert span.end - span.offset == 96
    answer, chunks = cut(engine, LONG, getattr(span, edge) + shift)
    assert all(chunk.is_whole for chunk in chunks)
    assert chunks[0].end == getattr(span, edge) + reached
    assert_same(answer, at_once["long text before, text between"])


@pytest.mark.parametrize("name", PROMPTS)
def test_an_image_beside_decoding_neighbours_gives_the_same_answer(
    engine: Engine, at_once: dict[str, Answer], name: str
) -> None:
    """Requests arrive while others decode, in steps that hold little more than one image."""
    stepper = Stepper(engine)
    with step_size(engine, 130), recorded_steps(engine) as chunks:
        neighbours = [
            stepper.add("text", request(words(20, 5)), greedy(60)),
            stepper.add("pruned", {**FIRST, "prompt": f"{words(3, 6)} <image>"}, greedy(60)),
            stepper.add("last", LAST, greedy(60)),
        ]
        stepper.run(lambda: all(stepper.num_tokens(neighbour) > 1 for neighbour in neighbours))
        stepper.add("late", PROMPTS[name])
        stepper.run(lambda: stepper.is_done("late"))
        answer = stepper.answer("late")
        stepper.abort_all()
    late = [chunk for chunk in chunks if chunk.req_id.startswith("late")]
    beside = {chunk.step for chunk in chunks if chunk.req_id.startswith("text")}
    images = [chunk for chunk in late if any(chunk.start <= span.offset < chunk.end for span in chunk.spans)]
    assert images
    assert {chunk.step for chunk in images} <= beside
    assert all(chunk.is_whole for chunk in chunks)
    assert_same(answer, at_once[name])


def test_no_image_starves_behind_decodes_and_text(engine: Engine) -> None:
    """Every step brings another prompt of text, and a step has room for hardly more than the image."""
    stepper = Stepper(engine)
    with step_size(engine, 96 + NUM_SEQS), recorded_steps(engine) as chunks:
        for number in range(NUM_SEQS - 2):
            stepper.add(f"early {number}", request(words(40, number)), greedy(30))
        stepper.step(3)
        stepper.add("image", FIRST)
        arrived = len({chunk.step for chunk in chunks})
        for number in range(60):
            stepper.add(f"flood {number}", request(words(90, number)), greedy(2))
            stepper.step()
            if stepper.num_tokens("image"):
                break
        image = next(chunk for chunk in chunks if chunk.req_id.startswith("image"))
        # 14 prompts of 40 tokens are before it in the queue, and nothing that came later overtakes it.
        assert image.step - arrived <= 8
        assert image.is_whole
        stepper.abort_all()


def test_an_image_behind_a_long_text_of_its_own_does_not_starve(engine: Engine) -> None:
    """It runs already: newcomers that fit into what a step has left must not push it back for ever."""
    stepper = Stepper(engine)
    with step_size(engine, 97), recorded_steps(engine) as chunks:
        stepper.add("image", LAST)
        for number in range(40):
            stepper.add(f"flood {number}", request(words(60, number)), greedy(2))
            stepper.step()
            if stepper.num_tokens("image"):
                break
        (image,) = [
            chunk for chunk in chunks if chunk.req_id.startswith("image") and chunk.end > chunk.spans[0].offset
        ][:1]
        assert image.step <= 6
        stepper.abort_all()


@synchronous
@pytest.mark.parametrize(
    "broken",
    [
        sabotage.keep_the_wrong_tokens,
        sabotage.score_without_context,
        sabotage.read_other_keys,
        sabotage.forget_what_was_dropped,
        sabotage.shift_slots,
        sabotage.shift_positions,
    ],
    ids=lambda sabotage: sabotage.__name__,
)
def test_the_law_of_chunks_can_fail(
    breakable: Engine, at_once: dict[str, Answer], monkeypatch: pytest.MonkeyPatch, broken: Sabotage
) -> None:
    broken(monkeypatch)
    answer, _ = cut(breakable, LONG, SMALLEST)
    assert difference(answer, at_once["long text before, text between"]) > 100 * SAME


def test_the_watch_over_whole_images_can_fail(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Last: the model runner refuses to go on, and the engine with it."""
    sabotage.split_images(monkeypatch)
    with step_size(engine, 350), recorded_steps(engine) as chunks:
        with pytest.raises(AssertionError, match="an image was split between steps"):
            engine.generate(LAST)
        assert not all(chunk.is_whole for chunk in chunks)
    engines.stop()
