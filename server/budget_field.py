"""A visual token budget as a request's field."""

from __future__ import annotations

from typing import Annotated, Any, Final, TypeAlias

from pydantic import PlainValidator, WithJsonSchema

from vd_plugin.schedule import FULL, MIN_BUDGET, PRESETS, Budget, parse_budget

BUDGET_SCHEMA: Final[dict[str, Any]] = {
    "title": "Visual token budget",
    "description": f"Visual tokens that a decoder layer holds on average for a picture: an integer of at least "
    f"{MIN_BUDGET}, a preset ({', '.join(f'{name} = {rows}' for name, rows in PRESETS.items())}), "
    f"or {FULL} (no pruning).",
    "anyOf": [{"type": "integer", "minimum": MIN_BUDGET}, {"type": "string", "enum": [*PRESETS, FULL]}],
}

BudgetField: TypeAlias = Annotated[Budget, PlainValidator(parse_budget), WithJsonSchema(BUDGET_SCHEMA)]
