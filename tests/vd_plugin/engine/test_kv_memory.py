"""KV memory on the live engine: blocks of every stage as the schedule predicts, and a prefix cache that is never wrong.

The largest image of a LLaVA-NeXT, 2,928 tokens in full, in blocks of 128 rows. The cache holds two such images.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sabotage
from engines import Answer, Engine, draw, request
from staged import SAME, Stepper, assert_same, difference, greedy, start_large, wipe, words

from vd_plugin.kv_capacity import image_blocks
from vd_plugin.options import read_geometry
from vd_plugin.schedule import Schedule, resolve

pytestmark = [pytest.mark.engine, pytest.mark.slow]

IMAGE = draw(672, 672)
BUDGETS = {"full": 92, 640: 8 + 6 + 5 + 3, 320: 4 + 3 + 3 + 2, 160: 2 + 2 + 2 + 1}
"""Blocks of 128 rows that the image alone takes, over four stages."""
NUM_TOKENS = {"full": 20, 640: 8, 320: 36, 160: 20}
"""To generate: until some stage needs another block."""

BEFORE, BEHIND = words(100), words(200, 1)
"""Texts that are longer than a block, with any tokenizer."""


@pytest.fixture(scope="module")
def engine(random_model: Path) -> Engine:
    return start_large(random_model)


@pytest.fixture
def breakable(engine: Engine) -> Iterator[Engine]:
    yield engine
    wipe(engine)


@pytest.fixture
def stepper(engine: Engine) -> Iterator[Stepper]:
    engine.forget()
    stepper = Stepper(engine)
    free = stepper.free_blocks
    yield stepper
    assert stepper.free_blocks == free, "every block came back"


def schedule_of(engine: Engine, budget: Any) -> Schedule:
    schedule = resolve(read_geometry(engine.llm.model_config.hf_config), IMAGE.height, IMAGE.width, budget)
    assert schedule.full == 2928
    return schedule


def predict(stepper: Stepper, schedule: Schedule, num_text: int) -> list[int]:
    """Blocks by group: ceil((text + the stage's rows) / block size)."""
    specs = [manager.kv_cache_spec for manager in stepper.managers]
    return [-(-(num_text + schedule.rows[spec.stage]) // spec.block_size) for spec in specs]


def groups(stepper: Stepper) -> list[tuple[int, int]]:
    return [(manager.kv_cache_spec.stage, manager.kv_cache_spec.block_size) for manager in stepper.managers]


@pytest.mark.parametrize("budget", BUDGETS)
def test_blocks_are_those_of_the_schedule(engine: Engine, stepper: Stepper, budget: Any) -> None:
    """The image alone, then with ever more text behind it, group by group and at every step."""
    schedule = schedule_of(engine, budget)
    free = stepper.free_blocks
    stepper.add("picture", request("<image>", [IMAGE], visual_token_budget=budget), greedy(NUM_TOKENS[budget]))
    stepper.step()
    assert sorted(stage for stage, _ in groups(stepper)) == [0, 1, 2, 3]
    assert free - stepper.free_blocks == image_blocks(schedule, groups(stepper)) == BUDGETS[budget]
    before = stepper.blocks("picture")
    while not stepper.is_done("picture"):
        # The last token that was sampled is not in the cache yet.
        num_text = stepper.num_tokens("picture") - 1
        assert stepper.blocks("picture") == predict(stepper, schedule, num_text)
        assert free - stepper.free_blocks == sum(predict(stepper, schedule, num_text))
        after = stepper.blocks("picture")
        stepper.step()
    assert after != before
    assert stepper.free_blocks == free


@pytest.mark.parametrize("budget", [640, 160])
def test_blocks_of_text_and_two_images_are_those_of_their_schedules(
    engine: Engine, stepper: Stepper, budget: int
) -> None:
    prompt = f"{words(7)} <image> {words(9, 1)} <image> {words(5, 2)}"
    stepper.add("two", request(prompt, [IMAGE, IMAGE], visual_token_budget=budget), greedy(3))
    stepper.step()
    (output,) = stepper.outputs["two"]
    schedule = schedule_of(engine, budget)
    num_text = len(output.prompt_token_ids) - 2 * schedule.num_placeholders
    expected = [-(-(num_text + 2 * schedule.rows[stage]) // size) for stage, size in groups(stepper)]
    assert stepper.blocks("two") == expected
    stepper.run()


def crowd(stepper: Stepper, count: int, budget: Any, num_text: int) -> tuple[int, int]:
    """Largest number of requests that ran at once, and how often one was preempted."""
    image = stepper.engine.llm.model_config.hf_config.image_token_index
    asked = request("", [IMAGE], visual_token_budget=budget)
    del asked["prompt"]
    for number in range(count):
        # Each begins with another token, so that they share nothing in the prefix cache.
        ids = [40 + number, *[9] * (num_text - 1), image]
        stepper.add(f"crowd {number}", {**asked, "prompt_token_ids": ids}, greedy(8))
    most = 0
    requests = list(stepper.scheduler.requests.values())
    while stepper.llm_engine.has_unfinished_requests():
        stepper.step()
        most = max(most, len(stepper.scheduler.running))
    return most, sum(each.num_preemptions for each in requests)


def test_sixteen_small_requests_fit_where_full_ones_are_preempted(stepper: Stepper) -> None:
    # 12 tokens of text fill the 23rd block of a full image but for four rows: two fit, until they grow.
    assert crowd(stepper, 2, "full", 12) == (2, 1)
    assert crowd(stepper, 16, 160, 12) == (16, 0)


def test_the_law_of_blocks_can_fail(breakable: Engine, stepper: Stepper, monkeypatch: pytest.MonkeyPatch) -> None:
    sabotage.allocate_for_the_original_tokens(monkeypatch)
    schedule = schedule_of(breakable, 160)
    stepper.add("picture", request(f"{words(9)} <image>", [IMAGE], visual_token_budget=160), greedy(9))
    stepper.step()
    num_text = stepper.computed("picture") - schedule.num_placeholders
    assert stepper.blocks("picture") != predict(stepper, schedule, num_text)
    stepper.abort("picture")


def ask(engine: Engine, prompt: str, budget: Any = None, seed: int = 0) -> Answer:
    asked = {} if budget is None else {"visual_token_budget": budget}
    return engine.ask(prompt, [draw(640, 320, seed)] if "<image>" in prompt else [], **asked)


Asked = tuple[str, Any]
ONE: Asked = (f"{BEFORE} <image> {BEHIND}", 160)
FOLLOWING: dict[str, tuple[Asked, bool]] = {
    "again": (ONE, True),
    "another question": ((f"{BEFORE} <image> {words(200, 2)}", 160), True),
    "another budget": ((f"{BEFORE} <image> {BEHIND}", 100), True),
    "in full": ((f"{BEFORE} <image> {BEHIND}", "full"), True),
    "text alone": ((f"{BEFORE} {BEHIND}", None), True),
    "another text before": ((f"w9 {BEFORE} <image> {BEHIND}", 160), False),
    "no text before": ((f"<image> {BEHIND}", 160), False),
}
"""What is asked after ONE, and whether it shares text with it."""


@pytest.fixture(scope="module")
def cold(engine: Engine) -> dict[str, Answer]:
    answers = {}
    for name, (asked, _) in FOLLOWING.items():
        engine.forget()
        answers[name] = ask(engine, *asked)
        assert answers[name].num_cached_tokens == 0
    return answers


@pytest.mark.parametrize("name", FOLLOWING)
def test_only_text_before_the_image_comes_out_of_the_cache(engine: Engine, cold: dict[str, Answer], name: str) -> None:
    asked, is_shared = FOLLOWING[name]
    engine.forget()
    ask(engine, *ONE)
    answer = ask(engine, *asked)
    image = engine.llm.model_config.hf_config.image_token_index
    before = cold["again"].prompt_token_ids.index(image)
    assert before > 128
    assert answer.num_cached_tokens == (before // 128 * 128 if is_shared else 0)
    assert_same(answer, cold[name])


def test_all_in_a_row_and_at_once_equal_a_cold_engine(engine: Engine, cold: dict[str, Answer]) -> None:
    """Every cache as full as it gets, twice over, then all in one batch."""
    engine.forget()
    for name in [*FOLLOWING, *reversed(FOLLOWING)]:
        assert_same(ask(engine, *FOLLOWING[name][0]), cold[name])
    batch = [
        request(prompt, [draw(640, 320)] if "<image>" in prompt else [], **({"visual_token_budget": b} if b else {}))
        for (prompt, b), _ in FOLLOWING.values()
    ]
    for name, answer in zip(FOLLOWING, engine.generate(*batch), strict=True):
        assert_same(answer, cold[name])


def test_a_full_image_is_reused_whole_before_a_pruned_one(engine: Engine) -> None:
    """What is cached ends at the first image that is pruned, not at the first image."""
    prompt = f"{words(9)} <image> {words(9, 1)} <image> {BEHIND}"
    asked = request(prompt, [draw(640, 320), draw(320, 640)], visual_token_budget=["full", 100])
    engine.forget()
    (first,) = engine.generate(asked)
    (again,) = engine.generate(asked)
    image = engine.llm.model_config.hf_config.image_token_index
    ids = first.prompt_token_ids
    full = ids.index(image)
    while ids[full] == image:
        full += 1
    second = ids.index(image, full)
    assert again.num_cached_tokens == second // 128 * 128 > full // 128 * 128 - 128
    assert_same(again, first)


def interleave(engine: Engine) -> tuple[Answer, Answer]:
    """One question on an image before and after another one that parts from it late: both answers to the first."""
    start = f"{BEFORE} <image> {words(80, 3)}"
    engine.forget()
    first = ask(engine, f"{start} {BEHIND}", 160)
    ask(engine, f"{start} {words(200, 4)}", 160)
    return first, ask(engine, f"{start} {BEHIND}", 160)


def test_a_question_between_leaves_the_cache_as_it_was(engine: Engine) -> None:
    first, again = interleave(engine)
    assert again.num_cached_tokens > 0
    assert_same(first, again)


def test_the_law_of_the_prefix_cache_can_fail(breakable: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The question between writes its rows into blocks that the first one reads again."""
    sabotage.cache_what_was_pruned(monkeypatch)
    first, again = interleave(breakable)
    image = breakable.llm.model_config.hf_config.image_token_index
    assert again.num_cached_tokens > again.prompt_token_ids.index(image)
    assert difference(first, again) > 100 * SAME
    breakable.forget()
