"""Every place where a budget can stand, through the gateway."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from asgi_transport import AsgiTransport
from fake_engine import GEOMETRY, FakeEngine
from gateway import assert_error, bearer, gateway, make_app
from images import ask, image

from server.settings import Settings
from vd_plugin.schedule import FULL, Budget, resolve

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
PART = "messages[0].content[0].image_url"


def budgets_sent(engine: FakeEngine) -> list[Budget]:
    return list(engine.bodies[-1]["mm_processor_kwargs"]["visual_token_budget"])


def ask_each(*wishes: dict[str, Any], **fields: Any) -> dict[str, Any]:
    body = ask(*[image(800, 600)] * len(wishes), **fields)
    for part, wish in zip(body["messages"][0]["content"], wishes, strict=False):
        part["image_url"].update(wish)
    return body


async def test_images_of_one_request_have_budgets_of_their_own(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    body = ask_each({"visual_token_budget": 100}, {"detail": "low"}, {"detail": "original"}, {}, {"detail": "auto"})
    response = await client.post(CHAT, json={**body, "visual_token_budget": "medium"})

    budgets = [100, 160, FULL, 320, 320]
    assert budgets_sent(engine) == budgets
    assert response.headers["x-visual-token-budget"] == "100, 160, full, 320, 320"
    plans = [resolve(GEOMETRY, 600, 800, budget) for budget in budgets]
    usage = response.json()["usage"]
    assert [item["budget"] for item in usage["visual_tokens"]["per_image"]] == budgets
    assert [item["stages"] for item in usage["visual_tokens"]["per_image"]] == [list(plan.rows) for plan in plans]
    assert usage["prompt_tokens_details"]["image_tokens"] == sum(plan.num_placeholders for plan in plans)
    assert "visual_token_budget" not in str(engine.bodies[-1]["messages"])
    assert "detail" not in str(engine.bodies[-1]["messages"])


async def test_header_is_for_requests_that_name_no_budget(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    headers = {"X-Visual-Token-Budget": "100"}
    await client.post(CHAT, json=ask_each({}), headers=headers)
    assert budgets_sent(engine) == [100]
    await client.post(CHAT, json=ask_each({}, visual_token_budget=200), headers=headers)
    assert budgets_sent(engine) == [200]


@pytest.mark.parametrize(
    ("wish", "param"),
    [
        ({"detail": "medium"}, f"{PART}.detail"),
        ({"detail": "LOW"}, f"{PART}.detail"),
        ({"detail": 1}, f"{PART}.detail"),
        ({"visual_token_budget": 31}, f"{PART}.visual_token_budget"),
        ({"visual_token_budget": "160"}, f"{PART}.visual_token_budget"),
        ({"visual_token_budget": True}, f"{PART}.visual_token_budget"),
        ({"min_pixels": 100}, f"{PART}.min_pixels"),
    ],
)
async def test_wishes_that_cannot_be_honoured_are_refused(
    client: httpx.AsyncClient, engine: FakeEngine, wish: dict[str, Any], param: str
) -> None:
    response = await client.post(CHAT, json=ask_each(wish))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert not engine.bodies


NOTHING = {"images": 0, "full": 0, "kept": 0, "saved": 0, "per_image": []}
WITHOUT_IMAGES = [
    (CHAT, {"messages": [{"role": "user", "content": "Hi"}]}),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}),
    ("/v1/completions", {"prompt": "Hi"}),
    ("/v1/responses", {"input": "Hi"}),
]


@pytest.mark.parametrize("place", ["body", "header"])
@pytest.mark.parametrize(("route", "body"), WITHOUT_IMAGES)
async def test_a_budget_without_images_is_reported_as_not_applied(
    client: httpx.AsyncClient, engine: FakeEngine, route: str, body: dict[str, Any], place: str
) -> None:
    fields = {"visual_token_budget": 320} if place == "body" else {}
    headers = {"X-Visual-Token-Budget": "320"} if place == "header" else {}
    response = await client.post(route, json={**body, **fields}, headers=headers)
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["visual_tokens"] == NOTHING
    assert response.headers["x-visual-tokens-full"] == "0"
    assert "x-visual-token-budget" not in response.headers
    assert not {"visual_token_budget", "mm_processor_kwargs"} & engine.bodies[-1].keys()


@pytest.mark.parametrize("value", [31, 1.5, True, "lots"])
@pytest.mark.parametrize(("route", "body"), WITHOUT_IMAGES)
async def test_what_is_no_budget_is_refused_also_without_images(
    client: httpx.AsyncClient, engine: FakeEngine, route: str, body: dict[str, Any], value: Any
) -> None:
    response = await client.post(route, json={**body, "visual_token_budget": value})
    assert_error(response, 400, "visual_token_budget", "at least 32")
    response = await client.post(route, json=body, headers={"X-Visual-Token-Budget": str(value)})
    assert_error(response, 400, "X-Visual-Token-Budget", "at least 32")
    assert not engine.bodies


async def test_bad_header_is_refused(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    response = await client.post(CHAT, json=ask(image()), headers={"X-Visual-Token-Budget": "lots"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "X-Visual-Token-Budget"
    assert "at least 32" in response.json()["error"]["message"]
    assert not engine.bodies


async def test_servers_ceiling_lowers_budgets_and_tells(engine: FakeEngine) -> None:
    app = make_app(Settings(max_budget="medium"), engine)
    async with httpx.AsyncClient(transport=AsgiTransport(app), base_url="http://gateway") as client:
        response = await client.post(CHAT, json=ask_each({"detail": "full"}, {"visual_token_budget": 100}, {}))
        assert budgets_sent(engine) == [320, 100, 320]
        assert response.headers["x-visual-token-budget"] == "320, 100, 320"
        per_image = response.json()["usage"]["visual_tokens"]["per_image"]
        assert [item["budget"] for item in per_image] == [320, 100, 320]
        (card,) = (await client.get("/v1/models")).json()["data"]
        assert card["visual_token_budget"]["maximum"] == 320
        assert card["visual_token_budget"]["default"] == 320


async def test_count_tells_every_preset_and_asks_no_model(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    body = ask_each({"detail": "low"}, {"visual_token_budget": 100}, stream=True)
    counted = (await client.post("/v1/visual_tokens/count", json=body)).json()
    assert not engine.bodies

    assert set(counted) == {"object", "model", "requested", "presets"}
    assert [item["budget"] for item in counted["requested"]["per_image"]] == [160, 100]
    assert list(counted["presets"]) == ["low", "medium", "high", "full"]
    for name, budget in [("low", 160), ("medium", 320), ("high", 640), ("full", FULL)]:
        plan = resolve(GEOMETRY, 600, 800, budget)
        assert counted["presets"][name]["kept"] == 2 * plan.kept
        assert counted["presets"][name]["per_image"][0]["stages"] == list(plan.rows)
    served = (await client.post(CHAT, json={**body, "stream": False})).json()
    assert served["usage"]["visual_tokens"] == counted["requested"], "what was announced should be what is charged"


async def test_count_without_images_is_zero(client: httpx.AsyncClient) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    counted = (await client.post("/v1/visual_tokens/count", json=body)).json()
    nothing = {"images": 0, "full": 0, "kept": 0, "saved": 0, "per_image": []}
    assert counted["requested"] == nothing
    assert all(value == nothing for value in counted["presets"].values())


async def test_count_refuses_what_chat_would(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/visual_tokens/count", json=ask("data:image/png;base64,aGVsbG8="))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == f"{PART}.url"


async def test_keys_ceiling_lowers_budgets(engine: FakeEngine, keys: Path) -> None:
    async with gateway(engine, api_keys_file=keys) as client:
        body = ask(image(800, 600), visual_token_budget="full")
        response = await client.post(CHAT, json=body, headers=bearer("shop-secret"))
        assert response.headers["x-visual-token-budget"] == "160"
        response = await client.post(CHAT, json=body, headers=bearer("lab-secret"))
        assert response.headers["x-visual-token-budget"] == "full"
        (card,) = (await client.get("/v1/models", headers=bearer("shop-secret"))).json()["data"]
        assert card["visual_token_budget"]["maximum"] == 160
