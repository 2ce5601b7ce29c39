"""Requests that are given up at every point of their way, and what they leave behind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path


async def sockets_left_by(work: Callable[[], Awaitable[object]], *, turns: int = 40, times: int = 3) -> int:
    """How many sockets stay open when `work` is cancelled after none, one, two, ... turns of the event loop.

    Args:
        work: what does not end by itself within so many turns.
    """
    before = _num_sockets()
    for turn in range(turns):
        for _ in range(times):
            task = asyncio.ensure_future(work())
            for _ in range(turn):
                await asyncio.sleep(0)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
    for _ in range(100):  # the other side, which is in this process, closes its own when it sees the end
        if _num_sockets() <= before:
            break
        await asyncio.sleep(0.02)
    return _num_sockets() - before


def _num_sockets() -> int:
    targets = []
    for path in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the listing's own
            targets.append(str(path.readlink()))
    return sum(target.startswith("socket:") for target in targets)
