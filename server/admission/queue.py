"""A queue in front of the engines, shared fairly by weight and cost.

1. what fits while nobody waits enters at once
2. everything else waits, up to a number and a time; if all places are taken, the newest request of the party with the
   most of them has to go
3. whoever leaves gives the room back, and the next to enter is of the party that has had the least for its weight, in
   order of arrival within a party: fair queueing by start times, with the virtual time of WF2Q+ (Bennett, Zhang:
   IEEE/ACM Transactions on Networking 5.5, 1997), by which newcomers cannot starve whoever waits
4. a request for which there is no room yet may be overtaken, by work of up to the whole capacity or for a third of the
   longest wait; then it stops the line until it has entered, so that it cannot starve
5. while several parties are about, none takes the last eighth of the room: the next one finds some at once
6. a request holds at most the other seven eighths, however large it is: the engine itself queues what is beyond. Its
   work is counted whole
7. so whoever stops the line gets in although others pass it in the last eighth: parties that hold little

Decision 15 has the reasons. No library has a fair semaphore with weights and a changing capacity.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

import anyio

from server.admission.load import Load
from server.admission.party import Party
from server.admission.room import Room
from server.admission.work_rate import WorkRate
from server.errors import (
    LONGEST_RETRY_AFTER_SECONDS,
    EngineUnreachableError,
    GatewayError,
    OverloadedError,
    RateLimitError,
)
from server.settings import Settings

LARGEST_SHARE: Final = 7 / 8
"""Of the room, for one request, and for one party while others are about."""
OVERTAKING_SHARE: Final = 1 / 3
"""Of the longest wait: for so long a request may be overtaken."""

WAITED_REASONS: Final = frozenset({"parallel_requests", "queue_share", "queue_timeout"})
"""Of refusals, those of requests that had a place in the queue."""

_EVERYTHING: Final = Load(1 << 62, 1 << 62)
_ABOUT_SECONDS: Final = 60.0
"""After its last request a party counts as being about for so long."""
_MAX_PASSED: Final = 64
"""Waiting requests that are looked past for one that fits."""
_MAX_PASSED_OF_PARTY: Final = 8
"""Of these, so many of a party: nobody stops the line with many large ones."""
_MAX_PARTIES: Final = 4096
"""Beyond it, what those had who are gone is forgotten."""


@dataclass(slots=True)
class _Sum:
    """What several requests hold."""

    tokens: int = 0
    sequences: int = 0

    def add(self, held: Load) -> None:
        self.tokens += held.tokens
        self.sequences += held.sequences

    def subtract(self, held: Load) -> None:
        self.tokens -= held.tokens
        self.sequences -= held.sequences


@dataclass(eq=False, slots=True)
class _Waiter:
    """A request. `held` is what it takes of the room; it may change with the room until the request is let in."""

    load: Load
    flow: _Flow
    arrived: float
    held: Load
    is_aside: bool = False
    overtaken_work: int = 0
    is_granted: bool = False
    refusal: GatewayError | None = None
    called: anyio.Event = field(default_factory=anyio.Event)


@dataclass(eq=False, slots=True)
class _Flow:
    """A party's requests. `start` is the virtual time at which its next one would begin."""

    party: Party
    start: float = 0.0
    waiting: OrderedDict[_Waiter, None] = field(default_factory=OrderedDict)  # gives up any waiter in O(1)
    num_inflight: int = 0
    held: _Sum = field(default_factory=_Sum)

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.num_inflight

    @property
    def is_at_limit(self) -> bool:
        limit = self.party.max_parallel_requests
        return limit is not None and self.num_inflight >= limit


class Admission:
    """The queue. Costs are in tokens. For one event loop: it has no locks.

    Args:
        clock: seconds that only grow.
        max_queued: requests that may wait, if not as many as the settings say.
    """

    def __init__(
        self,
        settings: Settings,
        room: Room,
        clock: Callable[[], float] = time.monotonic,
        *,
        max_queued: float | None = None,
    ) -> None:
        self._max_queued = settings.max_queued_requests if max_queued is None else max_queued
        self._queue_seconds = settings.queue_seconds
        self._room = room
        self._clock = clock
        self._flows: dict[str, _Flow] = {}
        self._virtual_time = 0.0
        self._queue_depth = 0
        self._queued_cost = 0
        self._inflight = _Sum()
        self._aside = _Sum()  # of these, what passed a stopped line
        self._seen: dict[str, float] = {}  # the last two parties that came
        self._work = WorkRate()

    @property
    def queue_depth(self) -> int:
        """Requests that wait."""
        return self._queue_depth

    @property
    def inflight_cost(self) -> int:
        """Tokens that the requests hold which were admitted and have not left."""
        return self._inflight.tokens

    @asynccontextmanager
    async def admit(self, load: Load, party: Party) -> AsyncIterator[Load]:
        """Wait for room, hold it within the context, and give it back.

        Yields:
            What the request holds: its load, or of a larger one LARGEST_SHARE of the room.

        Raises:
            EngineUnreachableError: no engine is up.
            OverloadedError: the queue is full ("queue_full"), too slow ("queue_timeout"), or another party needs the
                place in it ("queue_share").
            RateLimitError: the party's own limit of parallel requests kept it waiting too long.
        """
        assert load.tokens > 0, load
        waiter = await self._enter(load, party)
        try:
            yield waiter.held
        finally:
            self._observe(load.tokens)
            self._release(waiter)

    def update(self) -> None:
        """Let in what fits. To be called when the capacity may have changed."""
        self._observe()
        self._grant()

    async def _enter(self, load: Load, party: Party) -> _Waiter:
        if self._room.capacity <= 0:
            raise EngineUnreachableError("no engine is ready; try again later", code="engine_unreachable")
        self._see(party)
        self.update()
        flow = self._flows.setdefault(party.name, _Flow(party))
        waiter = _Waiter(load, flow, self._clock(), self._held(load))
        self._add(waiter)
        self._grant()
        if not waiter.is_granted and self._queue_depth > self._max_queued:
            self._make_place(flow)
        await self._wait(waiter)
        return waiter

    async def _wait(self, waiter: _Waiter) -> None:
        if waiter.is_granted:
            return
        try:
            if waiter.refusal is None:
                with anyio.move_on_after(self._queue_seconds):
                    await waiter.called.wait()
        except BaseException:
            # The client left, perhaps in the very moment in which the waiter was let in.
            if waiter.is_granted:
                self._observe()
                self._release(waiter)
            elif waiter.refusal is None:
                self._give_up(waiter)
            raise
        if waiter.refusal is not None:
            raise waiter.refusal
        if not waiter.is_granted:
            refusal = self._timeout(waiter.flow)
            self._give_up(waiter)
            raise refusal

    # Who is next

    def _grant(self) -> None:
        while (waiter := self._next()) is not None:
            flow, load = waiter.flow, waiter.load
            self._advance(load)
            self._remove(waiter)
            flow.start += load.work / flow.party.weight
            flow.num_inflight += 1
            for total in self._sums(waiter):
                total.add(waiter.held)
            waiter.is_granted = True
            waiter.called.set()

    def _advance(self, load: Load) -> None:
        """Virtual time runs with the work, the slower the more parties share it."""
        waiting = [flow for flow in self._flows.values() if flow.waiting]
        passed = load.work / sum(flow.party.weight for flow in waiting)
        self._virtual_time = max(self._virtual_time + passed, min(flow.start for flow in waiting))

    def _next(self) -> _Waiter | None:
        """The next to enter; None if nobody can now."""
        if not self._queue_depth or self._room.capacity <= 0:
            return None
        passed: list[_Waiter] = []
        is_stopped = False
        for waiter in self._in_order():
            if self._fits(waiter.held) and (not is_stopped or self._may_pass_a_stopped_line(waiter)):
                for other in passed:
                    other.overtaken_work += waiter.load.work
                waiter.is_aside = is_stopped
                return waiter
            if len(passed) == _MAX_PASSED:
                return None
            is_stopped = is_stopped or self._stops_the_line(waiter)
            passed.append(waiter)
        return None

    def _in_order(self) -> Iterator[_Waiter]:
        """Who waits and is within its party's limits; of each party, the first few."""
        for flow in sorted((flow for flow in self._flows.values() if flow.waiting), key=lambda flow: flow.start):
            for waiter in islice(flow.waiting, _MAX_PASSED_OF_PARTY):
                waiter.held = self._held(waiter.load)
                if flow.is_at_limit or not self._is_within_share(flow, waiter.held):
                    break
                yield waiter

    def _stops_the_line(self, waiter: _Waiter) -> bool:
        age = self._clock() - waiter.arrived
        return waiter.overtaken_work >= self._room.capacity or age >= OVERTAKING_SHARE * self._queue_seconds

    def _may_pass_a_stopped_line(self, waiter: _Waiter) -> bool:
        """In what the largest request leaves free. A party that holds a quarter of these tokens is not small."""
        room, most = self._room, self._held(_EVERYTHING)
        tokens, sequences = room.capacity - most.tokens, room.max_sequences - most.sequences
        aside, own, held = self._aside, waiter.flow.held, waiter.held
        return (
            aside.tokens + held.tokens <= tokens
            and aside.sequences + held.sequences <= sequences
            and own.tokens + held.tokens <= tokens / 4
            and own.sequences + held.sequences <= max(sequences / 2, 1)
        )

    def _held(self, load: Load) -> Load:
        """What a load takes of the room as it is."""
        room = self._room
        tokens = min(load.tokens, LARGEST_SHARE * room.capacity)
        sequences = min(load.sequences, LARGEST_SHARE * room.max_sequences)
        return Load(max(int(tokens), 1), max(int(sequences), 1))

    def _fits(self, held: Load) -> bool:
        room, inflight = self._room, self._inflight
        return (
            inflight.tokens - room.away_cost + held.tokens <= room.capacity
            and inflight.sequences - room.away_sequences + held.sequences <= room.max_sequences
        )

    def _is_within_share(self, flow: _Flow, held: Load) -> bool:
        if not flow.num_inflight or not self._are_others_about(flow.party):
            return True
        room = self._room
        return (
            flow.held.tokens + held.tokens <= LARGEST_SHARE * room.capacity
            and flow.held.sequences + held.sequences <= LARGEST_SHARE * room.max_sequences
        )

    def _are_others_about(self, party: Party) -> bool:
        since = self._clock() - _ABOUT_SECONDS
        return any(name != party.name and seen >= since for name, seen in self._seen.items())

    def _see(self, party: Party) -> None:
        self._seen.pop(party.name, None)
        self._seen[party.name] = self._clock()
        if len(self._seen) > 2:
            del self._seen[next(iter(self._seen))]

    # Places

    def _add(self, waiter: _Waiter) -> None:
        flow = waiter.flow
        if not flow.waiting:
            flow.start = max(flow.start, self._virtual_time)
        flow.waiting[waiter] = None
        self._queue_depth += 1
        self._queued_cost += waiter.load.tokens

    def _remove(self, waiter: _Waiter) -> None:
        del waiter.flow.waiting[waiter]
        self._queue_depth -= 1
        self._queued_cost -= waiter.load.tokens

    def _make_place(self, newcomer: _Flow) -> None:
        """Turn away the newest request of the party with the most places for its weight; if equal, the newcomer's.

        The first place of each is free: a party's only one gives way to no longer queue, whatever the weights.
        """
        queues = (flow for flow in self._flows.values() if flow.waiting)
        longest = max(queues, key=lambda flow: ((len(flow.waiting) - 1) / flow.party.weight, flow is newcomer))
        loser = next(reversed(longest.waiting))
        loser.refusal = OverloadedError(
            "too many requests are waiting already; try again later",
            reason="queue_full" if longest is newcomer else "queue_share",
            code="queue_full",
            retry_after_seconds=self._retry_seconds(),
        )
        self._give_up(loser)
        loser.called.set()

    def _give_up(self, waiter: _Waiter) -> None:
        self._observe()
        self._remove(waiter)
        self._grant()
        self._forget()

    def _release(self, waiter: _Waiter) -> None:
        waiter.flow.num_inflight -= 1
        for total in self._sums(waiter):
            total.subtract(waiter.held)
        self._grant()
        self._forget()

    def _sums(self, waiter: _Waiter) -> list[_Sum]:
        """Those that it counts in once it is in flight."""
        return [self._inflight, waiter.flow.held, *([self._aside] if waiter.is_aside else [])]

    def _forget(self) -> None:
        """Parties that are gone; what they have had counts for as long as somebody waits."""
        if not self._queue_depth or len(self._flows) > _MAX_PARTIES:
            self._flows = {name: flow for name, flow in self._flows.items() if not flow.is_idle}

    def _timeout(self, flow: _Flow) -> GatewayError:
        waited = f"timed out after {self._queue_seconds:g} s in the queue"
        if flow.is_at_limit:
            return RateLimitError(
                f"{waited}: at most {flow.party.max_parallel_requests} requests with this key are worked on at a time",
                reason="parallel_requests",
                code="rate_limit_exceeded",
            )
        return OverloadedError(
            f"{waited}; try again later", reason="queue_timeout", retry_after_seconds=self._retry_seconds()
        )

    def _observe(self, cost_done: int = 0) -> None:
        self._work.observe(self._clock(), cost_done, is_busy=self._queue_depth > 0)

    def _retry_seconds(self) -> float:
        """When all that waits now will have entered, at the rate of late: then there is room again."""
        self._observe()
        rate = self._work.tokens_per_second
        seconds = self._queued_cost / rate if rate > 0 else self._queue_seconds
        return min(max(seconds, 1.0), LONGEST_RETRY_AFTER_SECONDS)
