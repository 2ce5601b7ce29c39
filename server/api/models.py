"""GET /v1/models: the engine's models, with the budgets that a request may choose from."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from server import paths
from server.budget import cap
from server.context import Context, RequestContext
from server.engine.pool import EnginePool
from server.errors import UnknownModelError
from server.settings import Settings
from vd_plugin.schedule import FULL, MIN_BUDGET, PRESETS, Budget


def model_routes(settings: Settings, engines: EnginePool) -> APIRouter:
    """The list, and one model of it."""
    router = APIRouter()

    async def cards(context: RequestContext) -> list[dict[str, Any]]:
        maximum = cap(context.key.max_budget, settings.max_budget)
        return [_card(entry, settings.default_budget, maximum) for entry in await engines.models()]

    @router.get(paths.MODELS)
    async def list_models(context: Context) -> dict[str, Any]:
        """The models that can be requested, with the visual token budgets they take."""
        return {"object": "list", "data": await cards(context)}

    @router.get(paths.MODEL)
    async def retrieve_model(context: Context, model: str) -> dict[str, Any]:
        """One model."""
        found = await cards(context)
        for card in found:
            if card.get("id") == model:
                return card
        names = ", ".join(repr(card.get("id")) for card in found)
        raise UnknownModelError(f"model {model!r} not found; available: {names}", code="model_not_found")

    return router


def _card(entry: dict[str, Any], default: Budget, maximum: Budget) -> dict[str, Any]:
    """The engine's entry without its file paths, and with what this key's budgets may be."""
    public = ("id", "object", "created", "owned_by", "max_model_len")
    return {
        **{name: entry[name] for name in public if name in entry},
        "visual_token_budget": {
            "default": cap(default, maximum),
            "minimum": MIN_BUDGET,
            "maximum": maximum,
            "presets": {**PRESETS, FULL: FULL},
        },
    }
