"""Policy: classes and effective budgets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from fake_engine import GEOMETRY

from server.budget import (
    CLASSES,
    Choice,
    RequestedImage,
    budget_class,
    cap,
    choose_budgets,
    parse_header,
    plan_images,
    request_class,
)
from server.errors import InvalidRequestError
from vd_plugin.schedule import FULL, Budget, resolve

BIG = (672, 672)
SMALL = (30, 40)


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


def test_class_of_a_request_is_the_largest_of_its_images() -> None:
    def label(*budgets: Budget) -> str:
        return request_class([resolve(GEOMETRY, 672, 672, budget) for budget in budgets])

    assert label() == "none"
    assert label(160) == "low"
    assert label(640, 160, 320) == "high"
    assert label(160, "full", 640) == "full"


def test_budget_that_reaches_the_stock_count_is_full() -> None:
    full = GEOMETRY.full_tokens(672, 672)
    just_below, reached = (resolve(GEOMETRY, 672, 672, budget) for budget in (full - 1, full))
    assert just_below.effective_budget == full - 1
    assert reached.effective_budget == "full"


def test_each_image_gets_its_own_schedule() -> None:
    plans = plan_images(GEOMETRY, [BIG, SMALL], [Choice(160, None), Choice(320, None)])
    assert plans == (resolve(GEOMETRY, 672, 672, 160), resolve(GEOMETRY, 30, 40, 320))


def test_height_and_width_are_not_swapped() -> None:
    tall, wide = plan_images(GEOMETRY, [(1000, 300), (300, 1000)], [Choice("full", None)] * 2)
    assert tall.full == GEOMETRY.full_tokens(1000, 300) != GEOMETRY.full_tokens(300, 1000) == wide.full


def test_budget_below_one_token_a_tile_names_the_field() -> None:
    many_tiles = replace(GEOMETRY, grid_pinpoints=((336 * 8, 336 * 8),))
    with pytest.raises(InvalidRequestError, match="raise it") as error:
        plan_images(many_tiles, [BIG], [Choice(32, "messages[0].content[1].image_url.detail")])
    assert error.value.param == "messages[0].content[1].image_url.detail"


def image(budget: Budget | None = None, detail: str | None = None) -> RequestedImage:
    return RequestedImage("", "", "", budget, detail)


def choose(
    *images: RequestedImage, body: Budget | None = None, header: Budget | None = None, maximum: Budget = FULL
) -> Any:
    numbered = [replace(image, path=f"p{number}") for number, image in enumerate(images)]
    return [(choice.budget, choice.param) for choice in choose_budgets(numbered, body, header, 640, maximum)]


def test_the_first_place_that_names_a_budget_wins() -> None:
    every = image(100, "low")
    assert choose(every, body=200, header=300) == [(100, "p0.visual_token_budget")]
    assert choose(image(detail="low"), body=200, header=300) == [(160, "p0.detail")]
    assert choose(image(detail="auto"), body=200, header=300) == [(200, "visual_token_budget")]
    assert choose(image(), header=300) == [(300, "X-Visual-Token-Budget")]
    assert choose(image()) == [(640, None)]


def test_details_are_openais_words_for_budgets() -> None:
    details = ["low", "high", "original", "full", "auto"]
    assert [budget for budget, _ in choose(*[image(detail=word) for word in details], body=99)] == [
        160,
        640,
        FULL,
        FULL,
        99,
    ]


def test_images_of_one_request_choose_for_themselves() -> None:
    assert choose(image(32), image(detail="full"), image(), body=50) == [
        (32, "p0.visual_token_budget"),
        (FULL, "p1.detail"),
        (50, "visual_token_budget"),
    ]


def test_the_maximum_caps_what_is_above_it_and_nothing_else() -> None:
    images = [image(32), image(320), image(321), image(detail="full"), image()]
    assert [budget for budget, _ in choose(*images, maximum=320)] == [32, 320, 320, 320, 320]
    assert [cap(*pair) for pair in [(FULL, FULL), (FULL, 40), (40, FULL), (40, 50), (50, 40)]] == [
        FULL,
        40,
        40,
        40,
        40,
    ]


def test_a_budget_without_images_applies_to_nothing() -> None:
    assert choose(body=320, header=100) == choose() == []


@pytest.mark.parametrize(("text", "budget"), [(None, None), ("320", 320), (" low ", 160), ("full", FULL), ("032", 32)])
def test_header_is_a_number_or_a_name(text: str | None, budget: Budget | None) -> None:
    assert parse_header(text) == budget


@pytest.mark.parametrize(
    "text", ["", "0", "31", "-40", "1.5", "1e3", "true", "lots", "320, 640", "9" * 30, "\u0663\u0662\u0660"]
)
def test_other_headers_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="at least 32") as error:
        parse_header(text)
    assert error.value.param == "X-Visual-Token-Budget"
