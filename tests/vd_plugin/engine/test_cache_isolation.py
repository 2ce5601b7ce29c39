"""No cache of vLLM ever answers one budget with another budget's entry: processor, encoder and prefix cache, all on.

Every answer of a warm engine is compared with that of a cold one, in log-probabilities. The last tests take our two
overrides away and see wrong answers, so the comparison can fail.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import engines
import pytest
from engines import Answer, Engine, draw, request
from staged import assert_same
from vllm.exceptions import VLLMValidationError

from vd_plugin import processor, request_checks
from vd_plugin.options import read_geometry
from vd_plugin.schedule import FULL, Budget, parse_budget, resolve, resolve_explicit

pytestmark = [pytest.mark.engine, pytest.mark.slow]

A, B = draw(640, 320, seed=1), draw(320, 640, seed=2)
ONE = "USER: <image>\nWhat is it? ASSISTANT:"
TWO = "USER: <image> and <image>\nDo they differ? ASSISTANT:"
BLOCK = 128
"""Tokens of a KV block on a CPU."""

EXPLICIT = [[40, 6]]
ASKED: list[dict[str, Any]] = [
    {},
    {"visual_token_budget": 640},
    {"visual_token_budget": 320},
    {"visual_token_budget": 160},
    {"visual_token_schedule": EXPLICIT},
]


@pytest.fixture(scope="module", params=[False, True], ids=["synchronous", "asynchronous"])
def engine(request: pytest.FixtureRequest, random_model: Any) -> Engine:
    engine = engines.start(random_model, asynchronous=request.param)
    config = engine.llm.llm_engine.vllm_config
    assert config.cache_config.enable_prefix_caching
    assert config.model_config.multimodal_config.mm_processor_cache_gb > 0
    return engine


synchronous = pytest.mark.parametrize("engine", [False], indirect=True, ids=["synchronous"])
"""For what the way to schedule has nothing to do with."""


@pytest.fixture(scope="module")
def cold(engine: Engine) -> Any:
    """The answer of a cold engine to a request, computed once. Call it before the engine is warmed."""
    answers: dict[str, Answer] = {}

    def ask(prompt: str, images: Sequence[Any], **asked: Any) -> Answer:
        key = repr((prompt, [id(image) for image in images], sorted(asked.items())))
        if key not in answers:
            engine.forget()
            answers[key] = _ask(engine, prompt, images, **asked)
            assert answers[key].num_cached_tokens == 0
        return answers[key]

    return ask


def test_budgets_of_one_image_in_every_order(engine: Engine, cold: Any) -> None:
    """A walk in which every budget follows every other, and itself, at once."""
    expected = [cold(ONE, [A], **asked) for asked in ASKED]
    for number, answer in enumerate(expected):
        assert answer.count(_image_token(engine)) == _placeholders(engine, A, ASKED[number])
        for other in expected[:number]:
            assert (answer.logprobs[0] - other.logprobs[0]).abs().max() > 1e-2
    engine.forget()
    for number in _walk_over_all_pairs(len(ASKED)):
        assert_same(_ask(engine, ONE, [A], **ASKED[number]), expected[number])


@synchronous
@pytest.mark.parametrize(
    ("first", "then"),
    [
        ([("A", 640)], [("A", 640), ("B", 320)]),
        ([("B", 320)], [("A", 640), ("B", 320)]),
        ([("A", 640)], [("A", 320), ("B", 640)]),
        ([("A", 640), ("B", 320)], [("A", 320), ("B", 640)]),
        ([("A", 640), ("B", 320)], [("B", 640), ("A", 320)]),
        ([("A", 640), ("B", 320)], [("B", 320), ("A", 640)]),
        ([("A", 640)], [("A", "full"), ("B", 320)]),
        ([("A", "full")], [("A", 160), ("B", "full")]),
        ([("B", 160)], [("A", 640), ("A", 320)]),
        ([("A", 320)], [("A", 640), ("A", 320)]),
        ([("A", 640), ("A", 320)], [("A", 320), ("A", 640)]),
    ],
    ids=str,
)
@pytest.mark.parametrize("uuids", [False, True], ids=["hashed", "uuids"])
def test_a_list_of_budgets_after_another_request(
    engine: Engine, cold: Any, first: list[Any], then: list[Any], uuids: bool
) -> None:
    images, budgets = _images(then)
    expected = cold(TWO, images, visual_token_budget=budgets)
    assert expected.count(_image_token(engine)) == sum(
        _placeholders(engine, image, {"visual_token_budget": budget})
        for image, budget in zip(images, budgets, strict=True)
    )
    engine.forget()
    for wanted in (first, then, then):
        images, budgets = _images(wanted)
        named = {"uuids": [name for name, _ in wanted]} if uuids else {}
        answer = _ask(engine, TWO if len(wanted) == 2 else ONE, images, visual_token_budget=budgets, **named)
        if wanted is then:
            assert_same(answer, expected)


@synchronous
def test_uuids_at_every_budget(engine: Engine, cold: Any) -> None:
    """A client's name for an image stands for the image, not for its budget."""
    expected = [cold(ONE, [A], **asked) for asked in ASKED]
    engine.forget()
    for number in _walk_over_all_pairs(len(ASKED)):
        assert_same(_ask(engine, ONE, [A], uuids=["picture"], **ASKED[number]), expected[number])


@synchronous
def test_a_cached_image_may_be_left_out_in_full_alone(engine: Engine, cold: Any) -> None:
    """A schedule needs the image's size, which a name alone does not tell."""
    expected = cold(ONE, [A])
    engine.forget()
    _ask(engine, ONE, [A], uuids=["picture"])
    _ask(engine, ONE, [A], uuids=["picture"], visual_token_budget=320)
    by_name = {**request(ONE, [A], uuids=["picture"]), "multi_modal_data": {"image": [None]}}
    (answer,) = engine.generate(by_name, num_tokens=2)
    assert_same(answer, expected)
    with pytest.raises(VLLMValidationError, match="send the image along with its uuid"):
        engine.generate({**by_name, "mm_processor_kwargs": {"visual_token_budget": 320}})


@synchronous
def test_a_clients_uuid_cannot_pose_as_a_schedule(engine: Engine, cold: Any) -> None:
    """Identifiers carry the schedule behind a mark; a name that holds the mark would meet a pruned image's entries."""
    expected = cold(ONE, [A])
    engine.forget()
    _ask(engine, ONE, [A], uuids=["picture"], visual_token_schedule=EXPLICIT)
    forged = _identifier_of(engine, request(ONE, [A], uuids=["picture"], visual_token_schedule=EXPLICIT))
    for asked in ({}, {"visual_token_budget": "full"}, {"visual_token_budget": 320}):
        try:
            answer = _ask(engine, ONE, [A], uuids=[forged], **asked)
        except VLLMValidationError:
            continue
        assert asked.get("visual_token_budget") != 320, "a schedule was put behind a schedule"
        assert_same(answer, expected)


@synchronous
def test_different_questions_about_one_image(engine: Engine, cold: Any) -> None:
    """Encoder and processor cache answer, the prefix cache in part."""
    questions = [ONE, "USER: <image>\nHow many? ASSISTANT:", "<image>", "USER: Well: <image> ASSISTANT:"]
    asked = [ASKED[1], ASKED[3], ASKED[0], ASKED[4]]
    expected = {(q, n): cold(q, [A], **kwargs) for q in questions for n, kwargs in enumerate(asked)}
    engine.forget()
    for (question, number), answer in list(expected.items()) + list(reversed(expected.items())):
        assert_same(_ask(engine, question, [A], **asked[number]), answer)


def test_the_prefix_cache_answers_the_same_budget_alone(engine: Engine) -> None:
    before = "USER: " + "Look at the picture. " * 60
    prompt = before + "<image>\nWhat is it? ASSISTANT:"
    engine.forget()
    first = _ask(engine, prompt, [A], visual_token_budget=640)
    start = first.prompt_token_ids.index(_image_token(engine))
    assert first.num_cached_tokens == 0
    assert start > BLOCK

    again = _ask(engine, prompt, [A], visual_token_budget=640)
    assert again.num_cached_tokens == (len(again.prompt_token_ids) - 1) // BLOCK * BLOCK
    assert again.num_cached_tokens > start + BLOCK
    assert_same(again, first)

    for asked in ({"visual_token_budget": 320}, {"visual_token_budget": 700}, {"visual_token_schedule": EXPLICIT}, {}):
        other = _ask(engine, prompt, [A], **asked)
        assert other.num_cached_tokens == start // BLOCK * BLOCK
    other = _ask(engine, prompt, [B], visual_token_budget=640)
    assert other.num_cached_tokens == start // BLOCK * BLOCK


@synchronous
def test_a_neighbours_budget_costs_no_cache_hit(engine: Engine) -> None:
    """The first image's blocks serve again when only the second one's budget changes."""
    engine.forget()
    _ask(engine, TWO, [A, B], visual_token_budget=[640, 320])
    answer = _ask(engine, TWO, [A, B], visual_token_budget=[640, 160])
    alone = _placeholders(engine, A, {"visual_token_budget": 640})
    assert answer.num_cached_tokens >= alone // BLOCK * BLOCK


# The overrides taken away


def _stock_hashes(self: Any, inputs: Any) -> Any:
    """vLLM's own, which hold the whole request's keywords: one image at two budgets in one request is one entry."""
    return inputs.get_mm_hashes(self.info.model_id, self.info.ctx.get_mm_config().mm_hasher_algorithm)


def _hashes_without_budget(self: Any, inputs: Any) -> Any:
    return _stock_hashes(self, replace(inputs, hf_processor_mm_kwargs={}))


def _stock_kwargs(self: Any, inputs: Any, mm_is_cached: Any) -> Any:
    """vLLM's own: the missing images are processed with the keywords of all."""
    return inputs.hf_processor_mm_kwargs


@pytest.mark.parametrize(
    ("method", "broken", "first", "then"),
    [
        ("_get_mm_hashes", _stock_hashes, [], [("A", 640), ("A", 320)]),
        ("_get_mm_hashes", _hashes_without_budget, [("A", 640)], [("A", 320)]),
        ("_get_mm_hashes", _hashes_without_budget, [("A", "full")], [("A", 320)]),
        ("_get_cache_missing_processor_kwargs", _stock_kwargs, [("A", 640)], [("A", 640), ("B", 320)]),
    ],
)
def test_without_our_override_answers_are_wrong(
    random_model: Any, monkeypatch: pytest.MonkeyPatch, method: str, broken: Any, first: list[Any], then: list[Any]
) -> None:
    engine = engines.start(random_model)
    prompt = TWO if len(then) == 2 else ONE
    images, budgets = _images(then)
    expected = _ask(engine, prompt, images, visual_token_budget=budgets)
    engine.forget()
    monkeypatch.setattr(processor._BudgetProcessor, method, broken)
    monkeypatch.setattr(request_checks, "check_request", lambda *_: None)  # which would notice some of it
    try:
        for image, budget in zip(*_images(first), strict=True):
            _ask(engine, ONE, [image], visual_token_budget=[budget])
        assert _is_wrong(engine, expected, prompt, images, budgets)
    finally:
        monkeypatch.undo()
        engines.stop()  # wrong rows may have broken more than this answer


def _is_wrong(engine: Engine, expected: Answer, prompt: str, images: list[Any], budgets: list[Any]) -> bool:
    try:
        answer = _ask(engine, prompt, images, visual_token_budget=budgets)
    except Exception:  # whichever, from zip to the engine's own assertions
        return True
    if answer.prompt_token_ids != expected.prompt_token_ids:
        return True
    return bool((answer.logprobs[0] - expected.logprobs[0]).abs().max() > 1e-2)


def _ask(engine: Engine, *args: Any, **kwargs: Any) -> Answer:
    return engine.ask(*args, num_tokens=2, **kwargs)


def _images(wanted: list[Any]) -> tuple[list[Any], list[Budget]]:
    return [{"A": A, "B": B}[name] for name, _ in wanted], [budget for _, budget in wanted]


def _identifier_of(engine: Engine, asked: dict[str, Any]) -> str:
    """What vLLM's caches call the image of a request."""
    processor_of = engine.llm.renderer.mm_processor
    items = processor_of.info.parse_mm_data(asked["multi_modal_data"])
    inputs = processor_of(asked["prompt"], items, asked["multi_modal_uuids"], asked["mm_processor_kwargs"])
    (identifier,) = inputs["mm_hashes"]["image"]
    return str(identifier)


def _placeholders(engine: Engine, image: Any, asked: dict[str, Any]) -> int:
    geometry = read_geometry(engine.llm.model_config.hf_config)
    if "visual_token_schedule" in asked:
        schedule = resolve_explicit(geometry, image.height, image.width, asked["visual_token_schedule"])
    else:
        budget = parse_budget(asked.get("visual_token_budget", FULL))
        schedule = resolve(geometry, image.height, image.width, budget)
    return schedule.num_placeholders


def _image_token(engine: Engine) -> int:
    return int(engine.llm.model_config.hf_config.image_token_index)


def _walk_over_all_pairs(count: int) -> list[int]:
    """A closed walk over the numbers below `count` that takes every ordered pair, equal ones too, exactly once."""
    left = {start: list(range(count)) for start in range(count)}
    stack, walk = [0], []
    while stack:
        if left[stack[-1]]:
            stack.append(left[stack[-1]].pop())
        else:
            walk.append(stack.pop())
    assert len(walk) == count**2 + 1
    assert len(set(pairwise(walk))) == count**2
    return walk[::-1]
