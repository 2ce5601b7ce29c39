"""What surrounds every request.

BrowserMiddleware      answers browsers that ask whether a page may use the server, if it is set up (browser.py)
RecordingMiddleware    the request's context, its id, its line in log and metrics, its clean-up
AccessMiddleware       who may come in: every route but the liveness probe needs a key, when there are keys
HeadMiddleware         HEAD wherever GET is

RecordingMiddleware also answers for defects: an exception that nobody foresaw becomes error 500, with the traceback in
the server's log.
"""

from __future__ import annotations

import json
import logging
from contextlib import ExitStack
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import paths
from server.admission.keys import ApiKeys
from server.context import context_of
from server.errors import AuthenticationError, InternalError, error_event, error_response
from server.telemetry.metrics import Metrics
from server.telemetry.record import RequestRecord
from server.telemetry.tracing import Tracing

REQUEST_LOG: Final = "visiondrop.requests"
"""Logger of one JSON line for each request that asks for work."""

_OPEN_PATHS: Final = (paths.HEALTH,)

_log = logging.getLogger("visiondrop")
_request_log = logging.getLogger(REQUEST_LOG)


class RecordingMiddleware:
    """ASGI middleware.

    Args:
        metrics: what every request is counted in.
        tracing: what has a span for every request that asks for work.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, tracing: Tracing) -> None:
        self._app = app
        self._metrics = metrics
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = context_of(scope)
        record = context.record
        is_over = False

        async def send_with_id(message: Message) -> None:
            nonlocal is_over
            is_over = message["type"] == "http.response.body" and not message.get("more_body")
            if message["type"] == "http.response.start":
                record.sent_status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = record.request_id
                headers.update(record.rate_headers)
                context.sends_events = headers.get("content-type", "").startswith("text/event-stream")
            await send(message)

        is_work = record.route in paths.WORK
        if is_work:
            self._metrics.inflight.inc()
        try:
            async with context.cleanup:
                if is_work:
                    context.cleanup.enter_context(self._tracing.span(record, Headers(scope=scope)))
                await self._app(scope, receive, send_with_id)
        except Exception:
            _log.exception("request %s failed", record.request_id)
            error = InternalError("the server failed; see its log", code="internal_error")
            record.mark_failure(error)
            if record.sent_status is None:
                await error_response(error)(scope, receive, send_with_id)
            elif context.sends_events and not is_over:
                await send_with_id({"type": "http.response.body", "body": error_event(error), "more_body": False})
        finally:
            if context.refusal is not None:
                record.mark_failure(context.refusal)  # to the app it seemed that the client had left
            self._account_for(record, is_work)

    def _account_for(self, record: RequestRecord, is_work: bool) -> None:
        """Count and log a request that is over. A defect in one of these steps does not keep the others from it."""
        with ExitStack() as steps:
            if is_work:
                # In ASCII: nothing in it steers a terminal.
                steps.callback(lambda: _request_log.info(json.dumps(record.log_fields())))
                steps.callback(self._metrics.inflight.dec)
            record.mark_end()
            self._metrics.observe(record, is_work=is_work)
            if record.is_mismatch:
                _log.error(
                    "request %s: the engine's prompt held %d visual tokens, %d were planned",
                    record.request_id,
                    record.image_tokens,
                    record.num_placeholders,
                )


class AccessMiddleware:
    """ASGI middleware. A request without a key is answered before any of its body is read."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in _OPEN_PATHS:
            context = context_of(scope)
            try:
                context.key = self._keys.authenticate(Headers(scope=scope).get("authorization"))
            except AuthenticationError as error:
                context.record.mark_failure(error)
                await error_response(error)(scope, receive, send)
                return
            context.record.key_name = context.key.name
        await self._app(scope, receive, send)


class HeadMiddleware:
    """ASGI middleware. HEAD is answered as GET is, without the body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_head(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        if scope["type"] == "http" and scope["method"] == "HEAD":
            await self._app({**scope, "method": "GET"}, receive, send_head)
        else:
            await self._app(scope, receive, send)
