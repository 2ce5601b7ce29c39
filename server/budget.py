"""What a request asks for -> the schedule of each of its images. Policy, pure; the arithmetic is in schedule.py.

Where a budget can stand, the first that is given wins:

1. `image_url.visual_token_budget`, for one image
2. `image_url.detail`, in OpenAI's words
3. the body's `visual_token_budget`
4. the header X-Visual-Token-Budget
5. the server's default

The maxima of key and server cap what was chosen. The usage and a header report what was applied. Without images, 3 and
4 apply to nothing, and that is no error: clients set them once, for all their requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, TypeAlias

from pydantic import PlainValidator, WithJsonSchema
from starlette.datastructures import Headers

from server.errors import InvalidRequestError
from vd_plugin.schedule import (
    FULL,
    MIN_BUDGET,
    PRESETS,
    Budget,
    BudgetError,
    Geometry,
    Schedule,
    parse_budget,
    read_budget,
    resolve,
)
from vd_plugin.wire import BUDGET_KEY

PARAM: Final = BUDGET_KEY
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
"""Labels of budgets in metrics, from no image to the unpruned image."""

BUDGET_SCHEMA: Final[dict[str, Any]] = {
    "title": "Visual token budget",
    "description": f"Visual tokens that a decoder layer holds on average for an image: an integer of at least "
    f"{MIN_BUDGET}, a preset ({', '.join(f'{name} = {rows}' for name, rows in PRESETS.items())}), "
    f"or {FULL} (no pruning).",
    "anyOf": [{"type": "integer", "minimum": MIN_BUDGET}, {"type": "string", "enum": [*PRESETS, FULL]}],
}

BudgetField: TypeAlias = Annotated[Budget, PlainValidator(parse_budget), WithJsonSchema(BUDGET_SCHEMA)]
"""A budget as a field of a request."""


@dataclass(frozen=True, slots=True)
class RequestedImage:
    """An image as a request names it.

    Args:
        path: of the object that holds the image's own budget and detail, as error objects name it.
        url_path: of its URL.
    """

    path: str
    url_path: str
    url: str
    budget: Budget | None = None
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """The budget of one image, before its size is known, and the field that it comes from (None: the default)."""

    budget: Budget
    param: str | None


def parse_header(value: str | None) -> Budget | None:
    """The budget in a header: a decimal number or a preset's name.

    Raises:
        InvalidRequestError: it is neither.
    """
    if value is None:
        return None
    try:
        return read_budget(value.strip())
    except BudgetError as error:
        raise InvalidRequestError(str(error), param=HEADER, code="invalid_budget") from None


def header_budget(headers: Headers) -> Budget | None:
    """The budget in a request's headers. Raises as `parse_header`; also for a header that is there more than once."""
    values = headers.getlist(HEADER)
    return parse_header(", ".join(values) if values else None)


def choose_budgets(
    images: Sequence[RequestedImage],
    body: Budget | None,
    header: Budget | None,
    default: Budget,
    maximum: Budget,
) -> tuple[Choice, ...]:
    """The budget of every image.

    Args:
        body: what the body sets for all images.
        header: what the header sets for all images.
        maximum: larger budgets are capped to it.
    """
    shared = Choice(default, None)
    if header is not None:
        shared = Choice(header, HEADER)
    if body is not None:
        shared = Choice(body, PARAM)
    chosen = (_own_choice(image) or shared for image in images)
    return tuple(Choice(cap(choice.budget, maximum), choice.param) for choice in chosen)


def _own_choice(image: RequestedImage) -> Choice | None:
    if image.budget is not None:
        return Choice(image.budget, f"{image.path}.{PARAM}")
    budget = None if image.detail is None else DETAILS[image.detail]
    return None if budget is None else Choice(budget, f"{image.path}.detail")


def cap(budget: Budget, maximum: Budget) -> Budget:
    """The smaller of two budgets."""
    if budget == FULL:
        return maximum
    return budget if maximum == FULL else min(budget, maximum)


def plan_images(
    geometry: Geometry, sizes: Sequence[tuple[int, int]], choices: Sequence[Choice]
) -> tuple[Schedule, ...]:
    """The schedule of every image.

    Args:
        sizes: height and width of each, in pixels.

    Raises:
        InvalidRequestError: a budget is too small for its image.
    """
    schedules = []
    for (height, width), choice in zip(sizes, choices, strict=True):
        try:
            schedules.append(resolve(geometry, height, width, choice.budget))
        except BudgetError as error:
            raise InvalidRequestError(str(error), param=choice.param, code="invalid_budget") from None
    return tuple(schedules)


def budget_class(budget: Budget) -> str:
    """A label out of CLASSES: the smallest preset that covers the number, the largest preset for numbers above all."""
    if isinstance(budget, str):
        return budget
    return next((name for name, rows in PRESETS.items() if budget <= rows), list(PRESETS)[-1])


def request_class(schedules: Iterable[Schedule]) -> str:
    """The label of a whole request: the largest among its images, "none" without any."""
    classes = (budget_class(schedule.effective_budget) for schedule in schedules)
    return max(classes, key=CLASSES.index, default="none")
