"""Pages of other origins: what a browser asks before it lets one use this server (CORS, fetch.spec.whatwg.org)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from server.errors import InvalidRequestError, error_response

_METHODS: Final = ("GET", "HEAD", "POST")


class BrowserMiddleware(CORSMiddleware):
    """ASGI middleware around all others: a browser sends no key when it asks, and must be able to read every error
    of the app. Those of the connection itself (connection.py) do not come by here.

    Keys are in a header that the page sets, never in cookies, so no credentials are allowed.

    Args:
        origins: those whose pages may use the server; "*" for all.
        exposed_headers: of answers, those that a page may read.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str], exposed_headers: Sequence[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=_METHODS,
            allow_headers=("*",),  # clients add headers of their own to what OpenAI's API knows
            allow_private_network=True,  # a server on the page's own machine or network
            expose_headers=exposed_headers,
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        origin, method = request_headers["origin"], request_headers["access-control-request-method"]
        if not self.is_allowed_origin(origin):
            sentence = f"pages of {origin} may not use this server; VISIONDROP_ALLOWED_ORIGINS lists those that may"
            error = InvalidRequestError(sentence, code="origin_not_allowed")
        else:  # any header is allowed
            sentence = f"pages may not send {method} to this server, but {', '.join(_METHODS)}"
            error = InvalidRequestError(sentence, code="method_not_allowed")
        refusal = error_response(error)
        refusal.headers["Vary"] = "Origin"
        return refusal
