"""Places for work on images, shared fairly among parties: the queue of requests (admission/queue.py) with other room.

What waits is bounded by time, and its number by the requests that connections and memory leave room for.
"""

from __future__ import annotations

import math
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Final

from server.admission.load import Load
from server.admission.party import Party
from server.admission.queue import Admission
from server.admission.room import FixedRoom
from server.errors import OverloadedError
from server.settings import Settings

_FRACTION: Final = 0.9
"""Of a place more: so the eighth that a party leaves to others is rounded down, and of six places it may have all."""


class ImagePlaces:
    """`num_places` of them.

    Args:
        activity: what is done there, for the error's sentence.
    """

    def __init__(self, settings: Settings, num_places: int, activity: str) -> None:
        # Places are the answers of a batch; cost is not bounded.
        room = FixedRoom(sys.maxsize, num_places + _FRACTION)
        self._admission = Admission(settings, room, max_queued=math.inf)
        self._activity = activity

    @asynccontextmanager
    async def hold(self, party: Party, cost: int = 1) -> AsyncIterator[None]:
        """Wait for a place, and hold it within the context.

        Args:
            cost: what it counts for where parties are compared.

        Raises:
            OverloadedError: there was none for too long.
        """
        # That limit is on what engines work on.
        party = replace(party, max_parallel_requests=None)
        async with AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(self._admission.admit(Load(cost), party))
            except OverloadedError as error:
                raise OverloadedError(
                    f"the server is {self._activity} too many images; try again later",
                    reason="queue_timeout",
                    retry_after_seconds=error.retry_after_seconds,
                ) from None
            yield
