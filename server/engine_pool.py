"""Several engines that serve the same model, as one.

A skeleton: the first engine gets everything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from server.engine_client import EngineCall, EventSource, HttpEngineClient
from server.settings import Settings
from vd_plugin.schedule import Geometry


class EnginePool:
    """Implements EngineClient over engines of its own; `engines` maps a short name (a metric's label) to each."""

    def __init__(self, engines: Mapping[str, HttpEngineClient], settings: Settings) -> None:
        self._engines = dict(engines)
        self._settings = settings
        self._first = next(iter(self._engines.values()))
        self.on_capacity_change: Callable[[], None] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._engines)

    def is_up(self, name: str) -> bool:
        """Whether the engine answers and makes progress, as far as is known."""
        return True

    @property
    def capacity(self) -> int:
        """Tokens that the engines which are up may work on at a time."""
        return sum(self.is_up(name) for name in self._engines) * self._settings.max_inflight_tokens

    async def run(self) -> None:
        """Watch the engines until cancelled."""

    async def check(self) -> None:
        """Look at every engine now. Returns when all have answered or timed out."""

    async def is_ready(self) -> bool:
        """Whether an engine is up now."""
        return await self._first.is_healthy()

    async def geometry(self) -> Geometry:
        return await self._first.geometry()

    async def models(self) -> list[dict[str, Any]]:
        return await self._first.models()

    async def complete(self, call: EngineCall) -> dict[str, Any]:
        return await self._first.complete(call)

    async def open_stream(self, call: EngineCall) -> EventSource:
        return await self._first.open_stream(call)

    async def metrics(self, name: str) -> bytes:
        """The metrics of one engine."""
        return await self._engines[name].metrics()

    async def aclose(self) -> None:
        for engine in self._engines.values():
            await engine.aclose()
