"""An engine that is stopped refuses new requests, finishes those it has, and only then lets vLLM shut down.

vLLM 0.32 has `--shutdown-timeout`, and with it running streams do finish. But until the process ends, its socket stays
open and /health stays 200, while new requests fail: chat completions with status 500 ("cannot schedule new futures
after shutdown", from the renderer's closed thread pool), and prompts of token ids with an empty answer of status 200
(`finish_reason` "abort"). A request that was being prepared when the signal came fails likewise. What still runs after
the timeout hangs until the process has gone, and so does everything that runs if there is no timeout.

With this middleware the signal begins a drain:

1. Requests get a 503 whose error has the type `DRAINING`, before anything was done for them; so does /health. A gateway
   sends them to another engine.
2. After NOTICE_SECONDS it is over once no request runs; with the timeout in any case. What runs then is cut off: its
   client gets an error, or the end of the connection.
3. uvicorn is told to exit. vLLM's own shutdown follows, and finds nothing to do.

A second signal ends the wait, and so does a timeout of 0, vLLM's default.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
from typing import TYPE_CHECKING, Final

from vd_plugin.wire import DRAINING

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

NOTICE_SECONDS: Final = 5.0
"""How long an idle engine stays to say that it drains. A gateway probes every 2 s and waits 3 s for the answer.

Were the socket closed at once, a connection that had just been made would be reset, and its request, which may have
begun for all that the gateway knows, could not go to another engine.
"""

_CUT_OFF_SECONDS: Final = 1
"""What is cut off gets so long to end: vLLM takes the requests back from its core."""

_logger = logging.getLogger(f"vllm.{__name__}")


def _error(message: str, kind: str, status: int) -> bytes:
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": status}}).encode()


_REFUSAL: Final = _error("the engine is shutting down", DRAINING, 503)
_CUT_OFF: Final = _error("the engine was stopped before the answer was complete", "engine_stopped", 500)


class DrainMiddleware:
    """ASGI middleware of vLLM's server. Work is what comes by POST; probes and metrics go on during a drain."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._is_draining = False
        self._is_urgent = asyncio.Event()
        self._running: set[asyncio.Future[None]] = set()
        self._is_cut_off = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._drain: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            # By now vLLM has registered its signal handlers, and set state.server (launcher.py, serve_http).
            state = scope["app"].state
            self._take_signals(state.server, state.args.shutdown_timeout)
            await self._app(scope, receive, send)
        elif scope["type"] != "http" or (scope["method"] != "POST" and scope["path"] != "/health"):
            await self._app(scope, receive, send)
        elif self._is_draining:
            await _refuse(receive, send)
        else:
            await self._run(scope, receive, send)

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_started = False

        async def note_start(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        work = asyncio.ensure_future(self._app(scope, receive, note_start))
        self._running.add(work)
        self._idle.clear()
        try:
            await work
        except asyncio.CancelledError:
            if not self._is_cut_off:
                raise
            # An answer that has begun is left as it is: uvicorn closes the connection, so that it does not look whole.
            if not has_started:
                await _answer(500, _CUT_OFF, send)
        finally:
            self._running.discard(work)
            if not self._running:
                self._idle.set()

    def _take_signals(self, server: uvicorn.Server, timeout_seconds: float) -> None:
        loop = asyncio.get_running_loop()

        def on_signal() -> None:
            if self._is_draining:
                self._is_urgent.set()
                return
            self._is_draining = True
            self._drain = loop.create_task(self._drain_until(server, timeout_seconds))

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal)

    async def _drain_until(self, server: uvicorn.Server, timeout_seconds: float) -> None:
        _logger.info("draining for up to %g s: %d requests are running", timeout_seconds, len(self._running))
        waits = [asyncio.ensure_future(wait) for wait in (self._finish(), self._is_urgent.wait())]
        await asyncio.wait(waits, timeout=timeout_seconds, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if self._running:
            _logger.warning("%d requests are cut off", len(self._running))
            self._is_cut_off = True
            for work in self._running:
                work.cancel()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), _CUT_OFF_SECONDS)
        server.config.timeout_graceful_shutdown = _CUT_OFF_SECONDS
        server.should_exit = True

    async def _finish(self) -> None:
        await asyncio.sleep(NOTICE_SECONDS)
        await self._idle.wait()


async def _refuse(receive: Receive, send: Send) -> None:
    """Take the whole body first: an answer before its end may be lost, since the connection is reset then."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        if not message.get("more_body"):
            break
    await _answer(503, _REFUSAL, send)


async def _answer(status: int, body: bytes, send: Send) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*headers, (b"connection", b"close")]})
    await send({"type": "http.response.body", "body": body})
