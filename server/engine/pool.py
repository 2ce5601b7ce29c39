"""Several engines that serve the same model, as one.

A request goes to the engine with the least outstanding cost. An engine that has seen one of its images lately is
preferred, since it may still have the image's KV cache or encoder output, but only up to a slack: an image that
everybody sends must not make a hot spot.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Mapping
from types import TracebackType
from typing import Any, Final, TypeVar

from server.admission.context_length import ContextLength
from server.engine.awake_clock import AwakeClock
from server.engine.client import EngineCall, EventSource, HttpEngineClient
from server.engine.monitor import EngineMonitor, EngineState, Served
from server.errors import (
    EngineDrainingError,
    EngineFailedError,
    EngineMismatchError,
    EngineUnreachableError,
    GatewayError,
    OverloadedError,
)
from server.settings import Settings
from vd_plugin.schedule import Geometry

Result = TypeVar("Result")

AFFINITY_SLACK: Final = 1 / 8
"""Part of `max_inflight_tokens` by which an engine that knows the image may be ahead of the least busy one.

A hit saves the encoder's run and the prefill of one image, some 3,000 tokens unpruned. Most of what is outstanding
has its prefill behind it and only decodes, so a lead of several images costs less than a miss; a lead of half an
engine's capacity would not.
"""

_NUM_REMEMBERED_IMAGES: Final = 10_000
"""For each engine. More than its caches hold; the keys take about a megabyte."""

_WAITING_SHARE: Final = 1 / 8
"""Of the sequences that an engine works on: so many more wait in its front end, prepared, so that no place in the batch
stays empty. Who waits there cannot be overtaken."""

_log = logging.getLogger("visiondrop")


class EnginePool:
    """What the gateway needs of its engines; `engines` maps a short name (a metric's label) to each.

    While `run` is not running, the engines are probed for every request.
    """

    def __init__(self, engines: Mapping[str, HttpEngineClient], settings: Settings) -> None:
        self.on_capacity_change: Callable[[], None] | None = None
        self.clock = AwakeClock()
        self._settings = settings
        self._slack = AFFINITY_SLACK * settings.max_inflight_tokens
        self._engines = {name: _Engine(self, name, client, settings) for name, client in engines.items()}
        self._turn = 0
        self._is_watched = False
        self._reported_capacity = 0

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._engines)

    def is_up(self, name: str) -> bool:
        """Whether the engine answers and makes progress, as far as is known."""
        return self._engines[name].is_up

    def state(self, name: str) -> EngineState:
        return self._engines[name].monitor.state

    def outstanding_cost(self, name: str) -> int:
        """Tokens of the requests that the engine works on."""
        return self._engines[name].cost

    @property
    def capacity(self) -> int:
        """Tokens that the engines which are up may work on at a time."""
        return sum(engine.is_up for engine in self._engines.values()) * self._settings.max_inflight_tokens

    @property
    def max_sequences(self) -> float:
        """Answers that the engines which are up take at a time; infinite if one of them does not say."""
        return sum(engine.max_sequences for engine in self._engines.values() if engine.is_up)

    @property
    def away_cost(self) -> int:
        """Outstanding cost of the engines that are not up: they finish it, or lose it."""
        return sum(engine.cost for engine in self._engines.values() if not engine.is_up)

    @property
    def away_sequences(self) -> int:
        """Likewise, the answers."""
        return sum(engine.num_sequences for engine in self._engines.values() if not engine.is_up)

    async def context_length(self) -> ContextLength | None:
        """Of the engines that are up, that which takes the longest requests; None if none says how long."""
        served = [engine.monitor.served for engine in await self._engines_up()]
        known = [item.limits.context for item in served if item is not None and item.limits.context is not None]
        return max(known, key=lambda context: context.max_model_len, default=None)

    def refusal(self) -> GatewayError:
        """Why no engine takes work, when none is up."""
        monitors = [engine.monitor for engine in self._engines.values()]
        if all(monitor.state is EngineState.MISMATCH for monitor in monitors) and monitors[0].mismatch is not None:
            return EngineMismatchError(monitors[0].mismatch.message)
        return EngineUnreachableError("no engine is ready; try again later", code="engine_unreachable")

    async def run(self) -> None:
        """Watch the engines until cancelled."""
        try:
            # What goes wrong here goes wrong in the monitors again, and is logged there.
            probes = (engine.monitor.probe() for engine in self._engines.values())
            await asyncio.gather(*probes, return_exceptions=True)
            self._is_watched = True
            async with asyncio.TaskGroup() as group:
                group.create_task(self.clock.run())
                for engine in self._engines.values():
                    group.create_task(self._watch(engine))
        finally:
            self._is_watched = False

    async def check(self) -> None:
        """Probe every engine now. Returns when all have answered or timed out."""
        await asyncio.gather(*(engine.monitor.probe() for engine in self._engines.values()))

    async def is_ready(self) -> bool:
        """Whether an engine is up now."""
        return bool(await self._engines_up())

    async def geometry(self) -> Geometry:
        """The geometry of the engines that are up; no I/O.

        Raises:
            EngineMismatchError: no engine fits.
            EngineUnreachableError: none is up.
        """
        for engine in await self._engines_up():
            if engine.monitor.served is not None:
                return engine.monitor.served.geometry
        raise self.refusal()

    async def models(self) -> list[dict[str, Any]]:
        """The models of an engine that is up."""
        return await self._on_best(EngineCall("/v1/models", b"", ""), lambda engine: engine.client.models())

    async def complete(self, call: EngineCall) -> dict[str, Any]:
        """Ask the best engine for a whole answer.

        Raises:
            EngineUnreachableError: no engine is up.
            OverloadedError: those that are up take no more work.
            EngineFailedError: the engine broke off, or stopped answering; it may have begun, so there is no retry.
            RelayedError: the engine refused the request.
        """
        return await self._on_best(call, lambda engine: engine.complete(call))

    async def open_stream(self, call: EngineCall) -> EventSource:
        """Ask the best engine for a streamed answer. Raises as `complete` does."""
        return await self._on_best(call, lambda engine: engine.open_stream(call))

    async def metrics(self, name: str) -> bytes:
        """The metrics of one engine.

        Raises:
            KeyError: there is no such engine.
        """
        return await self._engines[name].client.metrics()

    async def aclose(self) -> None:
        for engine in self._engines.values():
            await engine.client.aclose()

    def reference_for(self, name: str) -> Served | None:
        """What an engine must serve: the same as the others. Alone, it may come back with anything."""
        serving = (EngineState.UP, EngineState.STALLED)
        for other in self._engines.values():
            if other.name != name and other.monitor.state in serving and other.monitor.served is not None:
                return other.monitor.served
        return None

    def notify_change(self) -> None:
        """An engine's state has changed."""
        if self.capacity != self._reported_capacity:
            self._reported_capacity = self.capacity
            if self.on_capacity_change is not None:
                self.on_capacity_change()

    async def _on_best(self, call: EngineCall, ask: Callable[[_Engine], Awaitable[Result]]) -> Result:
        """Ask the best engine, and the next best after a failure at which nothing can have been done."""
        await self._engines_up()
        tried: set[str] = set()
        overload: OverloadedError | None = None
        while (engine := self._choose(call, tried)) is not None:
            tried.add(engine.name)
            try:
                return await ask(engine)
            except EngineUnreachableError:
                engine.monitor.mark_unreachable()
            except EngineDrainingError:
                engine.monitor.mark_draining()
            except OverloadedError as error:
                overload = error
        raise overload or self.refusal()

    def _choose(self, call: EngineCall, tried: set[str]) -> _Engine | None:
        """The best engine that is up and not yet tried; None if there is none.

        Of those within the slack above the least cost: the one that has seen most of the images, has the least
        cost, has the fewest requests, was chosen longest ago.
        """
        candidates = [engine for engine in self._engines.values() if engine.is_up and engine.name not in tried]
        if not candidates:
            return None
        limit = min(engine.cost for engine in candidates) + self._slack
        images = set(call.images)
        best = min(
            (engine for engine in candidates if engine.cost <= limit),
            key=lambda engine: (-engine.num_seen(images), engine.cost, engine.num_requests, engine.chosen_at),
        )
        self._turn += 1
        best.chosen_at = self._turn
        return best

    async def _engines_up(self) -> list[_Engine]:
        if not self._is_watched:
            await self.check()
            for engine in self._engines.values():
                engine.monitor.mark_progress()  # nothing records progress without a watch, so its absence means nothing
        return [engine for engine in self._engines.values() if engine.is_up]

    async def _watch(self, engine: _Engine) -> None:
        while True:
            try:
                await engine.monitor.run()
            except Exception:
                _log.exception("the monitor of engine %s failed; it starts again", engine.name)
            await asyncio.sleep(self._settings.engine_probe_seconds)


class _Engine:
    """One engine, what it works on, and what it has seen."""

    def __init__(self, pool: EnginePool, name: str, client: HttpEngineClient, settings: Settings) -> None:
        self.name = name
        self.client = client
        self.cost = 0
        self.num_requests = 0
        self.num_sequences = 0
        self.chosen_at = 0
        self._pool = pool
        self._images: OrderedDict[Hashable, None] = OrderedDict()
        self._served: Served | None = None
        self._waits: set[asyncio.Timeout] = set()
        self.monitor = EngineMonitor(
            name,
            client,
            settings,
            pool.clock,
            reference=lambda: pool.reference_for(name),
            on_change=self._on_change,
            on_lost=self._give_up,
        )

    @property
    def is_up(self) -> bool:
        return self.monitor.state is EngineState.UP

    @property
    def max_sequences(self) -> float:
        served = self.monitor.served
        working = math.inf if served is None else served.limits.max_sequences
        return working if math.isinf(working) else working + math.ceil(working * _WAITING_SHARE)

    def num_seen(self, images: set[Hashable]) -> int:
        return sum(image in self._images for image in images)

    async def complete(self, call: EngineCall) -> dict[str, Any]:
        work = _Work(self, call)
        try:
            async with self.waiting():
                answer = await self.client.complete(call)
            self.monitor.mark_progress()
            return answer
        finally:
            work.end()

    async def open_stream(self, call: EngineCall) -> EventSource:
        work = _Work(self, call)
        try:
            async with self.waiting():
                source = await self.client.open_stream(call)
        except BaseException:
            work.end()
            raise
        return _WatchedEventSource(self, source, work)

    def remember(self, images: tuple[Hashable, ...]) -> None:
        for image in images:
            self._images[image] = None
            self._images.move_to_end(image)
        while len(self._images) > _NUM_REMEMBERED_IMAGES:
            self._images.popitem(last=False)

    def waiting(self) -> _Wait:
        """Around whatever only the engine can end."""
        return _Wait(self._waits)

    def _on_change(self) -> None:
        if self.monitor.state in (EngineState.DRAINING, EngineState.DOWN) or self.monitor.served is not self._served:
            self._images.clear()  # its caches are gone with it
        self._served = self.monitor.served
        self._pool.notify_change()

    def _give_up(self) -> None:
        """End all that waits. Streams that do not wait now, but later, are ended at the next probe."""
        now = asyncio.get_running_loop().time()
        for wait in self._waits:
            if not wait.expired():
                wait.reschedule(now)


class _Work:
    """A request's share in the engine's outstanding cost."""

    def __init__(self, engine: _Engine, call: EngineCall) -> None:
        self._engine = engine
        self._cost = call.cost
        self._is_over = False
        self._sequences = call.sequences
        engine.cost += call.cost
        engine.num_requests += 1
        engine.num_sequences += call.sequences
        engine.remember(call.images)

    def end(self) -> None:
        """May be called more than once."""
        if not self._is_over:
            self._is_over = True
            self._engine.cost -= self._cost
            self._engine.num_requests -= 1
            self._engine.num_sequences -= self._sequences


class _Wait:
    """A wait without an end of its own, which the monitor can end."""

    def __init__(self, waits: set[asyncio.Timeout]) -> None:
        self._waits = waits
        self._limit = asyncio.timeout(None)

    async def __aenter__(self) -> None:
        await self._limit.__aenter__()
        self._waits.add(self._limit)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._waits.discard(self._limit)
        try:
            await self._limit.__aexit__(kind, error, traceback)
        except TimeoutError:
            raise EngineFailedError("the engine stopped answering", code="engine_failed") from None


class _WatchedEventSource:
    """An engine's events, each of which is a sign of progress; comments that keep the connection alive are none."""

    def __init__(self, engine: _Engine, source: EventSource, work: _Work) -> None:
        self._engine = engine
        self._source = source
        self._work = work

    async def __aiter__(self) -> AsyncIterator[bytes]:
        events = aiter(self._source)
        try:
            while True:
                async with self._engine.waiting():
                    data = await anext(events, None)
                if data is None:
                    return
                self._engine.monitor.mark_progress()
                yield data
        finally:
            self._work.end()

    async def aclose(self) -> None:
        self._work.end()
        await self._source.aclose()
