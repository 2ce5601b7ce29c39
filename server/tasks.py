"""Tasks that may outlive whoever waits for them."""

from __future__ import annotations

import asyncio
from typing import Any


def see_exception(task: asyncio.Future[Any]) -> None:
    """To be called when `task` is done: what it fails with may have nobody to go to, and asyncio would log it."""
    if not task.cancelled():
        task.exception()
