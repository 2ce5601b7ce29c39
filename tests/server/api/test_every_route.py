"""Laws that hold on every generating route."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine
from gateway import assert_error, gateway
from images import ask, image
from metric_text import metric, metrics_of

from server import paths
from server.api.generate import ROUTES

pytestmark = pytest.mark.anyio

BODIES: dict[str, dict[str, Any]] = {
    paths.CHAT: ask(image()),
    paths.COMPLETIONS: {"prompt": "a"},
    paths.RESPONSES: {
        "input": [{"role": "user", "content": [{"type": "input_image", "image_url": image()}]}],
    },
}

every_route = pytest.mark.parametrize("route", [route.path for route in ROUTES])


def budget_class(route: str) -> str:
    return "none" if route == paths.COMPLETIONS else "high"


async def count_of(client: httpx.AsyncClient, route: str, code: int) -> float:
    labels = f'budget_class="{budget_class(route)}",code="{code}",route="{route}"'
    return metric(await metrics_of(client), f"visiondrop_requests_total{{{labels}}}")


async def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The data of all events but the last `[DONE]`."""
    text = b"".join([chunk async for chunk in response.aiter_bytes()]).decode()
    data = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    return [json.loads(item) for item in data if item != "[DONE]"]


@every_route
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("status", "body", "seen", "words"),
    [
        (404, {"error": {"message": "no model x", "type": "NotFoundError", "param": "model", "code": 404}}, 404, "no"),
        (400, {"error": {"message": "Traceback (most recent call last):\n x\nE: y", "param": "p"}}, 400, "E: y"),
        (422, b"nonsense", 422, "422"),
        (500, {"error": {"message": "CUDA", "type": "x", "param": None, "code": 500}}, 502, "the engine failed"),
        (401, {"error": "Unauthorized"}, 502, "the engine failed"),
    ],
)
async def test_refusals_of_the_engine_keep_status_and_message(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    route: str,
    stream: bool,
    status: int,
    body: Any,
    seen: int,
    words: str,
) -> None:
    engine.refusal = (status, body)
    param = body["error"]["param"] if seen in (400, 404) else None
    assert_error(await client.post(route, json={**BODIES[route], "stream": stream}), seen, param, words)


@every_route
@pytest.mark.parametrize(
    ("fault", "status"),
    [
        ({"break_after": 1}, 502),
        ({"end_after": 1}, 502),
        ({"error_after": (1, {"message": "CUDA error", "code": 500})}, 502),
        ({"error_after": (1, {"message": "too long", "type": "BadRequestError", "code": 400})}, 400),
    ],
)
async def test_failure_in_mid_stream_is_the_last_event(
    client: httpx.AsyncClient, engine: FakeEngine, route: str, fault: dict[str, Any], status: int
) -> None:
    vars(engine).update(fault)
    async with client.stream("POST", route, json={**BODIES[route], "stream": True}) as response:
        assert response.status_code == 200
        first, last = await events_of(response)
    assert "error" not in first
    assert set(last["error"]) == {"message", "type", "param", "code"}
    assert "CUDA" not in last["error"]["message"]
    assert (status == 400) == ("too long" in last["error"]["message"])
    assert await count_of(client, route, status) == 1


def wrong_usages() -> list[Callable[[dict[str, Any]], Any]]:
    """What an engine may report in the place of its usage, made of the right one."""

    def instead(value: Any) -> Callable[[dict[str, Any]], Any]:
        return lambda usage: value

    def with_count(place: int, value: Any) -> Callable[[dict[str, Any]], Any]:
        def spoil(usage: dict[str, Any]) -> dict[str, Any]:
            name = [name for name in usage if not name.endswith("details")][place]
            changed = {**usage, name: value}
            if value is ...:
                del changed[name]
            return changed

        return spoil

    def with_details(value: Any) -> Callable[[dict[str, Any]], Any]:
        return lambda usage: {**usage, next(name for name in usage if name.endswith("details")): value}

    return [
        *(instead(value) for value in (None, {}, [], [1], "many", 7, True)),
        *(with_count(place, value) for place in range(3) for value in (..., None, -1, "12", 1.5, True, [], 10**400)),
        *(with_details(value) for value in ("few", [3], True, {"cached_tokens": "3"}, {"cached_tokens": -1})),
    ]


WRONG_IMAGE_TOKENS = ("few", [3], {"image": "3"}, {"image": -1}, {"image": None})


@every_route
@pytest.mark.parametrize("stream", [False, True])
async def test_usage_that_cannot_be_read_is_the_engines_failure(
    client: httpx.AsyncClient, engine: FakeEngine, caplog: pytest.LogCaptureFixture, route: str, stream: bool
) -> None:
    caplog.set_level("INFO", logger="visiondrop.requests")
    cases = wrong_usages()
    if route != paths.RESPONSES:  # where usage has no count of image tokens
        cases += [
            lambda usage, wrong=wrong: {**usage, "prompt_tokens_details": {"multimodal_tokens": wrong}}
            for wrong in WRONG_IMAGE_TOKENS
        ]
    for number, engine.misreport in enumerate(cases, 1):
        async with client.stream("POST", route, json={**BODIES[route], "stream": stream}) as response:
            if stream:
                assert response.status_code == 200
                *_, last = await events_of(response)
            else:
                await response.aread()
                assert_error(response, 502, None)
                last = response.json()
        assert last["error"]["code"] == "engine_failed"
        assert "usage" in last["error"]["message"]
        assert [json.loads(line)["status"] for line in caplog.messages] == [502] * number
    text = await metrics_of(client)
    assert metric(text, "visiondrop_inflight_requests") == 0
    assert await count_of(client, route, 502) == len(cases)
    engine.misreport = lambda usage: usage
    assert (await client.post(route, json=BODIES[route])).status_code == 200


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
async def test_answer_that_a_stopped_engine_cut_off_does_not_pass_for_one(
    client: httpx.AsyncClient, engine: FakeEngine, route: str
) -> None:
    engine.abort_after = 1
    assert_error(await client.post(route, json=BODIES[route]), 502, None, "stopped before the answer was complete")
    async with client.stream("POST", route, json={**BODIES[route], "stream": True}) as response:
        first, last = await events_of(response)
    assert "error" not in first
    assert "stopped before the answer was complete" in last["error"]["message"]
    assert await count_of(client, route, 502) == 2


@every_route
@pytest.mark.parametrize("moment", ["mid_stream", "before_stream", "whole_answer"])
async def test_client_that_goes_away_frees_the_engine_at_once(
    client: httpx.AsyncClient, engine: FakeEngine, route: str, moment: str
) -> None:
    engine.hold = True
    engine.hold_before_answer = moment != "mid_stream"
    body = {**BODIES[route], "stream": moment != "whole_answer"}
    if moment == "mid_stream":
        async with client.stream("POST", route, json=body) as response:
            await anext(response.aiter_bytes())
            assert not engine.closed.is_set()
    else:
        task = asyncio.ensure_future(client.post(route, json=body))
        await asyncio.wait_for(engine.asked.wait(), timeout=5)
        task.cancel()
    await asyncio.wait_for(engine.closed.wait(), timeout=2)
    await asyncio.sleep(0)
    assert await count_of(client, route, 499) == 1
    assert metric(await metrics_of(client), "visiondrop_inflight_requests") == 0


@pytest.mark.parametrize("route", paths.WORK)
async def test_bodies_have_a_limit(engine: FakeEngine, route: str) -> None:
    async with gateway(engine, max_body_bytes=1000) as client:
        response = await client.post(route, content=b" " * 1001, headers={"Content-Type": "application/json"})
    assert_error(response, 413, None, "1000")
