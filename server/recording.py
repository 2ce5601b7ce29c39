"""The outermost layer: gives every request its record, its id and its line in log and metrics.

It also answers for defects: an exception that nobody foresaw becomes error 500, with the traceback in the server's log.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import InternalError
from server.metrics import CHAT_ROUTE, OTHER_ROUTE, Metrics
from server.record import RequestRecord, choose_request_id

REQUEST_LOG: Final = "visiondrop.requests"
"""Logger of one JSON line a chat request."""

_log = logging.getLogger("visiondrop")
_request_log = logging.getLogger(REQUEST_LOG)


def record_of(request: Request) -> RequestRecord:
    """The record of the request being served."""
    record = request.scope["visiondrop.record"]
    assert isinstance(record, RequestRecord)
    return record


class RecordingMiddleware:
    """ASGI middleware; `routes` are the paths that get a label of their own."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: Collection[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._routes = frozenset(routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        route = scope["path"] if scope["path"] in self._routes else OTHER_ROUTE
        record = RequestRecord(choose_request_id(Headers(scope=scope).get("x-request-id")), route)
        scope["visiondrop.record"] = record

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.sent_status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = record.request_id
            await send(message)

        is_chat = route == CHAT_ROUTE
        if is_chat:
            self._metrics.inflight.inc()
        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            _log.exception("request %s failed", record.request_id)
            error = InternalError("the server failed; its log tells more", code="internal_error")
            record.mark_failure(error.status, error.message)
            if record.sent_status is None:
                await JSONResponse(error.body(), error.status)(scope, receive, send_with_id)
        finally:
            record.mark_end()
            self._metrics.observe(record)
            if record.is_mismatch:
                _log.error(
                    "request %s: the engine's prompt held %d visual tokens, %d were planned",
                    record.request_id,
                    record.image_tokens,
                    record.num_placeholders,
                )
            if is_chat:
                self._metrics.inflight.dec()
                _request_log.info(json.dumps(record.log_fields(), ensure_ascii=False))
