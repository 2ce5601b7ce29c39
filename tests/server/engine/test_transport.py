"""A connection for each request: it ends with the request, and its failures have httpx's names."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from departures import sockets_left_by
from origin import Origin, deaf_port, reply

from server.engine.client import EngineCall, HttpEngineClient
from server.engine.transport import EngineTransport
from server.http.server import silence_late_results

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def silent_engine(kind: str, folder: Path) -> AsyncIterator[str]:
    """The URL of an engine that takes requests and never answers."""
    if kind != "unix":
        async with Origin(is_mute=True) as origin:
            yield f"{kind}://127.0.0.1:{origin.port}"
        return

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65536):
            pass
        writer.close()

    async with await asyncio.start_unix_server(listen, folder / "engine"):
        yield f"unix:{folder / 'engine'}"


@pytest.mark.parametrize("body", [b"{}", bytes(3_000_000)], ids=["small", "large"])
@pytest.mark.parametrize("kind", ["http", "https", "unix"])
async def test_client_that_leaves_at_any_point_leaves_no_socket(kind: str, body: bytes, tmp_path: Path) -> None:
    silence_late_results(asyncio.get_running_loop())
    call = EngineCall("/v1/chat/completions", body, "req-1")
    async with silent_engine(kind, tmp_path) as url:
        client = HttpEngineClient.at(url)
        assert await sockets_left_by(lambda: client.complete(call)) == 0
        assert await sockets_left_by(lambda: client.open_stream(call), times=1) == 0
        await client.aclose()


async def test_answer_that_is_read_or_closed_leaves_no_socket() -> None:
    async with Origin() as origin, httpx.AsyncClient(transport=EngineTransport()) as client:
        origin.pages["/whole"] = reply(b"an answer")
        url = f"http://127.0.0.1:{origin.port}/whole"

        async def read() -> None:
            assert (await client.get(url)).content == b"an answer"

        async def close() -> None:
            async with client.stream("GET", url) as response:
                assert response.status_code == 200

        for ask in (read, close):
            origin.left.clear()
            await ask()
            await asyncio.wait_for(origin.left.wait(), 2)


@pytest.mark.parametrize(
    ("answer", "error"), [(b"", httpx.RemoteProtocolError), (b"what?\r\n\r\n", httpx.RemoteProtocolError)]
)
async def test_failures_are_those_of_httpx(answer: bytes, error: type[Exception]) -> None:
    async with Origin() as origin, httpx.AsyncClient(transport=EngineTransport()) as client:
        origin.pages["/"] = answer
        with pytest.raises(error):
            await client.get(f"http://127.0.0.1:{origin.port}/")
        origin.pages["/"] = reply(b"half", Content_Length="9")
        with pytest.raises(error):
            await client.get(f"http://127.0.0.1:{origin.port}/")
    async with httpx.AsyncClient(transport=EngineTransport(), timeout=httpx.Timeout(None, connect=0.05)) as client:
        with pytest.raises(httpx.ConnectError):
            await client.get(f"http://127.0.0.1:{origin.port}/")
        with deaf_port() as port, pytest.raises(httpx.ConnectTimeout):
            await client.get(f"http://127.0.0.1:{port}/")
