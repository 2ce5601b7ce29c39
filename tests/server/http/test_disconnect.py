"""Work that stops when the client goes away."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from server.errors import ClientDisconnectedError
from server.http.disconnect import until_disconnect

pytestmark = pytest.mark.anyio


async def gone() -> dict[str, Any]:
    return {"type": "http.disconnect"}


async def patient() -> dict[str, Any]:
    await asyncio.Event().wait()
    raise AssertionError


async def test_result_and_errors_of_the_work_come_through() -> None:
    async def work() -> int:
        await asyncio.sleep(0)
        return 3

    async def fail() -> int:
        raise KeyError("a")

    assert await until_disconnect(patient, work) == 3
    with pytest.raises(KeyError):
        await until_disconnect(patient, fail)


async def test_work_is_over_when_the_disconnect_is_told() -> None:
    steps: list[str] = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            steps.append("cleaned up")

    with pytest.raises(ClientDisconnectedError):
        await until_disconnect(gone, work)
    assert steps == ["cleaned up"]


async def test_work_that_fails_while_it_is_cancelled_is_not_reported_as_forgotten() -> None:
    complaints: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context["message"]))

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise KeyError("a")

    with pytest.raises(ClientDisconnectedError):
        await until_disconnect(gone, work)
    gc.collect()
    assert complaints == []
