"""Which complaints of the event loop are heard."""

from __future__ import annotations

import asyncio

import pytest

from server.http.server import silence_late_results


def test_only_the_late_result_is_kept_quiet(caplog: pytest.LogCaptureFixture) -> None:
    def defect() -> None:
        raise asyncio.InvalidStateError("a defect")

    async def run() -> None:
        loop = asyncio.get_running_loop()
        silence_late_results(loop)
        for callback in (loop.create_future().set_result, loop.create_future().set_result):
            callback.__self__.cancel()  # type: ignore[attr-defined]
            loop.call_soon(callback, None)
        loop.call_soon(defect)
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    asyncio.run(run())
    assert [str(record.exc_info[1]) for record in caplog.records if record.exc_info] == ["a defect"]
