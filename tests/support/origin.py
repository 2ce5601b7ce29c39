"""A server of images on loopback that answers every path as it was told to, rightly or wrongly."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Self, TypeAlias

Handler: TypeAlias = Callable[[asyncio.StreamWriter], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Asked:
    """One request as it came in."""

    line: str
    headers: dict[str, str]


class Origin:
    """Use as a context. Its `pages` are whole responses, after which the connection is closed, or what to do with it.

    Args:
        is_mute: hears what clients say, and never answers; not even a TLS handshake.
    """

    def __init__(
        self, address: str = "127.0.0.1", port: int = 0, *, tls: ssl.SSLContext | None = None, is_mute: bool = False
    ) -> None:
        self.address = address
        self.port = port
        self.pages: dict[str, bytes | Handler] = {}
        self.requests: list[Asked] = []
        self.heard = asyncio.Event()
        """Some client has said something."""
        self.left = asyncio.Event()
        """Some client has closed its connection."""
        self._tls = tls
        self._is_mute = is_mute
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, self.address, self.port, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                await self._serve(reader, writer)
        except asyncio.CancelledError:
            writer.transport.abort()  # by __aexit__; asyncio's own server would report the cancellation as a defect
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = await reader.read(1)
        self.heard.set()
        if self._is_mute:
            await self._wait_end(reader)
            return
        if first == b"\x16":
            return  # a TLS handshake, in the wrong place
        head = (first + await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        line, *fields = head.rstrip().split("\r\n")
        self.requests.append(Asked(line, dict(field.split(": ", 1) for field in fields)))
        page = self.pages.get(line.split()[1], reply(b"no such page", "404 Not Found"))
        if isinstance(page, bytes):
            writer.write(page)
            writer.close()  # once all is sent
            await self._wait_end(reader)
            return
        answer = asyncio.ensure_future(page(writer))
        try:
            await self._wait_end(reader)
        finally:
            answer.cancel()
            await asyncio.wait((answer,))

    async def _wait_end(self, reader: asyncio.StreamReader) -> None:
        with suppress(ConnectionError):
            while await reader.read(65536):
                pass
        self.left.set()


def reply(body: bytes = b"", status: str = "200 OK", *, sized: bool = True, **headers: str) -> bytes:
    """A whole response; header names with underscores for dashes."""
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    if sized:
        fields.setdefault("Content-Length", str(len(body)))
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode("latin-1") + body


def redirect(location: str, status: str = "302 Found") -> bytes:
    return reply(b"it has moved", status, Location=location)


@contextmanager
def deaf_port(address: str = "127.0.0.1", port: int = 0) -> Iterator[int]:
    """A port where connecting neither succeeds nor fails: its queue is full."""
    with socket.create_server((address, port), backlog=0) as listener:
        port = listener.getsockname()[1]
        fillers = [socket.socket() for _ in range(3)]
        try:
            for filler in fillers:
                filler.setblocking(False)
                filler.connect_ex((address, port))
            yield port
        finally:
            for filler in fillers:
                filler.close()
