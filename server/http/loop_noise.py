"""One complaint of the event loop that means nothing, kept out of the log."""

from __future__ import annotations

import asyncio
from typing import Any


def quieten(loop: asyncio.AbstractEventLoop) -> None:
    """Say nothing where a unix socket becomes ready in the very moment in which nobody waits for it any more.

    anyio (4.16, `UNIXSocketStream`) then sets the result of a future that has been cancelled. It happens when clients
    leave while the engine answers. REMOVE WHEN: anyio checks whether the future is done.
    """

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        is_late = isinstance(context.get("exception"), asyncio.InvalidStateError)
        if not (is_late and "Future.set_result" in repr(context.get("handle"))):
            loop.default_exception_handler(context)

    loop.set_exception_handler(handle)
