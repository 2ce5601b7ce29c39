"""What a request asks for -> the schedule of each of its pictures. Policy, pure; the arithmetic is in schedule.py.

Where a budget can stand, the first that is given wins:

1. `image_url.visual_token_budget`, for one picture
2. `image_url.detail`, in OpenAI's words
3. the body's `visual_token_budget`
4. the header X-Visual-Token-Budget
5. the server's default

The ceilings of key and server may lower what was chosen. What was applied is told in the usage and in a header.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from starlette.datastructures import Headers

from server.errors import InvalidRequestError
from server.images import CheckedImage
from vd_plugin.schedule import FULL, PRESETS, Budget, BudgetError, Geometry, Schedule, parse_budget, resolve

PARAM: Final = "visual_token_budget"
HEADER: Final = "X-Visual-Token-Budget"

DETAILS: Final[Mapping[str, Budget | None]] = {
    "auto": None,
    "low": PRESETS["low"],
    "high": PRESETS["high"],
    "original": FULL,
    FULL: FULL,
}
"""OpenAI's `detail` as a budget; None leaves the choice to the next rule."""

CLASSES: Final = ("none", *PRESETS, FULL)
"""Labels of budgets in metrics, from no picture to the whole picture."""


class PictureWish(Protocol):
    """What a request says of one picture's cost."""

    @property
    def visual_token_budget(self) -> Budget | None: ...

    @property
    def detail(self) -> str | None: ...


@dataclass(frozen=True, slots=True)
class Choice:
    """The budget of one picture, before its size is known, and the field that it comes from (None: the default)."""

    budget: Budget
    param: str | None


def parse_header(value: str | None) -> Budget | None:
    """The budget in a header: a decimal number or a preset's name.

    Raises:
        InvalidRequestError: it is neither.
    """
    if value is None:
        return None
    text = value.strip()
    try:
        return parse_budget(int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else text)
    except BudgetError as error:
        raise InvalidRequestError(str(error), param=HEADER, code="invalid_budget") from None


def header_budget(headers: Headers) -> Budget | None:
    """The budget in a request's headers. Raises as `parse_header`; also for a header that is there more than once."""
    values = headers.getlist(HEADER)
    return parse_header(", ".join(values) if values else None)


def refuse_without_pictures(body: Budget | None, header: Budget | None) -> None:
    """For a request without pictures.

    Raises:
        InvalidRequestError: a budget was given, and there is no picture that it could be for.
    """
    for param, budget in ((PARAM, body), (HEADER, header)):
        if budget is not None:
            raise InvalidRequestError(
                "a visual token budget was given, but the request has no images: leave it out",
                param=param,
                code="invalid_budget",
            )


def choose_budgets(
    pictures: Sequence[tuple[str, PictureWish]],
    body: Budget | None,
    header: Budget | None,
    default: Budget,
    ceiling: Budget,
) -> tuple[Choice, ...]:
    """The budget of every picture.

    Args:
        pictures: what each asks for, with the path of its `image_url` in the request.
        ceiling: larger budgets are lowered to it.

    Raises:
        InvalidRequestError: a budget was given, and there is no picture that it could be for.
    """
    if not pictures:
        refuse_without_pictures(body, header)
    shared = Choice(default, None)
    if header is not None:
        shared = Choice(header, HEADER)
    if body is not None:
        shared = Choice(body, PARAM)
    chosen = (_own_choice(path, wish) or shared for path, wish in pictures)
    return tuple(Choice(lower(choice.budget, ceiling), choice.param) for choice in chosen)


def _own_choice(path: str, wish: PictureWish) -> Choice | None:
    if wish.visual_token_budget is not None:
        return Choice(wish.visual_token_budget, f"{path}.{PARAM}")
    budget = None if wish.detail is None else DETAILS[wish.detail]
    return None if budget is None else Choice(budget, f"{path}.detail")


def lower(budget: Budget, ceiling: Budget) -> Budget:
    """The smaller of two budgets."""
    if budget == FULL:
        return ceiling
    return budget if ceiling == FULL else min(budget, ceiling)


def plan_images(geometry: Geometry, images: Sequence[CheckedImage], choices: Sequence[Choice]) -> tuple[Schedule, ...]:
    """The schedule of every picture.

    Raises:
        InvalidRequestError: a budget is too small for its picture.
    """
    schedules = []
    for image, choice in zip(images, choices, strict=True):
        try:
            schedules.append(resolve(geometry, image.height, image.width, choice.budget))
        except BudgetError as error:
            raise InvalidRequestError(str(error), param=choice.param, code="invalid_budget") from None
    return tuple(schedules)


def effective_budget(schedule: Schedule) -> Budget:
    """The budget after resolving: one that reaches the picture's stock count is "full"."""
    if schedule.is_full or schedule.budget is None:
        return FULL
    return schedule.budget


def budget_class(budget: Budget) -> str:
    """A label out of CLASSES: the smallest preset that covers the number, the largest preset for numbers above all."""
    if isinstance(budget, str):
        return budget
    return next((name for name, rows in PRESETS.items() if budget <= rows), list(PRESETS)[-1])


def request_class(schedules: Iterable[Schedule]) -> str:
    """The label of a whole request: the largest among its pictures, "none" without any."""
    classes = (budget_class(effective_budget(schedule)) for schedule in schedules)
    return max(classes, key=CLASSES.index, default="none")
