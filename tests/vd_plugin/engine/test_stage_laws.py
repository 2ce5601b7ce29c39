"""Laws of staged pruning on the real engine: what a request's answer must not depend on.

Each law compares log-probabilities of the whole vocabulary, and each comparison is shown to fail when the engine is
broken on purpose (`sabotage.py`). Tolerance: `staged.SAME`.
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
from mixed_batch import IMAGES, PROMPT, mixed_batch
from sabotage import Sabotage
from staged import LAYERS, SAME, assert_same, checkpoint, difference, largest, wipe, words

pytestmark = [pytest.mark.engine, pytest.mark.slow]

FULL = request(f"{words(5)} <image> {words(5, 1)}", [draw(640, 320)])
STOCK = {
    "full": FULL,
    "full, asked for": {**FULL, "mm_processor_kwargs": {"visual_token_budget": "full"}},
    "full, last": request(f"{words(5)} <image>", [draw(320, 640, seed=1)], visual_token_budget="full"),
    "text": request(words(40)),
    "one word": request(words(1)),
}


@pytest.fixture(scope="module")
def folder(random_model: Path) -> Path:
    return checkpoint("llavanext_m8", random_model)


@pytest.fixture(scope="module")
def stock(folder: Path) -> dict[str, Answer]:
    engine = engines.start_stock(folder, max_num_seqs=16)
    bare = {name: {k: v for k, v in asked.items() if k != "mm_processor_kwargs"} for name, asked in STOCK.items()}
    return {name: engine.generate(asked)[0] for name, asked in bare.items()}


@pytest.fixture(scope="module")
def engine(folder: Path, stock: dict[str, Answer]) -> Engine:
    return engines.start(folder, layers=LAYERS, max_num_seqs=16)


@pytest.fixture
def breakable(engine: Engine) -> Iterator[Engine]:
    yield engine
    wipe(engine)


def each_alone(engine: Engine, batch: list[dict[str, Any]]) -> list[Answer]:
    answers = []
    for asked in batch:
        engine.forget()
        answers += engine.generate(asked)
    return answers


def together(engine: Engine, batch: list[dict[str, Any]]) -> list[Answer]:
    engine.forget()
    return engine.generate(*batch)


def as_prompts(engine: Engine, answer: Answer) -> list[dict[str, Any]]:
    """The images' prompt with ever more of its own answer behind it."""
    ids = engine.llm.get_tokenizer().encode(PROMPT)
    return [
        {**request("", IMAGES, visual_token_budget=[64, 160]), "prompt_token_ids": [*ids, *answer.token_ids[:count]]}
        for count in range(1, len(answer.token_ids))
    ]


def prefilled(engine: Engine, answer: Answer) -> list[Answer]:
    """What follows each piece of an answer that is part of the prompt."""
    prompts = [{k: v for k, v in asked.items() if k != "prompt"} for asked in as_prompts(engine, answer)]
    answers = []
    for count, asked in enumerate(prompts, start=1):
        engine.forget()
        (again,) = engine.generate(asked, num_tokens=1)
        assert again.prompt_token_ids == answer.prompt_token_ids + answer.token_ids[:count]
        answers.append(again)
    return answers


def decode_error(answer: Answer, again: list[Answer]) -> float:
    return max(largest(answer.logprobs[count] - other.logprobs[0]) for count, other in enumerate(again, start=1))


@pytest.fixture(scope="module")
def alone(engine: Engine) -> list[Answer]:
    return each_alone(engine, mixed_batch())


@pytest.mark.parametrize("name", STOCK)
def test_full_and_text_only_equal_stock_vllm(engine: Engine, stock: dict[str, Answer], name: str) -> None:
    engine.forget()
    (answer,) = engine.generate(STOCK[name])
    assert_same(answer, stock[name], tolerance=1e-5)


def test_full_and_text_only_beside_pruned_requests_equal_stock_vllm(engine: Engine, stock: dict[str, Answer]) -> None:
    batch = [asked for pair in zip(mixed_batch(), STOCK.values(), strict=False) for asked in pair]
    for name, answer in zip(STOCK, together(engine, batch)[1::2], strict=True):
        assert_same(answer, stock[name])


@pytest.mark.parametrize("name", ["full", "text"])
def test_the_law_of_stock_equality_can_fail(
    breakable: Engine, stock: dict[str, Answer], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    sabotage.shift_slots(monkeypatch)
    breakable.forget()
    (answer,) = breakable.generate(STOCK[name])
    assert difference(answer, stock[name]) > 100 * SAME


def test_alone_equals_in_a_batch_of_sixteen(engine: Engine, alone: list[Answer]) -> None:
    for number, (one, answer) in enumerate(zip(alone, together(engine, mixed_batch()), strict=True)):
        assert_same(one, answer)
        print(number, difference(one, answer))


def test_norms_may_overwrite_what_they_are_given(engine: Engine, alone: list[Answer]) -> None:
    """As a GPU's do."""
    with norms_in_place(engine):
        answers = together(engine, mixed_batch())
    for one, answer in zip(alone, answers, strict=True):
        assert_same(one, answer)


def test_the_law_of_norms_can_fail(breakable: Engine, alone: list[Answer], monkeypatch: pytest.MonkeyPatch) -> None:
    sabotage.read_what_a_norm_overwrites(monkeypatch)
    batch = mixed_batch()[:2]
    for one, answer in zip(alone, together(breakable, batch), strict=False):
        assert_same(one, answer)
    with norms_in_place(breakable):
        answers = together(breakable, batch)
    assert max(difference(one, answer) for one, answer in zip(alone, answers, strict=False)) > 100 * SAME


def test_order_in_the_batch_does_not_matter(engine: Engine, alone: list[Answer]) -> None:
    for one, answer in zip(reversed(alone), together(engine, mixed_batch()[::-1]), strict=True):
        assert_same(one, answer)


def test_each_image_is_pruned_by_its_own_schedule(engine: Engine) -> None:
    """The first image's plans and rows do not depend on what the second one asks for, and reversed budgets differ."""
    one, same, other = (engine.ask(PROMPT, IMAGES, visual_token_budget=b) for b in ([64, 160], [64, 160], [160, 64]))
    assert_same(one, same)
    assert float((one.logprobs[0] - other.logprobs[0]).abs().max()) > 100 * SAME


def test_decoding_equals_prefilling_again(engine: Engine) -> None:
    engine.forget()
    answer = engine.ask(PROMPT, IMAGES, visual_token_budget=[64, 160], num_tokens=6)
    assert decode_error(answer, prefilled(engine, answer)) <= engines.within(SAME)


@pytest.mark.parametrize(
    "broken",
    [
        sabotage.keep_the_wrong_tokens,
        sabotage.merge_into_the_wrong_anchor,
        sabotage.take_the_first_request_for_all,
        sabotage.keep_the_slot_of_another,
        sabotage.shift_slots,
        sabotage.shift_positions,
        sabotage.forget_what_was_dropped,
        sabotage.continue_from_the_first_row,
    ],
    ids=lambda sabotage: sabotage.__name__,
)
def test_the_batch_law_can_fail(
    breakable: Engine, alone: list[Answer], monkeypatch: pytest.MonkeyPatch, broken: Sabotage
) -> None:
    broken(monkeypatch)
    answers = together(breakable, mixed_batch()[4:12])
    worst = max(difference(one, answer) for one, answer in zip(alone[4:12], answers, strict=True))
    assert worst > 100 * SAME


@pytest.mark.parametrize(
    "broken",
    [sabotage.shift_positions, sabotage.shift_slots, sabotage.forget_what_was_dropped],
    ids=lambda sabotage: sabotage.__name__,
)
def test_the_law_of_decoding_can_fail(breakable: Engine, monkeypatch: pytest.MonkeyPatch, broken: Sabotage) -> None:
    """Both sides run broken here: the law finds the bug without an oracle."""
    broken(monkeypatch)
    breakable.forget()
    answer = breakable.ask(PROMPT, IMAGES, visual_token_budget=[64, 160], num_tokens=6)
    assert decode_error(answer, prefilled(breakable, answer)) > 100 * SAME
