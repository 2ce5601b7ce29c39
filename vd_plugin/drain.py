"""An engine that is stopped refuses new requests, finishes those it has, and only then lets vLLM shut down.

vLLM 0.32 has `--shutdown-timeout`, and with it running streams do finish. But until the process ends, its socket stays
open and /health stays 200, while new requests fail: chat completions with status 500 ("cannot schedule new futures
after shutdown", from the renderer's closed thread pool), and prompts of token ids with an empty answer of status 200
(`finish_reason` "abort"). A request that was being prepared when the signal came fails likewise.

With this middleware the signal begins a drain, if `--shutdown-timeout` is not 0 (with 0, vLLM ends at once what runs):

1. Requests get a 503 whose error has the type `DRAINING`, before anything was done for them; so does /health. A gateway
   sends them to another engine.
2. After NOTICE_SECONDS, and once no request runs or the timeout is over, uvicorn is told to exit. vLLM's own shutdown
   follows, and finds nothing to do.

A second signal ends the wait.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
from typing import TYPE_CHECKING, Final

from vd_plugin.wire import DRAINING

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp, Receive, Scope, Send

NOTICE_SECONDS: Final = 5.0
"""How long an idle engine stays to say that it drains. A gateway probes every 2 s and waits 3 s for the answer.

Were the socket closed at once, a connection that had just been made would be reset, and its request, which may have
begun for all that the gateway knows, could not go to another engine.
"""

_CUT_OFF_SECONDS: Final = 1
"""What is left after the timeout gets so long to end, by uvicorn's own means."""

_logger = logging.getLogger(f"vllm.{__name__}")

_REFUSAL: Final = json.dumps(
    {"error": {"message": "the engine is shutting down", "type": DRAINING, "param": None, "code": 503}}
).encode()


class DrainMiddleware:
    """ASGI middleware of vLLM's server. Work is what comes by POST; probes and metrics go on during a drain."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._is_draining = False
        self._is_urgent = asyncio.Event()
        self._num_running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._drain: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            # By now vLLM has registered its signal handlers, and set state.server (launcher.py, serve_http).
            state = scope["app"].state
            if state.args.shutdown_timeout > 0:
                self._take_signals(state.server, state.args.shutdown_timeout)
            await self._app(scope, receive, send)
        elif scope["type"] != "http" or (scope["method"] != "POST" and scope["path"] != "/health"):
            await self._app(scope, receive, send)
        elif self._is_draining:
            await _refuse(receive, send)
        else:
            await self._count(scope, receive, send)

    async def _count(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._num_running += 1
        self._idle.clear()
        try:
            await self._app(scope, receive, send)
        finally:
            self._num_running -= 1
            if not self._num_running:
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
        _logger.info("draining for up to %g s: %d requests are running", timeout_seconds, self._num_running)
        waits = [asyncio.ensure_future(wait) for wait in (self._finish(), self._is_urgent.wait())]
        await asyncio.wait(waits, timeout=timeout_seconds, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if self._num_running:
            _logger.warning("%d requests are cut off", self._num_running)
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
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(_REFUSAL)).encode())]
    await send({"type": "http.response.start", "status": 503, "headers": [*headers, (b"connection", b"close")]})
    await send({"type": "http.response.body", "body": _REFUSAL})
