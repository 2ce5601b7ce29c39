"""Several engines as one: where requests go, and what one engine's end means for the others'."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from fake_engine import WORDS, FakeEngine
from gateway_process import HERE as SUPPORT
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from wire import Wire, chat, make_pool, running, until

from server.admission.context_length import ContextLength
from server.engine.client import EventSource, HttpEngineClient
from server.engine.monitor import LOST_FACTOR, EngineState
from server.engine.pool import AFFINITY_SLACK, EnginePool
from server.errors import EngineFailedError, EngineUnreachableError, GatewayError, OverloadedError, RelayedError
from server.settings import Settings

pytestmark = pytest.mark.anyio

OVERLOADED = (503, {"error": {"message": "busy", "type": "Service Unavailable", "code": 503}})
FAST = Settings(engine_probe_seconds=0.05, engine_stall_seconds=0.4)
SLACK = int(AFFINITY_SLACK * Settings().max_inflight_tokens)


def costs(pool: EnginePool) -> list[int]:
    return [pool.outstanding_cost(name) for name in pool.names]


async def read(source: EventSource) -> list[bytes]:
    """All events; the source is closed."""
    try:
        return [data async for data in source]
    finally:
        await source.aclose()


def holding(number: int) -> list[FakeEngine]:
    """Engines whose streams stay open after the first event."""
    engines = [FakeEngine() for _ in range(number)]
    for engine in engines:
        engine.hold = True
    return engines


@hypothesis_settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.lists(st.integers(1, 5000), max_size=12), st.randoms(use_true_random=False))
def test_outstanding_costs_stay_within_one_call_of_each_other(number: int, asked: list[int], random: Any) -> None:
    async def run() -> None:
        pool = make_pool(Settings(), *map(Wire, holding(number)))
        async with running(pool):
            sources = []
            for cost in asked:
                sources.append(await pool.open_stream(chat(stream=True, cost=cost)))
                assert max(costs(pool)) - min(costs(pool)) <= max(asked)
            assert sum(costs(pool)) == sum(asked)
            random.shuffle(sources)
            for source in sources:
                await source.aclose()
            assert costs(pool) == [0] * number

    asyncio.run(run())


async def test_equal_engines_take_turns() -> None:
    engines = [FakeEngine() for _ in range(3)]
    pool = make_pool(Settings(), *map(Wire, engines))
    async with running(pool):
        for _ in range(6):
            await pool.complete(chat(cost=10))
    assert [len(engine.bodies) for engine in engines] == [2, 2, 2]


async def test_same_image_prefers_the_engine_that_has_seen_it_up_to_the_slack() -> None:
    pool = make_pool(Settings(), *map(Wire, holding(3)))
    async with running(pool):
        call = chat(stream=True, cost=SLACK // 2, images=("cat",))
        sources = [await pool.open_stream(call) for _ in range(3)]
        assert sorted(costs(pool)) == [0, 0, 3 * (SLACK // 2)]
        # Half a slack too far ahead: the fourth goes elsewhere, and that engine knows the image, too.
        sources += [await pool.open_stream(call) for _ in range(3)]
        assert sorted(costs(pool)) == [0, 3 * (SLACK // 2), 3 * (SLACK // 2)]
        for source in sources:
            await source.aclose()


async def test_image_that_everybody_sends_makes_no_hot_spot() -> None:
    pool = make_pool(Settings(), *map(Wire, holding(4)))
    async with running(pool):
        cost = SLACK // 4
        sources = [await pool.open_stream(chat(stream=True, cost=cost, images=("meme",))) for _ in range(60)]
        assert max(costs(pool)) - min(costs(pool)) <= SLACK + cost
        for source in sources:
            await source.aclose()


async def test_engine_that_has_seen_more_of_the_images_is_preferred() -> None:
    engines = [FakeEngine() for _ in range(2)]
    pool = make_pool(Settings(), *map(Wire, engines))
    async with running(pool):
        await pool.complete(chat(images=("cat",)))
        await pool.complete(chat(images=("dog", "cow")))
        await pool.complete(chat(images=("dog", "cow", "cat")))
    assert [len(engine.bodies) for engine in engines] == [1, 2]


async def test_only_so_many_images_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine.pool._NUM_REMEMBERED_IMAGES", 2)
    engines = [FakeEngine() for _ in range(2)]
    pool = make_pool(Settings(), *map(Wire, engines))
    async with running(pool):
        for images in (("cat",), ("dog",), ("cat", "cow", "hen"), ("cat", "cow", "hen"), ("cat",)):
            await pool.complete(chat(images=images))
    # cat -> 0, dog -> 1, cat.. -> 0 twice; 0 has forgotten the cat by now, so it is 1's turn.
    assert [len(engine.bodies) for engine in engines] == [3, 2]


async def test_engine_that_was_down_has_forgotten_its_images() -> None:
    engines = [FakeEngine() for _ in range(2)]
    wires = [Wire(engine) for engine in engines]
    pool = make_pool(FAST, *wires)
    async with running(pool):
        await pool.complete(chat(images=("cat",)))
        wires[0].is_cut = True
        await until(lambda: not pool.is_up("0"))
        wires[0].is_cut = False
        await until(lambda: pool.is_up("0"))
        await pool.complete(chat(images=("cat",)))
    assert [len(engine.bodies) for engine in engines] == [1, 1]


async def test_dying_engine_loses_only_its_own_streams() -> None:
    engines = [FakeEngine() for _ in range(2)]
    engines[0].break_after = 1
    pool = make_pool(Settings(), *map(Wire, engines))
    async with running(pool):
        sources = [await pool.open_stream(chat(stream=True, cost=1)) for _ in range(4)]
        results = await asyncio.gather(*map(read, sources), return_exceptions=True)
    broken = [result for result in results if isinstance(result, EngineFailedError)]
    whole = [result for result in results if isinstance(result, list)]
    assert len(broken) == len(whole) == 2
    assert all(len(events) == len(WORDS) + 1 for events in whole)


async def test_refused_connection_is_tried_elsewhere_and_told_at_once() -> None:
    engines = [FakeEngine() for _ in range(2)]
    wires = [Wire(engine) for engine in engines]
    pool = make_pool(Settings(), *wires)
    told: list[int] = []
    async with running(pool):
        pool.on_capacity_change = lambda: told.append(pool.capacity)
        wires[0].is_cut = True
        await pool.complete(chat())
        assert pool.state("0") is EngineState.DOWN
        assert told == [Settings().max_inflight_tokens]
        assert len(await read(await pool.open_stream(chat(stream=True)))) == len(WORDS) + 1
        assert len(engines[1].bodies) == 2
        wires[1].is_cut = True
        for request in (pool.complete(chat()), pool.open_stream(chat(stream=True)), pool.models(), pool.geometry()):
            with pytest.raises(EngineUnreachableError, match="no engine is ready") as error:
                await request
            assert error.value.code == "engine_unreachable"
        assert told == [Settings().max_inflight_tokens, 0]
        assert costs(pool) == [0, 0]


async def test_capacity_is_told_when_an_engine_stalls_and_when_it_comes_back() -> None:
    engines = [FakeEngine() for _ in range(2)]
    pool = make_pool(FAST, *map(Wire, engines))
    told: list[int] = []
    async with running(pool):
        pool.on_capacity_change = lambda: told.append(pool.capacity // FAST.max_inflight_tokens)
        engines[0].is_stalled = True
        await until(lambda: told == [1])
        engines[0].is_stalled = False
        await until(lambda: told == [1, 2])


async def test_overloaded_engine_is_passed_over_and_503_is_not_502() -> None:
    engines = [FakeEngine() for _ in range(2)]
    engines[0].refusal = OVERLOADED
    pool = make_pool(Settings(), *map(Wire, engines))
    async with running(pool):
        await pool.complete(chat())
        assert [len(engine.bodies) for engine in engines] == [1, 1]
        engines[1].refusal = OVERLOADED
        for request in (pool.complete(chat(cost=5)), pool.open_stream(chat(stream=True, cost=5))):
            with pytest.raises(OverloadedError) as error:
                await request
            assert (error.value.status, error.value.reason, error.value.code) == (503, *["engine_overloaded"] * 2)
            assert 1 <= int(error.value.headers()["Retry-After"]) <= 120
        assert costs(pool) == [0, 0]
        assert pool.capacity == 2 * Settings().max_inflight_tokens


async def test_engine_that_is_being_stopped_is_passed_over_and_asked_no_more() -> None:
    engines = [FakeEngine() for _ in range(2)]
    pool = make_pool(Settings(engine_probe_seconds=60), *map(Wire, engines))
    told: list[int] = []
    async with running(pool):
        pool.on_capacity_change = lambda: told.append(pool.capacity // Settings().max_inflight_tokens)
        await asyncio.sleep(0.1)  # the first probes
        engines[0].is_draining = True
        for _ in range(4):
            await pool.complete(chat())
            await read(await pool.open_stream(chat(stream=True)))
        assert engines[0].num_refused == 1, "its refusal is enough, without a probe"
        assert pool.state("0") is EngineState.DRAINING
        assert told == [1]
        assert len(engines[1].bodies) == 8
        engines[1].is_draining = True
        with pytest.raises(EngineUnreachableError, match="no engine is ready"):
            await pool.complete(chat())
        assert costs(pool) == [0, 0]


async def test_what_a_draining_engine_finishes_is_away() -> None:
    engines = [FakeEngine() for _ in range(2)]
    pool = make_pool(Settings(engine_probe_seconds=60), *map(Wire, engines))
    async with running(pool):
        await asyncio.sleep(0.1)  # the first probes
        engines[0].is_stalled = engines[1].is_stalled = True
        answers = [asyncio.ensure_future(pool.complete(chat(cost=cost))) for cost in (70, 30)]
        await until(lambda: all(engine.bodies for engine in engines))
        assert pool.away_cost == 0
        engines[0].is_draining = True
        await pool.check()
        assert pool.away_cost == 70
        engines[0].is_stalled = engines[1].is_stalled = False
        await asyncio.gather(*answers)
        assert pool.away_cost == 0


async def test_engine_that_is_being_stopped_ends_its_answers_however_long_they_take() -> None:
    """It refuses canaries, so its counters alone show that it makes progress."""
    engines = [FakeEngine() for _ in range(2)]
    pool = make_pool(FAST, *map(Wire, engines))
    async with running(pool):
        engines[0].is_stalled = engines[1].is_stalled = True
        answers = [asyncio.ensure_future(pool.complete(chat(cost=1))) for _ in range(2)]
        await until(lambda: all(engine.bodies for engine in engines))
        for engine in engines:
            engine.is_draining = True
        engines[0].steps_while_stalled = True
        await until(lambda: pool.state("0") is EngineState.DRAINING)
        bound = LOST_FACTOR * FAST.engine_stall_seconds
        await asyncio.sleep(1.5 * bound)
        assert not answers[0].done()
        assert isinstance(answers[1].exception(), EngineFailedError), "one that hangs is given up, draining or not"
        engines[0].is_stalled = False
        assert (await answers[0])["choices"]


@pytest.mark.parametrize("was_seen_down", [True, False])
async def test_engine_that_comes_back_after_a_drain_gets_work_again(was_seen_down: bool) -> None:
    engine = FakeEngine()
    wire = Wire(engine)
    pool = make_pool(FAST, wire)
    async with running(pool):
        engine.is_draining = True
        await until(lambda: pool.state("0") is EngineState.DRAINING)
        if was_seen_down:
            wire.is_cut = True
            await until(lambda: pool.state("0") is EngineState.DOWN)
        wire.is_cut = engine.is_draining = False
        await until(lambda: pool.is_up("0"))
        await pool.complete(chat())


async def test_refusals_and_failures_are_not_tried_twice() -> None:
    engines = [FakeEngine() for _ in range(2)]
    pool = make_pool(Settings(), *map(Wire, engines))
    async with running(pool):
        for status, kind in ((400, RelayedError), (422, RelayedError), (500, EngineFailedError)):
            for engine in engines:
                engine.calls.clear()
                engine.refusal = (status, {"error": {"message": "no"}})
            with pytest.raises(kind):
                await pool.complete(chat())
            assert sum(len(engine.bodies) for engine in engines) == 1


async def complete(pool: EnginePool, engine: FakeEngine) -> None:
    await pool.complete(chat(cost=7))


async def refused(pool: EnginePool, engine: FakeEngine) -> None:
    engine.refusal = (400, {"error": {"message": "no"}})
    with pytest.raises(RelayedError):
        await pool.complete(chat(cost=7))
    with pytest.raises(RelayedError):
        await pool.open_stream(chat(stream=True, cost=7))


async def cancelled(pool: EnginePool, engine: FakeEngine) -> None:
    engine.hold_before_answer = True
    for request in (pool.complete(chat(cost=7)), pool.open_stream(chat(stream=True, cost=7))):
        engine.asked.clear()
        engine.closed.clear()
        task = asyncio.ensure_future(request)
        await engine.asked.wait()
        assert pool.outstanding_cost("0") == 7
        task.cancel()
        await asyncio.wait((task,))
        assert task.cancelled()
        assert engine.closed.is_set()


async def closed_unread(pool: EnginePool, engine: FakeEngine) -> None:
    engine.hold = True
    source = await pool.open_stream(chat(stream=True, cost=7))
    assert pool.outstanding_cost("0") == 7
    await source.aclose()
    await source.aclose()


async def closed_early(pool: EnginePool, engine: FakeEngine) -> None:
    engine.hold = True
    source = await pool.open_stream(chat(stream=True, cost=7))
    async for _ in source:
        break
    assert pool.outstanding_cost("0") == 7
    await source.aclose()


async def read_to_the_end(pool: EnginePool, engine: FakeEngine) -> None:
    source = await pool.open_stream(chat(stream=True, cost=7))
    assert len([data async for data in source]) == len(WORDS) + 1
    assert pool.outstanding_cost("0") == 0
    await source.aclose()


async def broken_off(pool: EnginePool, engine: FakeEngine) -> None:
    engine.break_after = 1
    with pytest.raises(EngineFailedError):
        await read(await pool.open_stream(chat(stream=True, cost=7)))


@pytest.mark.parametrize(
    "way", [complete, refused, cancelled, closed_unread, closed_early, read_to_the_end, broken_off]
)
async def test_no_cost_is_left_whatever_way_a_request_ends(
    engine: FakeEngine, way: Callable[[EnginePool, FakeEngine], Awaitable[None]]
) -> None:
    pool = make_pool(Settings(), Wire(engine))
    async with running(pool):
        await way(pool, engine)
        assert costs(pool) == [0]
        assert pool._engines["0"].num_requests == 0


async def test_stalled_engine_gives_up_what_waits_for_it_and_the_other_goes_on() -> None:
    engines = [FakeEngine() for _ in range(2)]
    engines[0].is_stalled = engines[1].hold = True
    pool = make_pool(FAST, *map(Wire, engines))
    async with running(pool):
        silent = asyncio.ensure_future(read(await pool.open_stream(chat(stream=True, cost=2))))
        slow = asyncio.ensure_future(read(await pool.open_stream(chat(stream=True, cost=3))))
        pending = asyncio.ensure_future(pool.complete(chat(cost=1)))
        await until(lambda: not pool.is_up("0"))
        assert costs(pool) == [3, 3]
        assert not silent.done()
        assert not pending.done()
        await pool.complete(chat())
        for waiting in (silent, pending):
            with pytest.raises(EngineFailedError, match="stopped answering") as error:
                await asyncio.wait_for(waiting, timeout=10)
            assert error.value.code == "engine_failed"
        assert engines[0].closed.is_set()
        # As silent as the first, but its engine answers canaries.
        assert not slow.done()
        assert costs(pool) == [0, 3]
        slow.cancel()
        await asyncio.wait((slow,))
        assert costs(pool) == [0, 0]


async def test_slow_step_costs_no_answer(engine: FakeEngine) -> None:
    pool = make_pool(FAST, Wire(engine))
    async with running(pool):
        engine.is_stalled = True
        pending = asyncio.ensure_future(pool.complete(chat()))
        await until(lambda: not pool.is_up("0"))
        await asyncio.sleep(FAST.engine_stall_seconds)
        engine.is_stalled = False
        assert (await pending)["choices"]
        assert pool.is_up("0")


async def test_comments_that_keep_a_stream_alive_are_no_progress(engine: FakeEngine) -> None:
    async def talkative(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["path"] == "/v1/completions":
            await asyncio.Event().wait()
        if scope["path"] != "/v1/chat/completions":
            await engine(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            await send({"type": "http.response.body", "body": b": keep-alive\n\n", "more_body": True})
            await asyncio.sleep(0.02)

    def impatient(scope: dict[str, Any], receive: Any, send: Any) -> Awaitable[None]:
        return _until_gone(talkative(scope, receive, send), receive if scope["method"] == "POST" else None)

    pool = make_pool(FAST, Wire(impatient))
    async with running(pool):
        reading = asyncio.ensure_future(read(await pool.open_stream(chat(stream=True))))
        await until(lambda: pool.state("0") is EngineState.STALLED)
        reading.cancel()
        await asyncio.wait((reading,))


async def _until_gone(work: Any, receive: Any) -> None:
    task = asyncio.ensure_future(work)
    if receive is not None:
        while (await receive())["type"] != "http.disconnect":
            pass
        task.cancel()
    await asyncio.wait((task,))


async def test_unwatched_pool_looks_for_every_request(engine: FakeEngine) -> None:
    pool = make_pool(Settings(), Wire(engine))
    assert await pool.is_ready()
    assert await pool.complete(chat())
    assert await pool.models()
    engine.is_up = False
    assert not await pool.is_ready()
    await pool.aclose()


@contextmanager
def process(folder: Path, mode: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    path = folder / f"{mode}.sock"
    script = SUPPORT / "engine_process.py"
    with subprocess.Popen([sys.executable, str(script), mode, "--uds", str(path)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        grandchild = int(child.stdout.readline().split()[1])
        try:
            yield child, f"unix:{path}"
        finally:
            for pid in (grandchild, child.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            child.wait()


async def test_stopped_and_killed_processes_lose_only_their_own(tmp_path: Path) -> None:
    settings = Settings(engine_probe_seconds=0.1, engine_stall_seconds=0.75)
    with process(tmp_path, "slow") as (one, one_url), process(tmp_path, "steady") as (_, other_url):
        pool = EnginePool({"0": HttpEngineClient.at(one_url), "1": HttpEngineClient.at(other_url)}, settings)
        async with running(pool):
            await until(lambda: pool.is_up("0") and pool.is_up("1"))
            source = await pool.open_stream(chat(stream=True, cost=1, images=("cat",)))
            events = aiter(source)
            await anext(events)

            one.send_signal(signal.SIGSTOP)
            assert await until(lambda: not pool.is_up("0")) < settings.engine_stall_seconds + 0.5
            assert pool.state("0") is EngineState.STALLED
            for _ in range(3):
                await pool.complete(chat())
            with pytest.raises(EngineFailedError, match="stopped answering"):
                await asyncio.wait_for(anext(events), LOST_FACTOR * settings.engine_stall_seconds + 2)
            await source.aclose()

            one.send_signal(signal.SIGCONT)
            await until(lambda: pool.is_up("0"))
            source = await pool.open_stream(chat(stream=True, images=("cat",)))
            events = aiter(source)
            await anext(events)
            one.kill()
            with pytest.raises(GatewayError, match="broke off"):
                await asyncio.wait_for(anext(events), 2)
            await source.aclose()
            await until(lambda: pool.state("0") is EngineState.DOWN)
            assert await pool.complete(chat())
            assert costs(pool) == [0, 0]


async def test_limits_are_those_of_the_engines_that_are_up_and_learned_anew_from_one_that_comes_back() -> None:
    """The longest context counts, since a request might go there; answers that run at a time are added up."""
    engines = [FakeEngine() for _ in range(2)]
    wires = [Wire(engine) for engine in engines]
    pool = make_pool(Settings(), *wires)
    assert (await pool.context_length(), pool.max_sequences) == (None, math.inf), "engines of an older release"

    def tell(engine: FakeEngine, max_model_len: int, max_num_seqs: int) -> None:
        assert engine.geometry is not None
        engine.geometry["limits"] = {
            "max_model_len": max_model_len,
            "max_chars_per_token": None,
            "max_num_seqs": max_num_seqs,
        }

    async def come_back() -> None:
        for is_cut in (True, False):
            for wire in wires:
                wire.is_cut = is_cut
            await pool.check()

    tell(engines[0], 4096, 8)
    tell(engines[1], 2048, 4)
    await come_back()
    assert (await pool.context_length(), pool.max_sequences) == (ContextLength(4096), 8 + 1 + 4 + 1)
    tell(engines[0], 1024, 16)
    await come_back()
    assert (await pool.context_length(), pool.max_sequences) == (ContextLength(2048), 16 + 2 + 4 + 1)
    wires[1].is_cut = True
    await pool.check()
    assert (await pool.context_length(), pool.max_sequences) == (ContextLength(1024), 16 + 2)
