"""A request's answer does not depend on what shares its steps, and a refused one leaves no trace."""

from __future__ import annotations

from typing import Any

import engines
import pytest
from engines import Answer, Engine, draw, request
from staged import assert_same
from vllm.exceptions import VLLMValidationError

pytestmark = [pytest.mark.engine, pytest.mark.slow]

ASK = "USER: <image>\nWhat is it? ASSISTANT:"
REQUESTS = [
    request(ASK, [draw(640, 320, seed=1)], visual_token_budget=320),
    request("USER: Tell me something. ASSISTANT:"),
    request(ASK, [draw(500, 480, seed=2)], visual_token_budget=160),
    request(ASK, [draw(640, 320, seed=1)], visual_token_budget=640),
    request("<image> or <image>?", [draw(90, 300, seed=3), draw(640, 320, seed=1)], visual_token_budget=[32, 320]),
    request(ASK, [draw(320, 640, seed=4)]),
    request("<image>", [draw(900, 200, seed=5)], visual_token_schedule=[[1, 0]]),
    request(ASK, [draw(250, 500, seed=7)]),
    request("Is this <image> it?", [draw(336, 336, seed=6)], visual_token_schedule=[[100, 20]]),
]
BAD: list[Any] = [0, 31, -1, 1.5, True, "lots", [320, 320]]


@pytest.fixture(scope="module")
def engine(random_model: Any) -> Engine:
    return engines.start(random_model)


@pytest.fixture(scope="module")
def alone(engine: Engine) -> list[Answer]:
    answers = []
    for asked in REQUESTS:
        engine.forget()
        answers += engine.generate(asked)
    return answers


@pytest.mark.parametrize("order", [1, -1], ids=["forward", "backward"])
def test_a_batch_answers_as_each_request_alone(engine: Engine, alone: list[Answer], order: int) -> None:
    """More tokens than one step takes: some images wait while others are being answered."""
    engine.forget()
    assert sum(len(answer.prompt_token_ids) for answer in alone) > engines.FAST["max_num_batched_tokens"]
    together = engine.generate(*REQUESTS[::order])[::order]
    for answer, expected in zip(together, alone, strict=True):
        assert_same(answer, expected)


def test_a_warm_batch_answers_the_same(engine: Engine, alone: list[Answer]) -> None:
    engine.generate(*REQUESTS)
    for answer, expected in zip(engine.generate(*REQUESTS), alone, strict=True):
        assert_same(answer, expected)


def test_answers_differ_enough_to_be_told_apart(alone: list[Answer]) -> None:
    for number, answer in enumerate(alone):
        for other in alone[:number]:
            assert (answer.logprobs[0] - other.logprobs[0]).abs().max() > 1e-2


@pytest.mark.parametrize("budget", BAD, ids=repr)
def test_after_a_bad_request_the_engine_goes_on(engine: Engine, alone: list[Answer], budget: object) -> None:
    """Also one that comes in the middle of a batch: those before it are answered or dropped, not mixed up."""
    bad = {**REQUESTS[0], "mm_processor_kwargs": {"visual_token_budget": budget}}
    with pytest.raises(VLLMValidationError, match=r"visual.token.budget"):
        engine.generate(bad)
    (answer,) = engine.generate(REQUESTS[0])
    assert_same(answer, alone[0])
    with pytest.raises(VLLMValidationError, match=r"visual.token.budget"):
        engine.generate(REQUESTS[2], bad, REQUESTS[1])
    first, second = engine.generate(REQUESTS[1], REQUESTS[0])
    assert_same(first, alone[1])
    assert_same(second, alone[0])


def test_a_prompt_without_its_image_is_refused(engine: Engine, alone: list[Answer]) -> None:
    """Two images, one placeholder: refused in the front end, and the engine goes on."""
    two = request("Only <image>", [draw(90, 90), draw(90, 90, seed=1)], visual_token_budget=160)
    with pytest.raises(VLLMValidationError, match=r"1 image token\(s\) for 2 image"):
        engine.generate(two)
    (answer,) = engine.generate(REQUESTS[0])
    assert_same(answer, alone[0])
