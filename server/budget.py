"""What a request asks for -> the schedule of each of its pictures. Policy, pure; the arithmetic is in schedule.py."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from server.errors import InvalidRequestError
from server.images import CheckedImage
from vd_plugin.schedule import FULL, PRESETS, Budget, BudgetError, Geometry, Schedule, resolve

PARAM: Final = "visual_token_budget"

CLASSES: Final = ("none", *PRESETS, FULL)
"""Labels of budgets in metrics, from no picture to the whole picture."""


def plan_images(geometry: Geometry, images: Sequence[CheckedImage], budget: Budget) -> tuple[Schedule, ...]:
    """The schedule of every picture.

    Raises:
        InvalidRequestError: the budget is too small for one of them.
    """
    try:
        return tuple(resolve(geometry, image.height, image.width, budget) for image in images)
    except BudgetError as error:
        raise InvalidRequestError(str(error), param=PARAM) from None


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
