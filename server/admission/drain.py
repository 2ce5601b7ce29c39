"""Stopping without breaking off: who is in flight, and whether newcomers are still welcome."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from contextlib import contextmanager

from server.errors import OverloadedError


class Drain:
    """One instance a gateway. `begin` is called at the first SIGTERM."""

    def __init__(self) -> None:
        self._num_inflight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_stopping = False

    @property
    def is_stopping(self) -> bool:
        return self._is_stopping

    @property
    def num_inflight(self) -> int:
        return self._num_inflight

    def begin(self) -> None:
        """From now on new work is rejected; what is in flight goes on."""
        self._is_stopping = True

    @contextmanager
    def work(self) -> Generator[None, None, None]:
        """Around a request, from its arrival to the last byte of its answer.

        Raises:
            OverloadedError: the gateway is stopping.
        """
        if self._is_stopping:
            raise OverloadedError("the server is stopping; try again", reason="stopping")
        self._num_inflight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_inflight -= 1
            if self._num_inflight == 0:
                self._idle.set()

    async def wait_idle(self) -> None:
        """Return when nothing is in flight."""
        await self._idle.wait()
