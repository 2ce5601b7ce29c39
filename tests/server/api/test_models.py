"""The list of models, and one of it."""

from __future__ import annotations

import httpx
import pytest
from fake_engine import MODEL

pytestmark = pytest.mark.anyio


async def test_models_tell_the_budgets_and_no_paths(client: httpx.AsyncClient) -> None:
    (card,) = (await client.get("/v1/models")).json()["data"]
    presets = {"low": 160, "medium": 320, "high": 640, "full": "full"}
    budgets = {"default": 640, "minimum": 32, "maximum": "full", "presets": presets}
    assert card == {"id": MODEL, "object": "model", "visual_token_budget": budgets}


async def test_one_model_can_be_asked_for(client: httpx.AsyncClient) -> None:
    (card,) = (await client.get("/v1/models")).json()["data"]
    assert (await client.get(f"/v1/models/{card['id']}")).json() == card
    response = await client.get("/v1/models/org/nothing")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
