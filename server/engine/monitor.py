"""Is an engine up, and does it make progress?

vLLM's /health stays 200 while its core process is stopped or hangs: the API process answers it alone. So progress must
be seen, by any of these:

(a) an event or a whole answer that the engine gave to a client;
(b) the answer to a canary, a completion of one token, sent when there was nothing of (a) for a third of the bound;
(c) vLLM's counters having moved. They are read while the canary is late: on an engine that is busy with long answers it
    waits behind them, and that is no stall.

Two bounds follow, both counted from the last sign of progress, in time in which the gateway itself was not late
(awake_clock.py):

* After `engine_stall_seconds` the engine gets no new work.
* After LOST_FACTOR times that, what waits for it is given up. Nothing moves during one step of the engine, and a step
  with the prefill of large images can take longer than the first bound on a CPU; that must not cost an answer. Where
  steps are so slow, raise `engine_stall_seconds` to the length of the longest.
"""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from server.engine.awake_clock import AwakeClock
from server.engine.client import EngineCall, EngineLimits, HttpEngineClient
from server.errors import (
    EngineDrainingError,
    EngineMismatchError,
    EngineUnreachableError,
    GatewayError,
    RelayedError,
)
from server.settings import Settings
from vd_plugin.schedule import Geometry

LOST_FACTOR: Final = 4
"""Stall bounds without progress after which an engine's answers are given up."""

_PROBE_SECONDS: Final = 3.0

# Token ids need no tokenizer, and 1 is in every vocabulary. Without a model vLLM takes the one it serves.
_CANARY: Final = json.dumps({"prompt": [1], "max_tokens": 1, "temperature": 0}).encode()

# Set from the core's reports alone (vllm/v1/metrics/loggers.py, PrometheusStatLogger.record). The KV cache's gauge
# moves with every chunk of a long prefill, the others when tokens come out.
_COUNTERS: Final = (
    b"vllm:iteration_tokens_total_count",
    b"vllm:generation_tokens_total",
    b"vllm:prompt_tokens_total",
    b"vllm:kv_cache_usage_perc",
)

_log = logging.getLogger("visiondrop")


class EngineState(Enum):
    """Only an engine that is UP gets work."""

    STARTING = "starting"  # has not been up yet
    UP = "up"
    DRAINING = "draining"  # is being stopped: ends what it has, and takes nothing more
    STALLED = "stalled"  # answers, but makes no progress
    DOWN = "down"  # refuses connections, or reports itself dead
    MISMATCH = "mismatch"  # computes budgets differently


@dataclass(slots=True)
class Signs:
    """What has been seen of an engine. Times are those of the monitor's clock, in seconds."""

    answers: bool = False
    is_draining: bool = False
    fits: bool | None = None
    was_up: bool = False
    progress_at: float = 0.0


def state_of(signs: Signs, now: float, stall_seconds: float) -> EngineState:
    """The state that follows from the signs; the first reason against an engine counts."""
    if signs.is_draining:
        return EngineState.DRAINING
    if not signs.answers or signs.fits is None:
        return EngineState.DOWN if signs.was_up else EngineState.STARTING
    if not signs.fits:
        return EngineState.MISMATCH
    return EngineState.STALLED if now - signs.progress_at >= stall_seconds else EngineState.UP


@dataclass(frozen=True, slots=True)
class Served:
    """What an engine serves: engines behind one gateway must be alike in it."""

    geometry: Geometry
    models: frozenset[str]
    """Their names."""
    limits: EngineLimits = field(default_factory=EngineLimits)
    """In these they may differ."""
    boot_id: str = ""
    """In this they do differ, and a run of an engine from the next one."""

    def check(self, reference: Served) -> None:
        """
        Raises:
            EngineMismatchError: it is not what the other engines serve.
        """
        if self.geometry != reference.geometry:
            raise EngineMismatchError("the engine's geometry differs from that of the other engines")
        if self.models != reference.models:
            ours, theirs = (", ".join(sorted(models)) for models in (self.models, reference.models))
            raise EngineMismatchError(
                f"the engine serves {ours}, the other engines {theirs}; if it is the same model, give all of them the "
                "same --served-model-name"
            )


class EngineMonitor:
    """Watches one engine.

    Args:
        name: the engine's name in the log.
        clock: what times are measured with; it runs elsewhere.
        reference: what the engine must serve; None if anything will do.
        on_change: called when the state has changed, or what is served.
        on_lost: called at every probe at which the engine has made no progress for LOST_FACTOR stall bounds.
    """

    def __init__(
        self,
        name: str,
        client: HttpEngineClient,
        settings: Settings,
        clock: AwakeClock,
        *,
        reference: Callable[[], Served | None] = lambda: None,
        on_change: Callable[[], None] = lambda: None,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        self.served: Served | None = None
        self.mismatch: EngineMismatchError | None = None
        self._name = name
        self._client = client
        self._stall_seconds = settings.engine_stall_seconds
        self._quiet_seconds = settings.engine_stall_seconds / 3
        self._interval = min(settings.engine_probe_seconds, self._quiet_seconds)
        self._reference = reference
        self._on_change = on_change
        self._on_lost = on_lost
        self._clock = clock
        self._signs = Signs()
        self._reported = EngineState.STARTING
        self._canary: asyncio.Task[None] | None = None
        self._canary_at = 0.0
        self._is_canary_refused = False
        self._counters: frozenset[bytes] = frozenset()
        self._counters_at = 0.0

    @property
    def state(self) -> EngineState:
        """The state at this moment; costs no I/O."""
        return state_of(self._signs, self._clock.now(), self._stall_seconds)

    def mark_progress(self) -> None:
        """The engine has just done some work."""
        self._signs.progress_at = self._clock.now()
        if self._reported is EngineState.STALLED:
            self._report()

    def mark_unreachable(self) -> None:
        """A connection to the engine was refused."""
        self._signs.answers, self._signs.is_draining, self._signs.fits = False, False, None
        self._report()

    def mark_draining(self) -> None:
        """The engine says that it is being stopped."""
        self._signs.is_draining, self._signs.fits = True, None
        self._report()

    async def run(self) -> None:
        """Watch until cancelled."""
        try:
            while True:
                await self.probe()
                await self._seek_progress()
                self._report()
                if self._clock.now() - self._signs.progress_at >= LOST_FACTOR * self._stall_seconds:
                    self._on_lost()
                await asyncio.sleep(self._interval)
        finally:
            if self._canary is not None:
                self._canary.cancel()
                await asyncio.gather(self._canary, return_exceptions=True)
                self._canary = None

    async def probe(self) -> None:
        """Request the engine's health and geometry. Without a usable answer in time, progress alone decides."""
        try:
            async with asyncio.timeout(min(_PROBE_SECONDS, self._quiet_seconds)):
                await self._ask()
        except TimeoutError:
            pass
        self._report()

    async def _ask(self) -> None:
        try:
            answers = await self._client.probe_health()
        except EngineDrainingError:
            self.mark_draining()
            return
        if answers is None:
            return
        if not answers:
            self.mark_unreachable()
            return
        self._signs.answers, self._signs.is_draining = True, False
        try:
            served = await self._read_served()
            if (reference := self._reference()) is not None:
                served.check(reference)
        except EngineMismatchError as error:
            self.mismatch, self._signs.fits = error, False
        except EngineUnreachableError:
            self.mark_unreachable()
        except GatewayError:
            pass
        else:
            self._take(served)

    def _take(self, served: Served) -> None:
        is_replaced = bool(self._signs.fits) and served != self.served
        self.served = served
        if is_replaced or not self._signs.fits:
            # Just started: vLLM starts its HTTP server when its core works.
            self._signs.fits, self._signs.was_up = True, True
            self._signs.progress_at = self._clock.now()
        if is_replaced:
            _log.warning("engine %s was replaced between two probes", self._name)
            self._on_change()

    async def _read_served(self) -> Served:
        """The models are requested again only when something else has changed, or the engine was away."""
        geometry = await self._client.geometry()
        limits, boot_id, known = self._client.limits, self._client.boot_id, self.served
        if self._signs.fits and known is not None and known == Served(geometry, known.models, limits, boot_id):
            return known
        models = await self._client.models()
        return Served(geometry, frozenset(str(entry.get("id")) for entry in models), limits, boot_id)

    async def _seek_progress(self) -> None:
        """Send a canary, or read the counters if it is late; neither while there are other signs."""
        now = self._clock.now()
        quiet_seconds = now - self._signs.progress_at
        if self._signs.is_draining and quiet_seconds >= self._interval:
            await self._read_counters()  # it refuses canaries
        if not (self._signs.answers and self._signs.fits):
            return
        since_canary = now - self._canary_at
        is_pending = self._canary is not None and not self._canary.done()
        is_unanswered = is_pending or self._canary_at > self._signs.progress_at  # an overloaded engine refuses it
        if is_unanswered and min(since_canary, quiet_seconds) >= self._interval:
            await self._read_counters()
        if not is_pending and min(since_canary, quiet_seconds) >= self._quiet_seconds:
            if self._canary is not None:
                self._canary.result()  # raises what only a defect can raise
            self._canary_at = now
            self._canary = asyncio.create_task(self._send_canary())

    async def _send_canary(self) -> None:
        # The id must be its own: several gateways may watch the same engine.
        call = EngineCall("/v1/completions", _CANARY, f"canary-{uuid.uuid4().hex}")
        try:
            async with asyncio.timeout(LOST_FACTOR * self._stall_seconds):
                await self._client.complete(call)
        except RelayedError as error:
            # The API process refuses it by itself: such an engine cannot be watched any closer.
            if not self._is_canary_refused:
                self._is_canary_refused = True
                _log.warning("a stall of engine %s cannot be seen, since it refuses canaries: %s", self._name, error)
        except EngineUnreachableError:
            self.mark_unreachable()
            return
        except (GatewayError, TimeoutError):
            return
        self.mark_progress()

    async def _read_counters(self) -> None:
        try:
            async with asyncio.timeout(_PROBE_SECONDS):
                text = await self._client.metrics()
        except (GatewayError, TimeoutError):
            return
        counters = frozenset(line for line in text.splitlines() if line.startswith(_COUNTERS))
        # What moved before the last sign of progress would be news of the past.
        if self._counters_at >= self._signs.progress_at and counters - self._counters:
            self.mark_progress()
        self._counters, self._counters_at = counters, self._clock.now()

    def _report(self) -> None:
        state, before = self.state, self._reported
        if state is before:
            return
        self._reported = state
        is_good_news = before is EngineState.STARTING and state is EngineState.UP
        _log.log(logging.INFO if is_good_news else logging.WARNING, "engine %s %s", self._name, self._describe(state))
        self._on_change()

    def _describe(self, state: EngineState) -> str:
        match state:
            case EngineState.UP:
                return "is up"
            case EngineState.DRAINING:
                return "is shutting down"
            case EngineState.STALLED:
                return f"is stalled: no sign of progress for {self._stall_seconds:g} s"
            case EngineState.MISMATCH:
                return f"does not fit: {self.mismatch}"
            case EngineState.DOWN:
                return "is down"
            case EngineState.STARTING:
                return "is starting"
