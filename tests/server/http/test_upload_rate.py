"""Bodies must keep coming. Time is virtual: the connection has a transport without a network."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import virtual_time
from client_side import ClientSide
from uvicorn.server import ServerState

from server.http.connection import ConnectionLimits, guard_connections

RATE = 4096
HEAD = b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
NOT_READ = HEAD.replace(b"/echo", b"/not-read")


class Upload(ClientSide):
    def __init__(self, rate: int = RATE) -> None:
        limits = ConnectionLimits(10, 60, 60, 100, rate)
        super().__init__(app, guard_connections(limits), ServerState())


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["path"] == "/not-read":
        await asyncio.sleep(1000)
    while (message := await receive())["type"] == "http.request" and message["more_body"]:
        pass
    if scope["path"] == "/late":
        await asyncio.sleep(100)
    if message["type"] == "http.request":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})


def with_upload(test: Callable[[Upload], Awaitable[None]], **options: int) -> None:
    async def run() -> None:
        upload = Upload(**options)
        await test(upload)
        upload.abort()
        await asyncio.sleep(0)

    virtual_time.run(run())


@pytest.mark.parametrize("num_bytes", [1, RATE, 500_000])
def test_body_that_stalls_is_refused_after_ten_seconds(num_bytes: int) -> None:
    async def laws(upload: Upload) -> None:
        await upload.send(HEAD + b"x" * num_bytes)
        await asyncio.sleep(9.9)
        assert not upload.sent
        await asyncio.sleep(10)
        assert upload.sent.startswith(b"HTTP/1.1 408 ")
        assert b"came at less than 4096 bytes a second for 10 s" in upload.sent
        assert upload.is_over

    with_upload(laws)


def test_body_that_drips_is_refused_and_one_that_keeps_the_rate_is_not() -> None:
    async def drip(upload: Upload, num_bytes: int) -> bytes:
        await upload.send(HEAD)
        for _ in range(50):
            await upload.send(b"x" * num_bytes, after_seconds=1)
        return upload.sent

    async def too_slow(upload: Upload) -> None:
        assert (await drip(upload, RATE * 9 // 10)).startswith(b"HTTP/1.1 408 ")

    async def fast_enough(upload: Upload) -> None:
        assert await drip(upload, RATE * 12 // 10) == b""

    with_upload(too_slow)
    with_upload(fast_enough)


def test_body_in_one_piece_is_no_matter_of_rate_and_its_answer_may_take_its_time() -> None:
    async def laws(upload: Upload) -> None:
        await upload.send(HEAD.replace(b"/echo", b"/late").replace(b"1000000", b"3") + b"abc")
        await asyncio.sleep(99)
        assert not upload.sent
        await asyncio.sleep(2)
        assert upload.sent.startswith(b"HTTP/1.1 200 ")

    with_upload(laws)


def test_client_from_which_the_server_does_not_read_is_not_to_blame() -> None:
    async def laws(upload: Upload) -> None:
        await upload.send(NOT_READ + b"x" * 200_000)
        await asyncio.sleep(50)
        assert not upload.sent
        await asyncio.sleep(15)
        assert b"did not arrive within 60 s" in upload.sent, "the longest time holds all the same"

    with_upload(laws)


def test_rate_can_be_switched_off() -> None:
    async def laws(upload: Upload) -> None:
        await upload.send(HEAD)
        await asyncio.sleep(50)
        assert not upload.sent

    with_upload(laws, rate=0)
