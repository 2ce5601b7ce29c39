"""Images on their way through the gateway: fetched, checked, made plain, and given up when nobody waits."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import time
from typing import Any

import httpx
import pytest
from bad_images import SIZE, ImageCase, image_cases
from bad_urls import BAD_URLS, BadUrl
from fake_engine import FakeEngine, images_of
from gateway import gateway
from images import ask, data_url, decode, encode, image
from metric_text import metric, metrics_of, until_metric
from origin import Origin, redirect, reply
from PIL import Image

from server.errors import InvalidRequestError
from server.images.check import CheckedImage, check_image
from server.settings import Settings

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
URL = "messages[0].content[0].image_url.url"


def photo(width: int, height: int, color: str) -> bytes:
    return encode(Image.new("RGB", (width, height), color))


async def test_named_images_are_fetched_and_sent_along_in_order(engine: FakeEngine) -> None:
    async with Origin() as origin, gateway(engine, fetches_locally=True) as client:
        origin.pages["/first"] = redirect("/moved")
        origin.pages["/moved"] = reply(photo(40, 20, "red"))
        origin.pages["/last"] = reply(photo(20, 40, "blue"))
        base = f"http://127.0.0.1:{origin.port}"
        response = await client.post(CHAT, json=ask(f"{base}/first", image(30, 30), f"{base}/last"))
        assert response.status_code == 200, response.text
        assert [item.size for item in images_of(engine.bodies[0])] == [(40, 20), (30, 30), (20, 40)]
        assert "127.0.0.1" not in str(engine.bodies[0]), "the engine gets no URL that it could fetch"
        text = await metrics_of(client)
        assert metric(text, "visiondrop_image_fetch_seconds_count") == 2
        assert metric(text, "visiondrop_image_decode_seconds_count") == 3


async def test_fetched_bytes_are_bounded_and_counted(engine: FakeEngine) -> None:
    small = {"max_image_bytes": 20_000, "max_body_bytes": 5_000, "max_buffered_bytes": 100_000}
    async with Origin() as origin, gateway(engine, fetches_locally=True, **small) as client:
        origin.pages["/large"] = reply(bytes(20_001))
        origin.pages["/noise"] = reply(encode(Image.effect_noise((130, 130), 90)))
        base = f"http://127.0.0.1:{origin.port}"
        response = await client.post(CHAT, json=ask(f"{base}/large"))
        assert (response.status_code, response.json()["error"]["param"]) == (413, URL)
        response = await client.post(CHAT, json=ask(*[f"{base}/noise"] * 3))
        assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")
        for _ in range(3):
            assert (await client.post(CHAT, json=ask(*[f"{base}/noise"] * 2))).status_code == 200


async def test_client_that_leaves_during_the_fetch_ends_it(engine: FakeEngine) -> None:
    async with Origin(is_mute=True) as origin, gateway(engine, fetches_locally=True, fetch_seconds=600) as client:
        task = asyncio.ensure_future(client.post(CHAT, json=ask(f"http://127.0.0.1:{origin.port}/a")))
        await asyncio.wait_for(origin.heard.wait(), 30)
        task.cancel()
        await asyncio.wait_for(origin.left.wait(), 30)
        await until_metric(client, "visiondrop_inflight_requests", 0)
        assert not engine.bodies


async def test_clients_that_leave_during_the_decoding_do_not_add_threads(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, busy, most = threading.Lock(), 0, 0

    def decode_slowly(url: str, settings: Settings, param: str, **options: Any) -> CheckedImage:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        time.sleep(0.2)
        with lock:
            busy -= 1
        return check_image(url, settings, param, **options)

    monkeypatch.setattr("server.images.load.check_image", decode_slowly)
    async with gateway(engine, image_threads=2) as client:
        for _ in range(8):
            task = asyncio.ensure_future(client.post(CHAT, json=ask(image(8, 8))))
            await asyncio.sleep(0.02)
            task.cancel()
            await asyncio.wait((task,))
        assert (await client.post(CHAT, json=ask(image(8, 8)))).status_code == 200
        assert most <= 2
        await until_metric(client, "visiondrop_inflight_requests", 0)


async def test_bad_images_of_clients_that_left_are_not_logged_as_defects(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, done = threading.Event(), threading.Event()
    unread: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unread.append(context))

    def fail_late(*_: object, **options: Any) -> CheckedImage:
        begun.set()
        done.wait(30)
        raise InvalidRequestError("the image is broken")

    monkeypatch.setattr("server.images.load.check_image", fail_late)
    async with gateway(engine) as client:
        task = asyncio.ensure_future(client.post(CHAT, json=ask(image(8, 8))))
        await asyncio.to_thread(begun.wait, 30)
        task.cancel()
        await asyncio.wait((task,))
        await until_metric(client, "visiondrop_inflight_requests", 0)
        done.set()
        await asyncio.sleep(0.1)
        gc.collect()
    assert not unread


async def test_one_bad_image_ends_the_other_fetches(engine: FakeEngine) -> None:
    async with (
        Origin(is_mute=True) as mute,
        Origin() as origin,
        gateway(engine, fetches_locally=True, fetch_seconds=600) as client,
    ):
        origin.pages["/gone"] = reply(status="404 Not Found")
        urls = [f"http://127.0.0.1:{mute.port}/a", f"http://127.0.0.1:{origin.port}/gone"]
        response = await client.post(CHAT, json=ask(*urls))
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "messages[0].content[1].image_url.url"
        assert response.json()["error"]["code"] == "invalid_image_url"
        await asyncio.wait_for(mute.left.wait(), 30)


@pytest.mark.parametrize("case", BAD_URLS, ids=lambda case: case.url[:40])
async def test_bad_urls_are_refused(engine: FakeEngine, case: BadUrl) -> None:
    async with gateway(engine) as client:
        body = json.dumps(ask(case.url))  # half a surrogate pair is escaped, and no JSON
        response = await client.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] in (URL, None)
    assert not engine.bodies


async def test_bad_images_are_refused_and_odd_ones_made_plain(engine: FakeEngine) -> None:
    async with gateway(engine) as client:
        for case in image_cases():
            await _check_case(client, engine, case)
        assert metric(await metrics_of(client), "visiondrop_schedule_mismatch_total") == 0


async def _check_case(client: httpx.AsyncClient, engine: FakeEngine, case: ImageCase) -> None:
    num_before = len(engine.bodies)
    response = await client.post(CHAT, json=ask(case.url))
    assert response.status_code == case.status, (case.name, response.text)
    assert len(engine.bodies) - num_before == (case.status == 200), case.name
    if case.status == 200:
        assert decode(engine.bodies[-1]["messages"][0]["content"][0]["image_url"]["url"]).size == SIZE, case.name
    else:
        error = response.json()["error"]
        assert error["code"] == case.code, (case.name, error)
        assert "0x" not in error["message"], "no addresses of objects"


async def test_plain_images_pass_byte_for_byte(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    urls = [
        data_url(encode(Image.effect_noise((90, 70), 50).convert("RGB"), kind), f"image/{kind.lower()}")
        for kind in ("JPEG", "PNG", "WEBP")
    ]
    await client.post(CHAT, json=ask(*urls))
    sent = engine.bodies[0]["messages"][0]["content"]
    assert [part["image_url"]["url"] for part in sent if part["type"] == "image_url"] == urls
