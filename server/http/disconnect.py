"""Work that stops when the client goes away. Starlette watches for that only while it streams."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from starlette.types import Receive

from server.errors import ClientDisconnectedError
from server.tasks import see_exception

Result = TypeVar("Result")


async def until_disconnect(receive: Receive, work: Callable[[], Awaitable[Result]]) -> Result:
    """Do `work` unless the client goes away first. The request's body must have been read.

    Raises:
        ClientDisconnectedError: the client went away; `work` has been cancelled and is over.
    """
    task = asyncio.ensure_future(work())
    task.add_done_callback(see_exception)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnectedError("the client closed the connection")
        return task.result()
    finally:
        for pending in (watcher, task):
            pending.cancel()
        await asyncio.wait((task, watcher))


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
