"""Admission: the order, the sum, the deadlines, and that every cost comes back. Time is virtual."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import count

import anyio
import pytest
import virtual_time
from hypothesis import given, settings
from hypothesis import strategies as st

from server.admission.queue import Admission
from server.errors import EngineUnreachableError, GatewayError, OverloadedError
from server.settings import Settings

QUEUE_SECONDS = 30.0


@dataclass
class Hall:
    """An admission with its requests: each enters by a task of its own, and leaves when told."""

    capacity: int = 100
    away_cost: int = 0
    max_queued: int = 100
    arrived: list[str] = field(default_factory=list)
    entered: list[str] = field(default_factory=list)
    waited: dict[str, float] = field(default_factory=dict)
    inside: dict[str, int] = field(default_factory=dict)
    refused: dict[str, GatewayError] = field(default_factory=dict)
    tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    doors: dict[str, asyncio.Event] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.clock = asyncio.get_running_loop().time
        gateway = Settings(max_queued_requests=self.max_queued, queue_seconds=QUEUE_SECONDS)
        self.admission = Admission(gateway, lambda: self.capacity, lambda: self.away_cost, self.clock)

    def send(self, name: str, cost: int) -> None:
        self.doors[name] = asyncio.Event()
        self.tasks[name] = asyncio.create_task(self._visit(name, cost))

    async def arrive(self, *requests: tuple[str, int]) -> None:
        for name, cost in requests:
            self.send(name, cost)
        await settle()

    async def leave(self, *names: str) -> None:
        for name in names:
            self.doors[name].set()
        await settle()

    async def cancel(self, *names: str) -> None:
        for name in names:
            self.tasks[name].cancel()
        await settle()

    async def change_capacity(self, capacity: int) -> None:
        self.capacity = capacity
        self.admission.update()
        await settle()

    async def _visit(self, name: str, cost: int) -> None:
        self.arrived.append(name)
        try:
            began = self.clock()
            async with self.admission.admit(cost):
                self.waited[name] = self.clock() - began
                self.entered.append(name)
                self.inside[name] = cost
                await self.doors[name].wait()
        except GatewayError as error:
            self.refused[name] = error
        finally:
            self.inside.pop(name, None)


async def settle() -> None:
    for _ in range(6):
        await asyncio.sleep(0)


def in_hall(test: Callable[[Hall], Awaitable[None]], **options: int) -> None:
    async def run() -> None:
        hall = Hall(**options)
        await test(hall)
        for task in hall.tasks.values():
            task.cancel()
        await settle()
        assert (hall.admission.inflight_cost, hall.admission.queue_depth) == (0, 0)

    virtual_time.run(run())


def reason(error: GatewayError) -> str:
    assert isinstance(error, OverloadedError)
    assert error.status == 503
    return str(error.reason)


def test_what_fits_enters_at_once_and_gives_its_cost_back() -> None:
    async def laws(hall: Hall) -> None:
        await hall.arrive(("a", 60), ("b", 40))
        assert hall.entered == ["a", "b"]
        assert hall.waited == {"a": 0.0, "b": 0.0}
        assert hall.admission.inflight_cost == 100
        await hall.leave("a")
        assert hall.admission.inflight_cost == 40

    in_hall(laws)


def test_cost_comes_back_when_the_request_fails() -> None:
    async def laws(hall: Hall) -> None:
        async def fail() -> None:
            async with hall.admission.admit(100):
                raise ZeroDivisionError

        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                await fail()
            assert hall.admission.inflight_cost == 0

    in_hall(laws)


def test_small_request_does_not_overtake_a_large_one_that_waits() -> None:
    async def laws(hall: Hall) -> None:
        await hall.arrive(("a", 60), ("large", 80), ("small", 1))
        assert hall.entered == ["a"]
        assert hall.admission.queue_depth == 2
        await anyio.sleep(3)
        await hall.leave("a")
        assert hall.entered == ["a", "large", "small"]
        assert hall.waited["large"] == 3.0
        assert hall.admission.queue_depth == 0

    in_hall(laws)


def test_request_larger_than_everything_enters_alone() -> None:
    async def laws(hall: Hall) -> None:
        await hall.arrive(("a", 1), ("huge", 1000), ("b", 1))
        assert hall.entered == ["a"]
        await hall.leave("a")
        assert hall.entered == ["a", "huge"]
        await hall.leave("huge")
        assert hall.entered == ["a", "huge", "b"]
        await hall.leave("b")
        await hall.arrive(("huge2", 1000))
        assert "huge2" in hall.entered

    in_hall(laws)


def test_full_queue_refuses_at_once() -> None:
    async def laws(hall: Hall) -> None:
        await hall.arrive(("a", 100), ("b", 1), ("c", 1), ("d", 1))
        assert reason(hall.refused["d"]) == "queue_full"
        assert hall.admission.queue_depth == 2
        assert hall.clock() == 0.0
        await hall.leave("a")
        assert hall.entered == ["a", "b", "c"]

    in_hall(laws, max_queued=2)


def test_no_queue_at_all_still_lets_in_what_fits() -> None:
    async def laws(hall: Hall) -> None:
        await hall.arrive(("a", 50), ("b", 50), ("c", 1))
        assert hall.entered == ["a", "b"]
        assert reason(hall.refused["c"]) == "queue_full"

    in_hall(laws, max_queued=0)


def test_wait_ends_at_the_deadline_and_makes_way() -> None:
    async def laws(hall: Hall) -> None:
        await hall.arrive(("a", 60), ("large", 80))
        await anyio.sleep(10)
        await hall.arrive(("small", 40))
        await anyio.sleep(QUEUE_SECONDS - 10.1)
        assert not hall.refused
        await anyio.sleep(0.2)
        await settle()
        assert reason(hall.refused["large"]) == "queue_timeout"
        assert "30 s" in hall.refused["large"].message
        assert hall.entered == ["a", "small"]

    in_hall(laws)


def test_grant_in_the_very_turn_of_the_deadline_is_a_grant() -> None:
    async def laws(hall: Hall) -> None:
        def grant() -> None:
            hall.capacity = 200
            hall.admission.update()

        await hall.arrive(("a", 100), ("b", 100))
        asyncio.get_running_loop().call_at(QUEUE_SECONDS, grant)
        await anyio.sleep(QUEUE_SECONDS + 1)
        assert hall.entered == ["a", "b"]
        assert hall.admission.inflight_cost == 200

    in_hall(laws)


def test_no_engine_refuses_at_once() -> None:
    async def laws(hall: Hall) -> None:
        await hall.arrive(("a", 1))
        error = hall.refused["a"]
        assert isinstance(error, EngineUnreachableError)
        assert (error.code, error.status) == ("engine_unreachable", 503)
        assert hall.clock() == 0.0

    in_hall(laws, capacity=0)


def test_those_who_wait_outlast_a_restart_of_the_engine() -> None:
    async def laws(hall: Hall) -> None:
        await hall.arrive(("a", 100), ("b", 50))
        await hall.change_capacity(0)
        await hall.leave("a")
        await anyio.sleep(10)
        assert hall.entered == ["a"]
        assert hall.admission.queue_depth == 1
        await hall.change_capacity(100)
        assert hall.entered == ["a", "b"]

    in_hall(laws)


def test_more_capacity_lets_in_more() -> None:
    async def laws(hall: Hall) -> None:
        await hall.arrive(("a", 100), ("b", 100), ("c", 1))
        await hall.change_capacity(200)
        assert hall.entered == ["a", "b"]
        hall.capacity = 201  # nobody calls update: the next arrival must not pass who waits
        await hall.arrive(("d", 1))
        assert hall.entered == ["a", "b", "c"]

    in_hall(laws)


def test_work_of_engines_that_take_no_more_takes_no_room_on_the_others() -> None:
    """One of two engines drains: what it has still counts as in flight, and the other is free."""

    async def laws(hall: Hall) -> None:
        await hall.arrive(("stream", 80))
        hall.away_cost = 80
        await hall.change_capacity(100)
        await hall.arrive(("a", 60), ("b", 40), ("c", 1))
        assert hall.entered == ["stream", "a", "b"]
        assert hall.admission.inflight_cost == 180
        hall.away_cost = 0
        await hall.leave("stream")
        assert hall.entered[3:] == [], "no room came free on the other"
        await hall.leave("b")
        assert hall.entered[3:] == ["c"]

    in_hall(laws, capacity=200)


def test_client_that_leaves_the_queue_makes_way_at_once() -> None:
    async def laws(hall: Hall) -> None:
        await hall.arrive(("a", 60), ("large", 80), ("small", 40))
        await hall.cancel("large")
        assert hall.entered == ["a", "small"]
        assert hall.admission.inflight_cost == 100
        assert hall.admission.queue_depth == 0

    in_hall(laws)


@pytest.mark.parametrize("is_granted_first", [True, False])
def test_client_that_leaves_as_it_is_let_in_gives_its_place_to_the_next(is_granted_first: bool) -> None:
    async def laws(hall: Hall) -> None:
        async with hall.admission.admit(100):
            await hall.arrive(("b", 100), ("c", 100))
            if not is_granted_first:
                hall.tasks["b"].cancel()
        # No turn of the loop has passed since: b has been granted, and does not know.
        assert hall.admission.queue_depth == 1
        hall.tasks["b"].cancel()
        await settle()
        assert hall.entered == ["c"]
        assert hall.admission.inflight_cost == 100

    in_hall(laws)


def test_retry_after_is_the_queue_over_the_rate_at_which_work_is_done() -> None:
    """Ten tokens a second are done, and after an idle hour no fewer."""

    async def laws(hall: Hall) -> None:
        names = map(str, count())

        async def fill() -> None:
            while hall.admission.queue_depth < hall.max_queued:
                await hall.arrive((next(names), 10))

        async def work_one_second() -> None:
            await anyio.sleep(1)
            await hall.leave(next(iter(hall.inside)))

        async def told() -> int:
            await fill()
            name = next(names)
            await hall.arrive((name, 10))
            return int(hall.refused[name].headers()["Retry-After"])

        assert await told() == QUEUE_SECONDS, "nothing is known yet"
        for _ in range(20):
            await fill()
            await work_one_second()
        assert abs(await told() - 15) <= 1
        while hall.inside:
            await work_one_second()
        await anyio.sleep(3600)
        assert abs(await told() - 15) <= 1

    in_hall(laws, max_queued=15)


@pytest.mark.parametrize(("seconds", "cost", "told"), [(0.001, 1, 1), (25, 1000, 120)])
def test_retry_after_stays_within_its_bounds(seconds: float, cost: int, told: int) -> None:
    async def laws(hall: Hall) -> None:
        await hall.arrive(("first", 1000), ("second", 1000))
        await anyio.sleep(seconds)
        await hall.leave("first")
        await hall.arrive(*((f"{n}", cost) for n in range(20)), ("late", 1))
        assert hall.refused["late"].headers() == {"Retry-After": str(told)}
        assert 1 <= hall.refused["late"].retry_after_seconds <= 120  # type: ignore[attr-defined]

    in_hall(laws, capacity=1000, max_queued=20)


STEPS = st.one_of(
    st.tuples(st.just("arrive"), st.integers(1, 15)),
    st.tuples(st.just("leave"), st.integers(0, 9)),
    st.tuples(st.just("cancel"), st.integers(0, 9)),
    st.tuples(st.just("capacity"), st.sampled_from([0, 4, 10, 20])),
    st.tuples(st.just("sleep"), st.sampled_from([1, 10, 31])),
)


def check_sums(hall: Hall) -> None:
    admission = hall.admission
    assert admission.inflight_cost == sum(hall.inside.values())
    waiting = [name for name in hall.arrived if not hall.tasks[name].done() and name not in hall.inside]
    assert admission.queue_depth == len(waiting) <= hall.max_queued


@settings(max_examples=300, deadline=None)
@given(st.lists(STEPS, max_size=40))
def test_laws_hold_in_any_history(steps: list[tuple[str, int]]) -> None:
    async def laws(hall: Hall) -> None:
        names = count()
        for step, value in steps:
            before = set(hall.inside)
            present = [name for name in hall.arrived if not hall.tasks[name].done()]
            if step == "arrive":
                await hall.arrive((f"{next(names)}", value))
            elif step == "leave" and hall.inside:
                await hall.leave(list(hall.inside)[value % len(hall.inside)])
            elif step == "cancel" and present:
                await hall.cancel(present[value % len(present)])
            elif step == "capacity":
                await hall.change_capacity(value)
            elif step == "sleep":
                await anyio.sleep(value)
            check_sums(hall)
            if set(hall.inside) - before:
                within = sum(hall.inside.values()) <= hall.capacity
                assert within or len(hall.inside) == 1, "more than the capacity was let in"
            waiting = [name for name in hall.arrived if not hall.tasks[name].done() and name not in hall.inside]
            if waiting and hall.capacity:
                assert hall.inside, "somebody waits for nobody"
        numbers = [int(name) for name in hall.entered]
        assert numbers == sorted(numbers), "somebody was overtaken"
        assert all(0 <= waited <= QUEUE_SECONDS for waited in hall.waited.values())

    in_hall(laws, capacity=10, max_queued=5)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(STEPS, st.integers(0, 4)), max_size=40))
def test_everything_comes_back_however_the_turns_of_the_loop_fall(steps: list[tuple[tuple[str, int], int]]) -> None:
    """As above without waiting for the dust to settle, so that grants, cancels and deadlines meet in one turn."""

    async def laws(hall: Hall) -> None:
        names = count()
        for (step, value), turns in steps:
            everyone = list(hall.tasks)
            if step == "arrive":
                hall.send(f"{next(names)}", value)
            elif step == "leave" and everyone:
                hall.doors[everyone[-1 - value % len(everyone)]].set()
            elif step == "cancel" and everyone:
                hall.tasks[everyone[-1 - value % len(everyone)]].cancel()
            elif step == "sleep":
                await anyio.sleep(value)
            for _ in range(turns):
                await asyncio.sleep(0)
            inside = sum(hall.inside.values())
            assert inside <= hall.capacity or len(hall.inside) == 1
            assert inside <= hall.admission.inflight_cost
        await settle()
        check_sums(hall)

    in_hall(laws, capacity=10, max_queued=5)
