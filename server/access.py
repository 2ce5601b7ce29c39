"""Who may come in: every route but the liveness probe needs a key, when there are keys."""

from __future__ import annotations

from typing import Final

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api_keys import ApiKey, ApiKeys
from server.error_response import error_response
from server.errors import AuthenticationError
from server.recording import record_of

OPEN_ROUTES: Final = frozenset({"/health"})


def key_of(request: Request) -> ApiKey:
    """The key of the request being served."""
    key = request.scope["visiondrop.key"]
    assert isinstance(key, ApiKey)
    return key


class AccessMiddleware:
    """ASGI middleware. A request without a key is answered before any of its body is read."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_ROUTES:
            record = record_of(Request(scope))
            try:
                key = self._keys.authenticate(Headers(scope=scope).get("authorization"))
            except AuthenticationError as error:
                record.mark_failure(error)
                await error_response(error)(scope, receive, send)
                return
            scope["visiondrop.key"] = key
            record.key_name = key.name
        await self._app(scope, receive, send)
