"""httpx to ASGI without a network, chunk by chunk. httpx's own collects the whole body before it gives any of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx


class AsgiTransport(httpx.AsyncBaseTransport):
    """Closing the response, or giving up the request, is a disconnect for the app.

    Args:
        address: the client's.
    """

    def __init__(self, app: Any, address: str = "127.0.0.1") -> None:
        self._app = app
        self._address = address

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": request.method,
            "scheme": request.url.scheme,
            "path": request.url.path,
            "raw_path": request.url.raw_path,
            "query_string": request.url.query,
            "root_path": "",
            "headers": [(name.lower(), value) for name, value in request.headers.raw],
            "server": (request.url.host, request.url.port),
            "client": (self._address, 1),
        }
        exchange = _Exchange(await request.aread())
        exchange.task = asyncio.ensure_future(self._app(scope, exchange.receive, exchange.send))
        exchange.task.add_done_callback(lambda _: exchange.sent.put_nowait(None))
        try:
            start = await exchange.sent.get()
        except asyncio.CancelledError:
            await exchange.aclose()
            raise
        if start is None:
            raise httpx.ReadError(str(exchange.task.exception()))
        return httpx.Response(start["status"], headers=start["headers"], stream=exchange)


class _Exchange(httpx.AsyncByteStream):
    task: asyncio.Future[None]

    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body
        self._over = asyncio.Event()
        self.sent: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

    async def receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._over.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.put_nowait(message)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while (message := await self.sent.get()) is not None:
            if message["type"] == "http.response.body":
                yield message["body"]
                if not message.get("more_body"):
                    return
        raise httpx.RemoteProtocolError("the app ended before its answer did")

    async def aclose(self) -> None:
        self._over.set()
        await asyncio.wait((self.task,), timeout=5)
        assert self.task.done(), "the app did not notice the disconnect"
        self.task.exception()
