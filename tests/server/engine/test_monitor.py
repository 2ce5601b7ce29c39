"""An engine's state follows from what is seen of it."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine
from wire import Wire, chat, make_pool, running, until

from server.engine import awake_clock
from server.engine.monitor import LOST_FACTOR, EngineState, Signs, state_of
from server.errors import EngineMismatchError
from server.settings import Settings

pytestmark = pytest.mark.anyio

STALL = 0.4
FAST = Settings(engine_probe_seconds=0.05, engine_stall_seconds=STALL)
OVERLOADED = (503, {"error": {"message": "busy", "type": "Service Unavailable", "code": 503}})
NOT_FOUND = (404, {"detail": "Not Found"})


@pytest.mark.parametrize(
    ("signs", "state"),
    [
        (Signs(), EngineState.STARTING),
        (Signs(answers=True), EngineState.STARTING),
        (Signs(answers=True, fits=False), EngineState.MISMATCH),
        (Signs(answers=True, fits=True, was_up=True, progress_at=85.1), EngineState.UP),
        (Signs(answers=True, fits=True, was_up=True, progress_at=85.0), EngineState.STALLED),
        (Signs(answers=True, fits=None, was_up=True, progress_at=99.0), EngineState.DOWN),
        (Signs(answers=False, fits=True, was_up=True, progress_at=99.0), EngineState.DOWN),
        (Signs(answers=False, fits=False, was_up=True, progress_at=0.0), EngineState.DOWN),
        (Signs(answers=True, is_draining=True, fits=None, was_up=True, progress_at=0.0), EngineState.DRAINING),
    ],
)
def test_state_follows_from_the_signs(signs: Signs, state: EngineState) -> None:
    assert state_of(signs, now=100.0, stall_seconds=15.0) is state


async def test_engine_whose_work_stands_still_is_stalled_within_the_bound_and_comes_back(
    engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    pool = make_pool(FAST, Wire(engine))
    caplog.set_level(logging.INFO, logger="visiondrop")
    async with running(pool):
        assert pool.state("0") is EngineState.UP
        engine.is_stalled = True
        assert await until(lambda: pool.state("0") is EngineState.STALLED) < STALL + 0.5
        assert not await pool.is_ready()
        await until(lambda: "stalled" in caplog.text)
        engine.is_stalled = False
        await until(lambda: pool.is_up("0"))
        await asyncio.sleep(2 * STALL)
        assert pool.is_up("0")
    said = [record.getMessage() for record in caplog.records if record.name == "visiondrop"]
    assert said == ["engine 0 is up", "engine 0 is stalled: no sign of progress for 0.4 s", "engine 0 is up"]


async def test_idle_engine_gets_a_canary_now_and_then_and_never_two_at_a_time(engine: FakeEngine) -> None:
    pool = make_pool(FAST, Wire(engine))
    async with running(pool):
        await asyncio.sleep(2 * STALL)
        assert 2 <= engine.num_canaries <= 6
        engine.is_stalled = True
        sent = engine.num_canaries
        await asyncio.sleep(2 * STALL)
        assert engine.num_canaries <= sent + 1


async def test_no_canary_while_answers_flow(engine: FakeEngine) -> None:
    pool = make_pool(Settings(engine_probe_seconds=0.05, engine_stall_seconds=1.8), Wire(engine))
    async with running(pool):
        for _ in range(18):
            await pool.complete(chat())
            await asyncio.sleep(0.05)
    assert engine.num_canaries == 0


@pytest.mark.parametrize("refusal", [None, OVERLOADED])
async def test_moving_counters_are_progress_while_the_canary_waits_or_is_refused(
    engine: FakeEngine, refusal: tuple[int, Any] | None
) -> None:
    engine.is_stalled = engine.steps_while_stalled = True
    engine.canary_refusal = refusal
    pool = make_pool(FAST, Wire(engine))
    async with running(pool):
        for _ in range(20):
            await asyncio.sleep(0.05)
            assert pool.is_up("0")
        engine.steps_while_stalled = False
        await until(lambda: pool.state("0") is EngineState.STALLED)


async def test_counters_are_left_alone_while_canaries_are_answered(engine: FakeEngine) -> None:
    engine.steps_while_stalled = True
    pool = make_pool(FAST, Wire(engine))
    async with running(pool):
        await asyncio.sleep(2 * STALL)
    assert engine.num_steps == engine.num_canaries


async def test_engine_that_refuses_canaries_is_not_watched_closely(
    engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.canary_refusal = NOT_FOUND
    pool = make_pool(FAST, Wire(engine))
    async with running(pool):
        await asyncio.sleep(2 * STALL)
        assert pool.is_up("0")
    assert engine.num_canaries >= 2
    assert caplog.text.count("refuses canaries") == 1


@pytest.mark.parametrize(
    "fault", [httpx.RemoteProtocolError("what?"), httpx.ReadTimeout("slow"), RuntimeError("a defect")]
)
async def test_monitor_survives_whatever_comes_back(
    engine: FakeEngine, fault: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    wire = Wire(engine)
    pool = make_pool(FAST, wire)
    async with running(pool):
        wire.fault = fault
        await until(lambda: pool.state("0") is EngineState.STALLED)
        wire.fault = None
        await until(lambda: pool.is_up("0"))
    assert ("the monitor of engine 0 failed" in caplog.text) == isinstance(fault, RuntimeError)


async def test_pool_starts_even_if_the_first_look_fails(engine: FakeEngine) -> None:
    wire = Wire(engine)
    wire.fault = RuntimeError("a defect")
    pool = make_pool(FAST, wire)
    task = asyncio.create_task(pool.run())
    await asyncio.sleep(0.1)
    wire.fault = None
    await until(lambda: pool.is_up("0"))
    task.cancel()
    await asyncio.wait((task,))
    await pool.aclose()


async def test_unreadable_answers_are_no_progress_and_no_crash(engine: FakeEngine) -> None:
    engine.canary_refusal = (200, b"nonsense")
    pool = make_pool(FAST, Wire(engine))
    async with running(pool):
        await until(lambda: pool.state("0") is EngineState.STALLED)
        assert await pool.metrics("0")


@pytest.mark.parametrize("gone", ["refuses connections", "says that it is dead"])
async def test_engine_that_is_gone_is_down_and_comes_back(engine: FakeEngine, gone: str) -> None:
    wire = Wire(engine)
    pool = make_pool(Settings(engine_probe_seconds=0.05), wire)
    async with running(pool):
        wire.is_cut = gone == "refuses connections"
        engine.is_up = gone != "says that it is dead"
        assert await until(lambda: pool.state("0") is EngineState.DOWN) < 2
        wire.is_cut, engine.is_up = False, True
        await until(lambda: pool.is_up("0"))


async def test_engine_that_was_never_there_is_starting(engine: FakeEngine) -> None:
    wire = Wire(engine)
    wire.is_cut = True
    pool = make_pool(FAST, wire)
    async with running(pool):
        assert pool.state("0") is EngineState.STARTING
        wire.is_cut = False
        await until(lambda: pool.is_up("0"))


async def test_engine_of_another_geometry_is_not_up_beside_one_that_serves(caplog: pytest.LogCaptureFixture) -> None:
    first, other = FakeEngine(), FakeEngine()
    assert other.geometry is not None
    other.geometry = {**other.geometry, "geometry": {**other.geometry["geometry"], "tile_size": 384}}
    wires = [Wire(first), Wire(other)]
    wires[1].is_cut = True
    pool = make_pool(FAST, *wires)
    async with running(pool):
        wires[1].is_cut = False
        await until(lambda: pool.state("1") is EngineState.MISMATCH)
        assert pool.is_up("0")
        assert (await pool.geometry()).tile_size == 336
        # When nobody serves the old model any more, the new one is the pool's.
        wires[0].is_cut = True
        await until(lambda: pool.is_up("1"))
        assert (await pool.geometry()).tile_size == 384
    assert caplog.text.count("engine 1 does not fit: the engine's geometry differs") == 1


async def test_engine_of_another_model_is_not_up_beside_one_that_serves(caplog: pytest.LogCaptureFixture) -> None:
    """Of the same sizes, so that answers alone would show it."""
    first, other = FakeEngine(), FakeEngine()
    other.model = "a finetune"
    wires = [Wire(first), Wire(other)]
    wires[1].is_cut = True
    pool = make_pool(FAST, *wires)
    async with running(pool):
        await until(lambda: pool.is_up("0"))
        wires[1].is_cut = False
        await until(lambda: pool.state("1") is EngineState.MISMATCH)
        wires[1].is_cut = True
        await until(lambda: pool.state("1") is EngineState.DOWN or pool.state("1") is EngineState.STARTING)
        other.model = first.model
        wires[1].is_cut = False
        await until(lambda: pool.is_up("1"))
    said = "engine 1 does not fit: the engine serves a finetune, the other engines fake-llava; if it is the same model"
    assert caplog.text.count(said) == 1


async def test_engine_of_another_rule_is_not_up_and_requests_learn_why(engine: FakeEngine) -> None:
    assert engine.geometry is not None
    engine.geometry = {**engine.geometry, "geometry": {**engine.geometry["geometry"], "rule_version": 99}}
    pool = make_pool(FAST, Wire(engine))
    async with running(pool):
        assert pool.state("0") is EngineState.MISMATCH
        for request in (pool.geometry(), pool.complete(chat()), pool.open_stream(chat(stream=True)), pool.models()):
            with pytest.raises(EngineMismatchError, match="version 99 of the budget rule"):
                await request
    assert not engine.bodies
    assert engine.num_canaries == 0


async def test_engine_that_was_replaced_between_two_probes_is_noticed(
    engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    assert engine.geometry is not None
    pool = make_pool(FAST, Wire(engine))
    async with running(pool):
        await pool.complete(chat(images=("a",)))
        assert pool._engines["0"].num_seen({"a"}) == 1
        engine.model = "another"
        engine.geometry = {**engine.geometry, "boot_id": "2"}
        await until(lambda: pool._engines["0"].num_seen({"a"}) == 0)
        served = pool._engines["0"].monitor.served
        assert served is not None
        assert (served.models, served.geometry.tile_size) == ({"another"}, 336)

        engine.geometry = {**engine.geometry, "geometry": {**engine.geometry["geometry"], "tile_size": 384}}
        await until(lambda: "replaced" in caplog.text.partition("replaced")[2])
        assert (await pool.geometry()).tile_size == 384
        assert pool.is_up("0")

        engine.geometry = None
        await until(lambda: pool.state("0") is EngineState.MISMATCH)
    assert caplog.text.count("engine 0 was replaced between two probes") == 2


async def test_time_in_which_the_gateway_stood_still_does_not_count(engine: FakeEngine) -> None:
    engine.hold_before_answer = True
    pool = make_pool(FAST, Wire(engine))
    async with running(pool):
        answer = asyncio.ensure_future(pool.complete(chat()))
        await engine.asked.wait()
        await asyncio.sleep(0.02)  # the monitor sleeps
        time.sleep(LOST_FACTOR * STALL + 0.2)  # noqa: ASYNC251  # as when the gateway is stopped
        for _ in range(10):
            await asyncio.sleep(0.02)
            assert not answer.done()
        assert pool.is_up("0")
        answer.cancel()
        await asyncio.wait((answer,))


async def test_engine_is_not_stalled_while_the_gateway_is_late(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when thousands of clients leave at once: each step of the event loop takes long, and an answer takes many."""
    monkeypatch.setattr(awake_clock, "_BEAT_SECONDS", 0.005)
    pool = make_pool(FAST, Wire(engine))
    async with running(pool):
        await until(lambda: pool.is_up("0"))
        began = time.monotonic()
        while time.monotonic() - began < 5 * STALL:
            time.sleep(STALL / 5)  # noqa: ASYNC251  # what makes the loop late
            await asyncio.sleep(0)
            assert pool.state("0") is EngineState.UP
        engine.is_stalled = True
        await until(lambda: pool.state("0") is EngineState.STALLED)  # what is on time still counts
