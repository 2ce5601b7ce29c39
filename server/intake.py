"""What every request that asks for work goes through first: is there a place for it, a rate, and a body that fits?"""

from __future__ import annotations

from starlette.requests import Request

from server.access import key_of
from server.body import read_json_body
from server.drain import Drain
from server.memory_budget import MemoryBudget, MemoryLease
from server.rate_limits import RateLimits
from server.recording import record_of, resources_of
from server.settings import Settings


class Intake:
    """What it takes for a request is given back when the request is over (recording.py)."""

    def __init__(self, settings: Settings, drain: Drain, rates: RateLimits) -> None:
        self._settings = settings
        self._drain = drain
        self._rates = rates
        self._memory = MemoryBudget(settings.max_buffered_bytes)

    async def read(self, request: Request) -> bytes:
        """The request's body.

        Raises:
            GatewayError: the gateway is stopping or full, the key has used up its rate, or the body does not fit.
        """
        resources = resources_of(request)
        resources.enter_context(self._drain.work())
        key, record = key_of(request), record_of(request)
        try:
            self._rates.take_request(key)
        finally:
            record.rate_headers = self._rates.headers(key)
        lease = resources.enter_context(self._memory.lease())
        request.scope["visiondrop.lease"] = lease
        return await read_json_body(request, self._settings, lease)


def lease_of(request: Request) -> MemoryLease:
    """What the request holds of the memory for bodies and pictures."""
    lease = request.scope["visiondrop.lease"]
    assert isinstance(lease, MemoryLease)
    return lease
