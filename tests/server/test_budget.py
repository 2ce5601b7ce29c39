"""Policy: classes and effective budgets."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fake_engine import GEOMETRY

from server.budget import CLASSES, budget_class, effective_budget, plan_images, request_class
from server.errors import InvalidRequestError
from server.images import CheckedImage
from vd_plugin.schedule import Budget, resolve

BIG = CheckedImage(672, 672, "")
SMALL = CheckedImage(30, 40, "")


@pytest.mark.parametrize(
    ("budget", "label"),
    [
        (32, "low"),
        (160, "low"),
        (161, "medium"),
        (320, "medium"),
        (321, "high"),
        (640, "high"),
        (10**9, "high"),
        ("full", "full"),
    ],
)
def test_class_is_the_smallest_preset_that_covers_the_number(budget: Budget, label: str) -> None:
    assert budget_class(budget) == label
    assert label in CLASSES


def test_class_of_a_request_is_the_largest_of_its_pictures() -> None:
    def label(*budgets: Budget) -> str:
        return request_class([resolve(GEOMETRY, 672, 672, budget) for budget in budgets])

    assert label() == "none"
    assert label(160) == "low"
    assert label(640, 160, 320) == "high"
    assert label(160, "full", 640) == "full"


def test_budget_that_reaches_the_stock_count_is_full() -> None:
    full = GEOMETRY.full_tokens(672, 672)
    just_below, reached = (resolve(GEOMETRY, 672, 672, budget) for budget in (full - 1, full))
    assert effective_budget(just_below) == full - 1
    assert effective_budget(reached) == "full"


def test_each_picture_gets_its_own_schedule() -> None:
    plans = plan_images(GEOMETRY, [BIG, SMALL], 160)
    assert plans == (resolve(GEOMETRY, 672, 672, 160), resolve(GEOMETRY, 30, 40, 160))


def test_height_and_width_are_not_swapped() -> None:
    tall, wide = plan_images(GEOMETRY, [CheckedImage(1000, 300, ""), CheckedImage(300, 1000, "")], "full")
    assert tall.full == GEOMETRY.full_tokens(1000, 300) != GEOMETRY.full_tokens(300, 1000) == wide.full


def test_budget_below_one_token_a_tile_names_the_field() -> None:
    many_tiles = replace(GEOMETRY, grid_pinpoints=((336 * 8, 336 * 8),))
    with pytest.raises(InvalidRequestError, match="raise it") as error:
        plan_images(many_tiles, [BIG], 32)
    assert error.value.param == "visual_token_budget"
