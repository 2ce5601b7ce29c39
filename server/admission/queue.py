"""A queue in front of the engines: requests enter in the order of their arrival, as far as their costs fit.

1. what fits while nobody waits enters at once
2. everything else waits, up to a number and a time
3. whoever leaves gives the cost back, and the head of the queue enters as soon as it fits

The order is strict: a small request never overtakes a large one that waits, so a large one cannot starve. No library
has a fair semaphore with weights and a changing capacity; anyio's and asyncio's count units.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

import anyio

from server.errors import LONGEST_RETRY_AFTER_SECONDS, EngineUnreachableError, OverloadedError
from server.settings import Settings

_RATE_MEMORY_SECONDS: Final = 30.0
"""How fast the rate of work forgets: what is older by this much counts a third."""


@dataclass(eq=False, slots=True)
class _Waiter:
    cost: int
    granted: anyio.Event = field(default_factory=anyio.Event)


class Admission:
    """The queue. Costs are in tokens (text + kept visual tokens). For one event loop: it has no locks.

    Args:
        capacity: tokens that the engines take at a time, queried anew at every decision; 0 if none is up.
        away_cost: of what is in flight, the part on engines that count for no capacity: they drain, stall or are down.
            It takes no room on the others.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        settings: Settings,
        capacity: Callable[[], int],
        away_cost: Callable[[], int] = lambda: 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_queued = settings.max_queued_requests
        self._queue_seconds = settings.queue_seconds
        self._capacity = capacity
        self._away_cost = away_cost
        self._clock = clock
        self._queue: OrderedDict[_Waiter, None] = OrderedDict()  # unlike a deque, gives up any waiter in O(1)
        self._queued_cost = 0
        self._inflight_cost = 0
        self._work = _WorkRate()

    @property
    def queue_depth(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    @property
    def inflight_cost(self) -> int:
        """Tokens of the requests that were admitted and have not left."""
        return self._inflight_cost

    @asynccontextmanager
    async def admit(self, cost: int) -> AsyncIterator[None]:
        """Wait for room for `cost` tokens, hold it within the context, and give it back.

        A request that costs more than the whole capacity enters when nothing else is in flight there.

        Raises:
            EngineUnreachableError: no engine is up.
            OverloadedError: the queue is full ("queue_full") or too slow ("queue_timeout").
        """
        assert cost > 0, cost
        await self._enter(cost)
        try:
            yield
        finally:
            self._observe(cost)
            self._release(cost)

    def update(self) -> None:
        """Let in what fits. To be called when the capacity may have changed."""
        self._observe()
        self._grant()

    async def _enter(self, cost: int) -> None:
        if self._capacity() <= 0:
            raise EngineUnreachableError("no engine is ready; try again later", code="engine_unreachable")
        self.update()
        if not self._queue and self._fits(cost):
            self._inflight_cost += cost
            return
        if len(self._queue) >= self._max_queued:
            raise OverloadedError(
                "too many requests are waiting already; try again later",
                reason="queue_full",
                retry_after_seconds=self._retry_seconds(),
            )
        await self._wait(_Waiter(cost))

    async def _wait(self, waiter: _Waiter) -> None:
        self._queue[waiter] = None
        self._queued_cost += waiter.cost
        try:
            with anyio.move_on_after(self._queue_seconds):
                await waiter.granted.wait()
        except BaseException:
            # The client left, perhaps in the very moment in which the waiter was let in.
            if waiter.granted.is_set():
                self._observe()
                self._release(waiter.cost)
            else:
                self._give_up(waiter)
            raise
        if not waiter.granted.is_set():
            retry_seconds = self._retry_seconds()
            self._give_up(waiter)
            raise OverloadedError(
                f"timed out after {self._queue_seconds:g} s in the queue; try again later",
                reason="queue_timeout",
                retry_after_seconds=retry_seconds,
            )

    def _release(self, cost: int) -> None:
        self._inflight_cost -= cost
        self._grant()

    def _give_up(self, waiter: _Waiter) -> None:
        self._observe()
        self._remove(waiter)
        self._grant()

    def _remove(self, waiter: _Waiter) -> None:
        del self._queue[waiter]
        self._queued_cost -= waiter.cost

    def _grant(self) -> None:
        while self._queue and self._fits((head := next(iter(self._queue))).cost):
            self._remove(head)
            self._inflight_cost += head.cost
            head.granted.set()

    def _fits(self, cost: int) -> bool:
        capacity, taken = self._capacity(), self._inflight_cost - self._away_cost()
        return capacity > 0 and (taken <= 0 or taken + cost <= capacity)

    def _observe(self, cost_done: int = 0) -> None:
        self._work.observe(self._clock(), cost_done, is_busy=bool(self._queue))

    def _retry_seconds(self) -> float:
        """When all that waits now will have entered, at the rate of late: then there is room again."""
        self._observe()
        rate = self._work.tokens_per_second
        seconds = self._queued_cost / rate if rate > 0 else self._queue_seconds
        return min(max(seconds, 1.0), LONGEST_RETRY_AFTER_SECONDS)


class _WorkRate:
    """How fast the engines work off cost. Seen only while a queue stands: else it would be how fast requests come."""

    def __init__(self) -> None:
        self._last = 0.0
        self._tokens = 0.0  # both sums decay alike, so that their ratio is a weighted mean from the first moment
        self._seconds = 0.0

    def observe(self, now: float, tokens: int, *, is_busy: bool) -> None:
        """`tokens` were done at `now`; `is_busy` is about the time since the last call."""
        if is_busy:
            decay = math.exp((self._last - now) / _RATE_MEMORY_SECONDS)
            self._tokens = self._tokens * decay + tokens
            self._seconds = self._seconds * decay + _RATE_MEMORY_SECONDS * (1 - decay)
        self._last = now

    @property
    def tokens_per_second(self) -> float:
        """0 if nothing was done yet."""
        return self._tokens / max(self._seconds, 1.0)  # within the first second, chance rules
