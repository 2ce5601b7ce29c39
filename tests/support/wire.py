"""A pool before fake engines, over wires that can be cut."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import asynccontextmanager
from typing import Any

import httpx
from asgi_transport import AsgiTransport

from server.engine.client import EngineCall, HttpEngineClient
from server.engine.pool import EnginePool
from server.settings import Settings


class Wire(AsgiTransport):
    """`fault` is raised in place of an answer; `is_cut` refuses connections."""

    def __init__(self, app: Any) -> None:
        super().__init__(app)
        self.is_cut = False
        self.fault: Exception | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if self.is_cut:
            raise httpx.ConnectError("refused")
        if self.fault is not None:
            raise self.fault
        return await super().handle_async_request(request)


def make_pool(settings: Settings, *wires: Wire) -> EnginePool:
    return EnginePool({str(number): HttpEngineClient(wire) for number, wire in enumerate(wires)}, settings)


@asynccontextmanager
async def running(pool: EnginePool) -> AsyncIterator[None]:
    """The pool is watched within, and closed at the end."""
    task = asyncio.create_task(pool.run())
    try:
        await pool.check()
        yield
    finally:
        task.cancel()
        await asyncio.wait((task,))
        assert task.cancelled()
        await pool.aclose()


def chat(*, stream: bool = False, cost: int = 0, images: tuple[Hashable, ...] = ()) -> EngineCall:
    body: dict[str, Any] = {"messages": [], "stream": stream, "stream_options": {"include_usage": False}}
    return EngineCall("/v1/chat/completions", json.dumps(body).encode(), "req-1", cost=cost, images=images)


async def until(condition: Callable[[], bool], seconds: float = 10) -> float:
    """Wait for the condition; returns the seconds it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() < started + seconds, "it did not happen"
        await asyncio.sleep(0.01)
    return time.monotonic() - started
