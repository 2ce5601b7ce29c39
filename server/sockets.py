"""Sockets that the gateway opens, to engines and to hosts of images. Each is closed with the request that it is for.

httpcore alone loses sockets of cancelled requests. Its pool keeps a connection for ever whose request is cancelled
between the end of connecting and the first byte (AsyncHTTP11Connection.handle_async_request takes a lock there, before
its clean-up begins), and during a TLS handshake nothing closes the socket. So who connects owns the socket here.
"""

from __future__ import annotations

from collections.abc import Iterable

import httpcore


class OwnedSocket(httpcore.AsyncNetworkBackend):
    """A backend for one connection; close it when the request is over, however that ends."""

    def __init__(self) -> None:
        self._backend = httpcore.AnyIOBackend()
        self._stream: httpcore.AsyncNetworkStream | None = None

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 (httpcore's signature)
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        self._stream = await self._backend.connect_tcp(host, port, timeout, local_address, socket_options)
        return self._stream

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,  # noqa: ASYNC109 (likewise)
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        self._stream = await self._backend.connect_unix_socket(path, timeout, socket_options)
        return self._stream

    async def aclose(self) -> None:
        """Close the socket, if it has been opened. May be called more than once."""
        if self._stream is not None:
            await self._stream.aclose()
