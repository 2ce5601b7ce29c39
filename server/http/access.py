"""Who may come in: every route but the liveness probe needs a key, when there are keys."""

from __future__ import annotations

from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.admission.keys import ApiKeys
from server.context import context_of
from server.errors import AuthenticationError, error_response

OPEN_ROUTES: Final = frozenset({"/health"})


class AccessMiddleware:
    """ASGI middleware. A request without a key is answered before any of its body is read."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_ROUTES:
            context = context_of(scope)
            try:
                context.key = self._keys.authenticate(Headers(scope=scope).get("authorization"))
            except AuthenticationError as error:
                context.record.mark_failure(error)
                await error_response(error)(scope, receive, send)
                return
            context.record.key_name = context.key.name
        await self._app(scope, receive, send)
