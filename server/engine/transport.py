"""How the bytes of a request to an engine travel: on a connection of its own, which ends with it.

No connection is kept for another request: uvicorn closes idle ones after a while, and a request that is sent at that
moment would fail. A new one costs well under a millisecond.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Generator
from contextlib import contextmanager

import httpcore
import httpx

from server.sockets import OwnedSocket


class EngineTransport(httpx.AsyncBaseTransport):
    """httpx's transport without its pool.

    Args:
        uds: path of the unix socket to connect to, whatever the host of a request's URL is.
        ssl_context: for URLs with `https`.
    """

    def __init__(self, *, uds: str | None = None, ssl_context: ssl.SSLContext | None = None) -> None:
        self._uds = uds
        self._ssl_context = ssl_context

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        parts = request.url
        url = httpcore.URL(scheme=parts.raw_scheme, host=parts.raw_host, port=parts.port, target=parts.raw_path)
        socket = OwnedSocket()
        connection = httpcore.AsyncHTTPConnection(
            url.origin, ssl_context=self._ssl_context, uds=self._uds, network_backend=socket
        )
        assert isinstance(request.stream, httpx.AsyncByteStream)
        sent = httpcore.Request(
            request.method, url, headers=request.headers.raw, content=request.stream, extensions=request.extensions
        )
        try:
            with _errors_of_httpx():
                response = await connection.handle_async_request(sent)
        except BaseException:
            await socket.aclose()
            raise
        return httpx.Response(response.status, headers=response.headers, stream=_Body(response, socket))


class _Body(httpx.AsyncByteStream):
    def __init__(self, response: httpcore.Response, socket: OwnedSocket) -> None:
        self._response = response
        self._socket = socket

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _errors_of_httpx():
            async for part in self._response.aiter_stream():
                yield part

    async def aclose(self) -> None:
        await self._socket.aclose()


@contextmanager
def _errors_of_httpx() -> Generator[None, None, None]:
    """httpcore's errors as httpx's, which have the same names."""
    try:
        yield
    except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException) as error:
        raise getattr(httpx, type(error).__name__)(str(error)) from error
