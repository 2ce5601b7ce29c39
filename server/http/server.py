"""uvicorn as the gateway uses it: guarded connections, no signal handlers of its own, no log lines of its own.

Metrics can have a port of their own, so that they can be scraped without a key and kept from the clients' network.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
from collections.abc import AsyncGenerator, Generator
from typing import Any, Final, Literal

import uvicorn
from starlette.types import ASGIApp

from server.errors import OverloadedError
from server.http.connection import ConnectionGuard, ConnectionLimits, guard_connections

_KEEP_ALIVE_SECONDS: Final = 75
"""Longer than clients and load balancers keep idle connections (5 to 60 s), so that they are the ones who close. A
connection that the server closes while a request is on its way fails that request."""

_END_SECONDS: Final = 0.5
"""For answers' last bytes and for what is not counted as in flight, once the server ends."""

_CANCEL_SECONDS: Final = 2
"""Then uvicorn would cancel what is left, with a traceback for each. Nothing should be."""

_FILES_PER_CONNECTION: Final = 2  # the client's, and one to the engine
_OTHER_FILES: Final = 256  # fetched images, logs, threads' pipes, listeners

# Scrapers are few, and their requests are a few hundred bytes.
_METRICS_LIMITS: Final = ConnectionLimits(header_seconds=10, body_seconds=10, send_seconds=10, max_connections=64)


class HttpServer(uvicorn.Server):
    """Serves one app. Set `should_exit` to end it: no connection is accepted any more, and idle ones are closed."""

    def __init__(self, app: ASGIApp, limits: ConnectionLimits, lifespan: Literal["on", "off"] = "on") -> None:
        config = uvicorn.Config(
            app,
            http=guard_connections(limits),
            ws="none",
            lifespan=lifespan,
            log_config=None,
            log_level="error",  # its warnings report clients' mistakes; anybody could fill the log with them
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=_CANCEL_SECONDS,
        )
        super().__init__(config)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """None: those of the process also manage the engine."""
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        timer = asyncio.get_running_loop().call_later(_END_SECONDS, self._abort)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    def cut_off(self) -> None:
        """End every answer that is under way; the app sees that its clients have gone."""
        sentence = "the server was stopped before the answer was complete; try again"
        error = OverloadedError(sentence, reason="stopping")
        for connection in self._connections():
            connection.cut_off(error)

    def _abort(self) -> None:
        self.cut_off()
        for connection in self._connections():
            connection.transport.abort()

    def _connections(self) -> list[ConnectionGuard]:
        return [item for item in self.server_state.connections if isinstance(item, ConnectionGuard)]


def allowed_connections(wanted: int) -> int:
    """How many connections there are files for, at most `wanted`. Raises the process's soft limit as far as needed."""
    needed = wanted * _FILES_PER_CONNECTION + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    return max((soft - _OTHER_FILES) // _FILES_PER_CONNECTION, 1)


@contextlib.asynccontextmanager
async def serve_metrics(app: ASGIApp, listener: socket.socket | None) -> AsyncGenerator[None, None]:
    """Serve `app` on `listener` meanwhile; with None do nothing. The app's lifespan is not run.

    Raises:
        OSError: the socket cannot be listened on.
    """
    if listener is None:
        yield
        return
    server = HttpServer(app, _METRICS_LIMITS, lifespan="off")
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


def silence_late_results(loop: asyncio.AbstractEventLoop) -> None:
    """Log nothing where a unix socket becomes ready in the very moment in which nobody waits for it any more.

    anyio (4.16, `UNIXSocketStream`) then sets the result of a future that has been cancelled. It happens when clients
    leave while the engine answers. REMOVE WHEN: anyio checks whether the future is done.
    """

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        is_late = isinstance(context.get("exception"), asyncio.InvalidStateError)
        if not (is_late and "Future.set_result" in repr(context.get("handle"))):
            loop.default_exception_handler(context)

    loop.set_exception_handler(handle)
