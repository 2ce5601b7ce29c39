"""Who makes room for a newcomer when there are as many connections as there may be."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest
import virtual_time
from client_side import ClientSide
from uvicorn.server import ServerState

from server.http.connection import ConnectionLimits, guard_connections

HEAD = b" HTTP/1.1\r\nHost: x\r\n"
GET = b"GET /" + HEAD + b"\r\n"
BODY = b"Content-Length: 9\r\n\r\n{"


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Reads the body at /read, and takes its time at /think; others are answered at once."""
    if scope["path"] == "/read":
        while (await receive()).get("more_body"):
            pass
    if scope["path"] == "/think":
        await asyncio.sleep(5)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


def with_room_for(num_connections: int, laws: Callable[[Callable[..., ClientSide]], Awaitable[None]]) -> None:
    async def run() -> None:
        state = ServerState()
        limits = ConnectionLimits(10, 60, 60, num_connections)
        await laws(partial(ClientSide, app, guard_connections(limits), state))
        for connection in list(state.connections):
            connection.transport.abort()  # type: ignore[union-attr]  # it is connected
        await asyncio.sleep(10)

    virtual_time.run(run())


def test_network_with_the_most_gives_up_its_oldest() -> None:
    async def laws(connect: Callable[..., ClientSide]) -> None:
        lonely = connect("192.0.2.1")
        crowd = [connect(f"2001:db8::{number}") for number in range(4)]
        for client in (lonely, *crowd):
            await client.send(b"G")
        await asyncio.sleep(1)
        newcomers = [connect("192.0.2.2"), connect("192.0.2.3")]
        await asyncio.sleep(0)
        assert [client.is_over for client in (lonely, *crowd)] == [False, True, True, False, False]
        for newcomer in newcomers:
            await newcomer.send(GET)
            assert newcomer.sent.startswith(b"HTTP/1.1 200 ")

    with_room_for(5, laws)


def test_one_of_as_many_networks_gives_up_the_oldest_and_not_the_newcomer() -> None:
    async def laws(connect: Callable[..., ClientSide]) -> None:
        clients = [connect(f"192.0.2.{number}") for number in range(6)]
        await asyncio.sleep(0)
        assert [client.is_over for client in clients] == [True, True, True, False, False, False]

    with_room_for(3, laws)


@pytest.mark.parametrize("sent", [b"", b"G", GET[:-2], GET, b"POST /" + HEAD + BODY, b"what?\r\n\r\n", GET + b"G"])
def test_who_is_owed_no_answer_makes_room(sent: bytes) -> None:
    async def laws(connect: Callable[..., ClientSide]) -> None:
        client = connect()
        await client.send(sent)
        newcomer = connect("192.0.2.2")
        await newcomer.send(GET)
        assert client.is_over
        assert newcomer.sent.startswith(b"HTTP/1.1 200 ")

    with_room_for(1, laws)


@pytest.mark.parametrize("sent", [b"POST /read" + HEAD + BODY, b"GET /think" + HEAD + b"\r\n"])
def test_whose_request_is_read_or_answered_stays(sent: bytes) -> None:
    async def laws(connect: Callable[..., ClientSide]) -> None:
        client = connect()
        await client.send(sent)
        newcomer = connect("192.0.2.2")
        assert newcomer.sent.startswith(b"HTTP/1.1 503 ")
        assert not client.is_over
        await client.send(b"12345678", after_seconds=1)
        await asyncio.sleep(5)
        assert client.sent.startswith(b"HTTP/1.1 200 ")

    with_room_for(1, laws)


def test_who_has_not_taken_all_of_an_answer_stays() -> None:
    async def laws(connect: Callable[..., ClientSide]) -> None:
        client = connect(num_writes_taken=1)
        await client.send(GET)
        assert connect("192.0.2.2").sent.startswith(b"HTTP/1.1 503 ")
        assert not client.is_over

    with_room_for(1, laws)


def test_connections_that_are_over_leave_nothing_behind() -> None:
    async def laws() -> None:
        protocol, state = guard_connections(ConnectionLimits(10, 60, 60, 100)), ServerState()
        for number, sent in enumerate([b"", b"G", GET, b"POST /read" + HEAD + BODY, b"what?\r\n\r\n"]):
            client = ClientSide(app, protocol, state, f"192.0.2.{number}")
            await client.send(sent)
            client.abort()
        await asyncio.sleep(1)
        assert not protocol.evictable
        assert not state.connections

    virtual_time.run(laws())
