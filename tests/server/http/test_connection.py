"""Clients that are slow, silent or speak no HTTP, on real sockets: each costs little, and the others are served."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from fake_engine import FakeEngine
from gateway import make_app
from images import ask
from metric_text import metric

from server.context import context_of
from server.http.connection import ConnectionLimits
from server.http.listener import Address, bound_socket
from server.http.server import HttpServer, allowed_connections
from server.settings import Settings

pytestmark = pytest.mark.anyio

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]

SECONDS = 0.3
PATIENCE = 20
"""On a busy machine everything comes late; what would never come is missed all the same."""
GET = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /echo HTTP/1.1\r\nHost: x\r\n"


class App:
    """Echoes bodies; streams without end at /endless, holds its answer back at /hold, reads nothing at /early."""

    def __init__(self) -> None:
        self.disconnected = asyncio.Event()
        self.num_calls = 0
        self.path = ""

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        self.num_calls += 1
        self.path = path = scope["path"]
        body = b""
        while path != "/early":
            message = await receive()
            if message["type"] == "http.disconnect":
                self.disconnected.set()
                return
            body += message["body"]
            if not message["more_body"]:
                break
        if path == "/hold":
            await self._wait_disconnect(receive)
            return
        context_of(scope).sends_events = path in ("/endless", "/events")  # as the recording middleware notes it
        kind = b"text/event-stream" if path in ("/endless", "/events") else b"text/plain"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        if path == "/events":
            await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
            await self._wait_disconnect(receive)
            return
        watcher = asyncio.ensure_future(self._wait_disconnect(receive))
        while path == "/endless" and not watcher.done():
            await send({"type": "http.response.body", "body": b"data: " + b"x" * 8192 + b"\n\n", "more_body": True})
            await asyncio.sleep(0)
        watcher.cancel()
        await send({"type": "http.response.body", "body": body or b"ok"})

    async def _wait_disconnect(self, receive: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.disconnected.set()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110  # bounded by the test's other waits
        await asyncio.sleep(0.01)


@asynccontextmanager
async def serve(app: Any, *, max_connections: int = 100, lifespan: Any = "off") -> AsyncIterator[HttpServer]:
    limits = ConnectionLimits(SECONDS, SECONDS, SECONDS, max_connections)
    with bound_socket(Address("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)  # else the kernel reads for the slow client
        server = HttpServer(app, limits, lifespan)
        server.address = listener.getsockname()  # type: ignore[attr-defined]
        serving = asyncio.ensure_future(server.serve(sockets=[listener]))
        await until(lambda: server.started)
        yield server
        server.should_exit = True
        await serving


@asynccontextmanager
async def connect(server: HttpServer, sent: bytes = b"") -> AsyncIterator[Streams]:
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    raw.setblocking(False)
    await asyncio.get_running_loop().sock_connect(raw, server.address)  # type: ignore[attr-defined]
    reader, writer = await asyncio.open_connection(sock=raw, limit=8192)
    writer.write(sent)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
        await asyncio.sleep(0)


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    lines = head.strip().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines[1:])}
    if "content-length" in headers:
        body = await reader.readexactly(int(headers["content-length"]))
    else:
        body = b""
        while size := int(await reader.readline(), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readline()
    return int(lines[0].split()[1]), headers, body


async def assert_refused(reader: asyncio.StreamReader, status: int, code: str) -> None:
    """An error object, and the end of the connection."""
    found, headers, body = await asyncio.wait_for(read_answer(reader), PATIENCE)
    assert (found, headers["connection"]) == (status, "close")
    assert headers["x-request-id"]
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert await asyncio.wait_for(reader.read(), PATIENCE) == b""


@pytest.fixture
def app(anyio_backend: str) -> App:
    return App()


async def test_headers_that_come_too_late_get_408(app: App) -> None:
    async with serve(app) as server, connect(server, GET[:-2]) as (reader, _):
        began = time.monotonic()
        await assert_refused(reader, 408, "request_timeout")
        assert SECONDS * 0.8 < time.monotonic() - began < PATIENCE
        assert app.num_calls == 0


async def test_headers_that_drip_get_no_more_time(app: App) -> None:
    async with serve(app) as server, connect(server) as (reader, writer):
        began = time.monotonic()
        answer = asyncio.ensure_future(read_answer(reader))
        while not answer.done():
            assert time.monotonic() - began < PATIENCE
            writer.write(b"G")
            await asyncio.sleep(0.02)
        assert answer.result()[0] == 408


async def test_first_headers_have_their_time_from_the_connection_on(app: App) -> None:
    async with serve(app) as server, connect(server) as (reader, writer):
        began = time.monotonic()
        await asyncio.sleep(SECONDS * 0.8)
        writer.write(GET[:-2])
        await assert_refused(reader, 408, "request_timeout")
        assert time.monotonic() - began < SECONDS * 1.6


async def test_silent_connection_is_closed_without_a_word(app: App) -> None:
    async with serve(app) as server, connect(server) as (reader, _):
        assert await asyncio.wait_for(reader.read(), PATIENCE) == b""


async def test_kept_connection_may_rest_but_its_next_headers_must_come_in_time(app: App) -> None:
    async with serve(app) as server, connect(server, GET) as (reader, writer):
        assert (await read_answer(reader))[0] == 200
        await asyncio.sleep(SECONDS * 1.5)
        writer.write(GET)
        assert (await read_answer(reader))[0] == 200
        writer.write(GET[:-2])
        await assert_refused(reader, 408, "request_timeout")


@pytest.mark.parametrize("rest", [b"Content-Length: 9\r\n\r\nabc", b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"])
async def test_body_that_comes_too_late_gets_408_and_the_app_a_disconnect(app: App, rest: bytes) -> None:
    async with serve(app) as server, connect(server, POST + rest) as (reader, _):
        await assert_refused(reader, 408, "request_timeout")
        await asyncio.wait_for(app.disconnected.wait(), PATIENCE)


async def test_body_has_its_own_time(app: App) -> None:
    async with serve(app) as server, connect(server, POST) as (reader, writer):
        await asyncio.sleep(SECONDS * 0.7)
        writer.write(b"Content-Length: 3\r\n\r\n")
        await asyncio.sleep(SECONDS * 0.7)
        writer.write(b"abc")
        assert (await read_answer(reader))[2] == b"abc"


async def test_late_rest_of_one_body_takes_no_time_from_the_next(app: App) -> None:
    early = b"POST /early HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n"
    async with serve(app) as server, connect(server, early) as (reader, writer):
        assert (await read_answer(reader))[2] == b"ok"
        await asyncio.sleep(SECONDS * 0.7)
        writer.write(b"123" + POST + b"Content-Length: 3\r\n\r\n")
        await asyncio.sleep(SECONDS * 0.7)
        writer.write(b"abc")
        assert (await read_answer(reader))[2] == b"abc"


async def test_awaited_body_is_asked_for_and_still_has_to_come_in_time(app: App) -> None:
    expecting = POST + b"Content-Length: 3\r\nExpect: 100-continue\r\n\r\n"
    async with serve(app) as server:
        async with connect(server, expecting) as (reader, writer):
            assert b" 100 " in await reader.readuntil(b"\r\n\r\n")
            writer.write(b"abc")
            assert (await read_answer(reader))[2] == b"abc"
        async with connect(server, expecting) as (reader, _):
            assert b" 100 " in await reader.readuntil(b"\r\n\r\n")
            await assert_refused(reader, 408, "request_timeout")


async def test_pipelined_requests_are_answered_in_order_and_each_in_its_time(app: App) -> None:
    first = POST + b"Content-Length: 1\r\n\r\n1"
    second = POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\n2\r\n0\r\n\r\n"
    late = POST + b"Content-Length: 2\r\n\r\n3"
    async with serve(app) as server, connect(server, first + second + late) as (reader, _):
        assert (await read_answer(reader))[2] == b"1"
        assert (await read_answer(reader))[2] == b"2"
        await assert_refused(reader, 408, "request_timeout")


async def test_waiting_for_an_answer_costs_no_time_of_the_client(app: App) -> None:
    async with serve(app) as server, connect(server, b"GET /hold HTTP/1.1\r\nHost: x\r\n\r\n") as (reader, writer):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), SECONDS * 2)
        assert not app.disconnected.is_set()
        writer.transport.abort()
        await asyncio.wait_for(app.disconnected.wait(), PATIENCE)


async def test_client_that_reads_nothing_is_cut_off(app: App) -> None:
    async with serve(app) as server, connect(server, b"GET /endless HTTP/1.1\r\nHost: x\r\n\r\n"):
        began = time.monotonic()
        await asyncio.wait_for(app.disconnected.wait(), PATIENCE)
        assert time.monotonic() - began > SECONDS * 0.7


async def test_client_that_takes_its_answer_slowly_but_steadily_gets_all_of_it(app: App) -> None:
    body = b"x" * 150_000
    began = time.monotonic()
    async with (
        serve(app) as server,
        connect(server, POST + b"Content-Length: %d\r\n\r\n" % len(body)) as (reader, writer),
    ):
        writer.write(body)
        num_read = 0
        while num_read < len(body):
            await asyncio.sleep(SECONDS / 12)
            num_read += len(await reader.readexactly(min(4096, len(body) - num_read)))
        assert time.monotonic() - began > SECONDS * 2


async def test_rest_of_an_answer_that_nobody_takes_does_not_keep_the_connection(app: App) -> None:
    body = b"x" * 50_000
    request = POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    async with serve(app) as server, connect(server, request):
        await until(lambda: app.num_calls == 1)
        await asyncio.wait_for(until(lambda: not server.server_state.connections), PATIENCE)


async def test_client_that_reads_nothing_makes_the_engine_abort(anyio_backend: str) -> None:
    class Endless(FakeEngine):
        async def _chat(self, body: dict[str, Any], receive: Any, reply: Any) -> None:
            await reply.start(200, "text/event-stream")
            watcher = asyncio.ensure_future(receive())
            while not watcher.done():
                delta = {"index": 0, "delta": {"content": "x" * 8192}, "finish_reason": None}
                await reply.event({"id": "1", "object": "chat.completion.chunk", "choices": [delta]})
                await asyncio.sleep(0.001)
            self.closed.set()

    engine = Endless()
    body = json.dumps(ask(model="fake-llava", stream=True)).encode()
    request = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    request += b"Content-Length: %d\r\n\r\n" % len(body) + body
    async with serve(make_app(Settings(), engine), lifespan="on") as server, connect(server, request) as (reader, _):
        assert b"200" in await reader.readline()
        await asyncio.wait_for(engine.closed.wait(), PATIENCE)


@pytest.mark.parametrize(("num_bytes", "is_whole"), [(70_000, True), (70_000, False), (2_000_000, False)])
async def test_large_headers_get_431(app: App, num_bytes: int, is_whole: bool) -> None:
    headers = b"".join(b"X-%d: %s\r\n" % (number, b"x" * 1000) for number in range(num_bytes // 1000))
    async with serve(app) as server, connect(server, GET[:-2] + headers + b"\r\n" * is_whole) as (reader, _):
        await assert_refused(reader, 431, "headers_too_large")
        assert app.num_calls == 0


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
        b"GET\r\n\r\n",
        GET[:-2] + b"a b: c\r\n\r\n",
        POST + b"Content-Length: x\r\n\r\n",
    ],
)
async def test_what_is_not_http_gets_400(app: App, sent: bytes) -> None:
    async with serve(app) as server, connect(server, sent) as (reader, _):
        await assert_refused(reader, 400, "invalid_http")
        assert app.num_calls == 0


async def test_broken_chunk_gets_400_and_the_app_a_disconnect(app: App) -> None:
    sent = POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"
    async with serve(app) as server, connect(server, sent) as (reader, _):
        await assert_refused(reader, 400, "invalid_http")
        await asyncio.wait_for(app.disconnected.wait(), PATIENCE)


async def test_request_for_a_websocket_is_an_ordinary_one(app: App) -> None:
    sent = GET[:-2] + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    async with serve(app) as server, connect(server, sent) as (reader, _):
        assert (await read_answer(reader))[0] == 200


async def test_idle_connections_make_room_for_those_that_ask(app: App) -> None:
    async with serve(app, max_connections=50) as server:
        others = [await asyncio.open_connection(*server.address) for _ in range(200)]  # type: ignore[attr-defined]
        async with connect(server, GET) as (reader, _):
            assert (await asyncio.wait_for(read_answer(reader), PATIENCE))[0] == 200
            assert len(server.server_state.connections) <= 50
        for _, writer in others:
            writer.close()


@pytest.mark.parametrize("sent", [b"GET /hold HTTP/1.1\r\nHost: x\r\n\r\n", POST + b"Content-Length: 2\r\n\r\n{"])
async def test_newcomer_is_turned_away_when_all_connections_are_busy(app: App, sent: bytes) -> None:
    async with serve(app, max_connections=2) as server, connect(server, sent), connect(server, sent):
        await until(lambda: app.num_calls == 2)
        async with connect(server) as (reader, _):
            await assert_refused(reader, 503, "too_many_connections")
        assert not app.disconnected.is_set()


UNFINISHED = b"Host: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"


@pytest.mark.parametrize(
    "sent",
    [
        b"G",
        b"POST /none HTTP/1.1\r\n" + UNFINISHED,
        b"POST /v1/chat/completions HTTP/1.1\r\n" + UNFINISHED,
        b"GET /health HTTP/1.1\r\n" + UNFINISHED,
        b"what?\r\n\r\n",
    ],
)
async def test_strangers_without_a_key_cannot_take_all_connections(sent: bytes) -> None:
    gateway = make_app(Settings(api_key="secret"), FakeEngine())
    async with serve(gateway, max_connections=20, lifespan="on") as server, AsyncExitStack() as strangers:
        for _ in range(30):
            await strangers.enter_async_context(connect(server, sent))
        await until(lambda: len(server.server_state.connections) == 20)
        async with connect(server, GET) as (reader, _):
            assert (await asyncio.wait_for(read_answer(reader), PATIENCE))[0] == 200


@pytest.mark.parametrize("path", [b"/events", b"/hold"])
async def test_answers_that_are_cut_off_end_with_an_error(app: App, path: bytes) -> None:
    async with serve(app) as server, connect(server, b"GET " + path + b" HTTP/1.1\r\nHost: x\r\n\r\n") as (reader, _):
        await until(lambda: app.num_calls == 1)
        await asyncio.sleep(0.02)
        server.cut_off()
        if path == b"/hold":
            await assert_refused(reader, 503, "stopping")
        else:
            status, _, body = await read_answer(reader)
            events = body.decode().strip().split("\n\n")
            assert (status, events[0]) == (200, "data: 1")
            assert json.loads(events[1].removeprefix("data: "))["error"]["code"] == "stopping"
        await asyncio.wait_for(app.disconnected.wait(), PATIENCE)


@pytest.mark.parametrize("sent_id", [None, "mine-1"])
async def test_request_that_is_late_has_one_id_and_one_outcome_for_client_log_and_metrics(
    caplog: pytest.LogCaptureFixture, sent_id: str | None
) -> None:
    caplog.set_level("INFO", logger="visiondrop.requests")
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n"
    head += b"" if sent_id is None else b"X-Request-Id: " + sent_id.encode() + b"\r\n"
    gateway = make_app(Settings(), FakeEngine())
    async with serve(gateway, lifespan="on") as server, connect(server, head + b"\r\n{") as (reader, _):
        status, headers, _ = await read_answer(reader)
        await until(lambda: bool(caplog.messages))
        async with connect(server, GET.replace(b"/health", b"/metrics")) as (reader, _):
            _, _, metrics = await read_answer(reader)

    line = json.loads(caplog.messages[-1])
    assert status == line["status"] == 408
    assert headers["x-request-id"] == line["request_id"]
    assert sent_id in (None, line["request_id"])
    series = 'visiondrop_requests_total{budget_class="none",code="408",route="/v1/chat/completions"}'
    assert metric(metrics.decode(), series) == 1


async def test_stream_that_is_cut_off_counts_as_that(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="visiondrop.requests")
    engine = FakeEngine()
    engine.hold = True
    body = json.dumps({**ask(), "stream": True}).encode()
    request = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    request += b"Content-Length: %d\r\n\r\n" % len(body) + body
    async with (
        serve(make_app(Settings(), engine), lifespan="on") as server,
        connect(server, request) as (reader, _),
    ):
        await reader.readuntil(b"A ")
        server.cut_off()
        await until(lambda: bool(caplog.messages))

    line = json.loads(caplog.messages[-1])
    assert (line["status"], line["error"]) == (503, "the server was stopped before the answer was complete; try again")


async def test_connections_are_bounded_by_the_files_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    wishes: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda _, wish: wishes.append(wish))
    assert allowed_connections(100) == 100
    assert wishes == []
    assert allowed_connections(1000) == 1000
    assert wishes == [(2256, 4096)]
    assert allowed_connections(5000) == 1920


@pytest.mark.parametrize("chunked", [b"Transfer-Encoding: chunked\r\n", b"TRANSFER-ENCODING:chunked\r\n"])
@pytest.mark.parametrize("is_first", [True, False])
async def test_request_with_two_lengths_is_refused(app: App, chunked: bytes, is_first: bool) -> None:
    length = b"Content-Length: 6\r\n"
    headers = (chunked + length if is_first else length + chunked) + b"\r\n"
    smuggled = b"0\r\n\r\n" + GET
    async with serve(app) as server, connect(server, POST + headers + smuggled) as (reader, _):
        await assert_refused(reader, 400, "invalid_http")
        assert app.num_calls == 0


@pytest.mark.parametrize(
    ("target", "path"),
    [
        (b"http://x/events", "/events"),
        (b"HTTPS://user@else.where:99/events?a=http://b/c", "/events"),
        (b"http://x", "/"),
        (b"http://x?a=b", "/"),
        (b"/http://x/events", "/http://x/events"),
    ],
)
async def test_target_may_be_absolute(app: App, target: bytes, path: str) -> None:
    sent = b"GET " + target + b" HTTP/1.1\r\nHost: x\r\n\r\n"
    async with serve(app) as server, connect(server, sent) as (reader, _):
        assert b" 200 " in await reader.readline()
    assert app.path == path


async def test_head_has_no_body_on_the_wire() -> None:
    head = GET.replace(b"GET", b"HEAD")
    async with (
        serve(make_app(Settings(), FakeEngine()), lifespan="on") as server,
        connect(server, head) as (reader, to),
    ):
        first = await reader.readuntil(b"\r\n\r\n")
        to.write(GET)
        status, headers, body = await read_answer(reader)
    assert first.startswith(b"HTTP/1.1 200 ")
    assert status == 200
    assert b"content-length: %d\r\n" % len(body) in first
    assert headers["content-type"].encode() in first


@pytest.mark.parametrize(
    ("rest", "status"),
    [
        (b"Content-Length: 3\r\n\r\n", 408),
        (b"X: " + b"x" * 70_000 + b"\r\n\r\n", 431),
        (b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    ],
)
async def test_refusal_of_head_has_no_body(app: App, rest: bytes, status: int) -> None:
    async with serve(app) as server, connect(server, GET.replace(b"GET", b"HEAD")[:-2] + rest) as (reader, _):
        answer = await asyncio.wait_for(reader.read(), PATIENCE)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert body == b""


@pytest.mark.parametrize(
    ("rest", "status", "code"), [(b"what?\r\n\r\n", 400, "invalid_http"), (b"GET", 408, "request_timeout")]
)
async def test_refusal_after_head_has_its_body(app: App, rest: bytes, status: int, code: str) -> None:
    head = GET.replace(b"GET", b"HEAD")
    async with serve(app) as server, connect(server, head + rest) as (reader, _):
        assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
        await assert_refused(reader, status, code)
