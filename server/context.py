"""What one request carries through the gateway, passed from step to step as an argument."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Annotated, Final, TypeAlias

from fastapi import Depends, Request
from starlette.datastructures import Headers
from starlette.types import Scope

from server import paths
from server.admission.keys import ApiKey
from server.admission.memory import MemoryLease
from server.admission.party import Party, party_of
from server.errors import GatewayError
from server.telemetry.record import RequestRecord, choose_request_id

_KEY: Final = "visiondrop.context"
"""The one key of ours in an ASGI scope."""


@dataclass(slots=True, repr=False)
class RequestContext:
    """One request. A field without a default is set by the step that its comment names."""

    record: RequestRecord
    address: str
    """The client's."""
    key: ApiKey = field(init=False)  # the access check
    lease: MemoryLease = field(init=False)  # the intake
    cleanup: AsyncExitStack = field(default_factory=AsyncExitStack)
    """What the request holds until its answer is over, however it ends: released in reverse order."""
    sends_events: bool = False
    """Whether an event stream has been started."""
    refusal: GatewayError | None = None
    """The error with which the connection itself ended the request: late, broken, cut off."""

    @property
    def request_id(self) -> str:
        return self.record.request_id

    @property
    def party(self) -> Party:
        """Who shares the server with others."""
        return party_of(self.key, self.address)


def context_of(scope: Scope) -> RequestContext:
    """The context of a request, made when it is first asked for.

    That is by the outermost middleware or, if the connection refuses the request before the app has run, by that.
    """
    context = scope.get(_KEY)
    if context is None:
        route = scope["path"] if scope["path"] in paths.ALL else paths.OTHER
        request_id = choose_request_id(Headers(scope=scope).get("x-request-id"))
        address = (scope.get("client") or ("",))[0]
        context = scope[_KEY] = RequestContext(RequestRecord(request_id, route), address)
    assert isinstance(context, RequestContext)
    return context


async def _context_of_request(request: Request) -> RequestContext:
    return context_of(request.scope)


Context: TypeAlias = Annotated[RequestContext, Depends(_context_of_request)]
"""The argument of a route's function that FastAPI fills in."""
