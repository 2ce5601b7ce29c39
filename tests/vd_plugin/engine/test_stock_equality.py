"""Served in full, the plugin is vLLM's own model: same tokens, same log-probabilities, on the same checkpoint."""

from __future__ import annotations

from typing import Any

import engines
import pytest
from engines import Answer, Engine, draw, request
from staged import assert_same

pytestmark = [pytest.mark.engine, pytest.mark.slow]

EXACTLY = 1e-5
"""Largest difference of log-probabilities between two engines that do the same."""

FULL_WIDE = 576 + 24 * 48 + 24
"""Stock rows of a LLaVA-NeXT image of 640 x 320: base view, its tiles, a newline for each row of patches."""

REQUESTS: dict[str, tuple[Any, ...]] = {
    "one image": ("USER: <image>\nWhat is it? ASSISTANT:", [draw(640, 320)]),
    "another image": ("USER: <image>\nWhat is it? ASSISTANT:", [draw(640, 320, seed=1)]),
    "unpadded": ("USER: Look. <image>\nWhat is it? ASSISTANT:", [draw(640, 250, seed=2)]),
    "image first": ("<image>What is it?", [draw(90, 90, seed=3)]),
    "image last": ("What is it?<image>", [draw(90, 90, seed=3)]),
    "two images of different sizes": (
        "USER: <image>\nand <image>\nDo they differ? ASSISTANT:",
        [draw(640, 320), draw(250, 480, seed=4)],
    ),
    "two images of different tile counts": (
        "USER: <image>\nand <image>\nDo they differ? ASSISTANT:",
        [draw(900, 200, seed=5), draw(330, 660, seed=6)],
    ),
    "text only": ("USER: What is it? ASSISTANT:",),
}


@pytest.fixture(scope="module", params=["random_model", "llava15"])
def both(request: pytest.FixtureRequest) -> tuple[Engine, dict[str, Answer]]:
    """Our engine, and what the stock one answered before it."""
    folder = request.getfixturevalue(request.param)
    stock = engines.start_stock(folder)
    assert "VisionDrop" not in stock.on_model(lambda model: type(model).__name__)
    answers = {name: stock.ask(*arguments) for name, arguments in REQUESTS.items()}
    ours = engines.start(folder)
    assert "VisionDrop" in ours.on_model(lambda model: type(model).__name__)
    return ours, answers


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_without_our_key_is_answered_as_by_the_stock_model(
    both: tuple[Engine, dict[str, Answer]], name: str
) -> None:
    engine, stock = both
    assert_same(engine.ask(*REQUESTS[name]), stock[name], EXACTLY)


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("budget", ["full", 2928], ids=str)
def test_full_is_the_stock_model(both: tuple[Engine, dict[str, Answer]], name: str, budget: object) -> None:
    engine, stock = both
    engine.forget()
    assert_same(engine.ask(*REQUESTS[name], visual_token_budget=budget), stock[name], EXACTLY)


def test_a_budget_of_just_the_full_count_is_full(both: tuple[Engine, dict[str, Answer]]) -> None:
    """And one token less prunes: the boundary lies where it should."""
    engine, stock = both
    full = stock["one image"].count(engine.llm.model_config.hf_config.image_token_index)
    assert full in (FULL_WIDE, 576)
    for visual_token_budget, is_full in ((full, True), (full - 1, False)):
        answer = engine.ask(*REQUESTS["one image"], visual_token_budget=visual_token_budget)
        assert (len(answer.prompt_token_ids) == len(stock["one image"].prompt_token_ids)) is is_full
        if is_full:
            assert_same(answer, stock["one image"], EXACTLY)


def test_full_images_beside_pruned_ones_keep_the_stock_rows(both: tuple[Engine, dict[str, Answer]]) -> None:
    """Full and pruned requests meet in one step, and in one call of the encoder."""
    engine, stock = both
    engine.forget()
    asked = request(*REQUESTS["another image"], visual_token_budget=160)
    pruned, full, text = engine.generate(asked, request(*REQUESTS["unpadded"]), request(*REQUESTS["text only"]))
    assert_same(full, stock["unpadded"])
    assert_same(text, stock["text only"])
    assert len(pruned.prompt_token_ids) < len(stock["another image"].prompt_token_ids)


def test_a_shared_budget_may_be_full_for_one_image_alone(both: tuple[Engine, dict[str, Answer]]) -> None:
    engine, stock = both
    name = "two images of different sizes"
    budgets = ["full", 160]
    answer = engine.ask(*REQUESTS[name], visual_token_budget=budgets)
    (alone,) = engine.generate(request(*REQUESTS["one image"]), num_tokens=1)
    image = engine.llm.model_config.hf_config.image_token_index
    assert answer.count(image) < stock[name].count(image)
    assert answer.prompt_token_ids.index(image) == alone.prompt_token_ids.index(image)


def test_the_comparison_can_fail(both: tuple[Engine, dict[str, Answer]]) -> None:
    """Images and pruning change the answer by far more than the tolerance."""
    engine, stock = both
    assert (stock["one image"].logprobs - stock["another image"].logprobs).abs().max() > 1e-2
    pruned = engine.ask(*REQUESTS["one image"], visual_token_budget=320)
    assert (stock["one image"].logprobs[0] - pruned.logprobs[0]).abs().max() > 1e-2
