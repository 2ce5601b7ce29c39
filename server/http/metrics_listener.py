"""Metrics on a port of their own, so that they can be scraped without a key and kept from the clients' network."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator
from typing import Final

from starlette.types import ASGIApp

from server.http.connection import ConnectionLimits
from server.http.server import HttpServer

# Scrapers are few, and their requests are a few hundred bytes.
_LIMITS: Final = ConnectionLimits(header_seconds=10, body_seconds=10, send_seconds=10, max_connections=64)


@contextlib.asynccontextmanager
async def serve_metrics(app: ASGIApp, listener: socket.socket | None) -> AsyncGenerator[None, None]:
    """Serve `app` on `listener` meanwhile; with None do nothing. The app's lifespan is not run.

    Raises:
        OSError: the socket cannot be listened on.
    """
    if listener is None:
        yield
        return
    server = HttpServer(app, _LIMITS, lifespan="off")
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    try:
        while not server.started and not serving.done():  # noqa: ASYNC110  # uvicorn offers no event
            await asyncio.sleep(0.02)
        if serving.done():
            serving.result()
        yield
    finally:
        server.should_exit = True
        await asyncio.wait((serving,))
