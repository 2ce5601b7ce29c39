"""From a planned request to its answer: a place in the queue, an engine, and what comes back."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any, TypeAlias

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.admission import Admission
from server.cost import request_cost
from server.engine_client import EngineCall, EventSource
from server.engine_pool import EnginePool
from server.errors import EngineUnreachableError, GatewayError
from server.images import CheckedImage
from server.intake import lease_of
from server.record import RequestRecord
from server.recording import record_of, resources_of
from server.relay import EventStream

Relay: TypeAlias = Callable[[EventSource, RequestRecord], AsyncGenerator[bytes, None]]
"""The engine's events to the client's."""

Usage: TypeAlias = Callable[[RequestRecord, Mapping[str, Any]], dict[str, Any]]
"""The engine's `usage` to the client's."""


class Dispatcher:
    """Sends requests to the engines, as many at a time as they take."""

    def __init__(self, engines: EnginePool, admission: Admission) -> None:
        self._engines = engines
        self._admission = admission

    async def reply(
        self,
        request: Request,
        body: bytes,
        text_tokens: int,
        images: Sequence[CheckedImage] = (),
        *,
        relay: Relay | None,
        usage: Usage = RequestRecord.usage,
    ) -> Response:
        """The engine's answer, whole or as a stream, which begins once the engine has accepted the request.

        Args:
            body: what the engine gets, on the path that the client used.
            text_tokens: about how many tokens its text has.
            images: its pictures; the record has their schedules.
            relay: for a stream; None for a whole answer.
            usage: for a whole answer.

        Raises:
            GatewayError: there is no place for the request, or the engine refuses it or fails.
        """
        record, call = record_of(request), await self._enter(request, body, text_tokens, images)
        if relay is None:
            answer = await self._engines.complete(call)
            record.engine_answered = True
            answer["usage"] = usage(record, answer.get("usage") or {})
            return JSONResponse(answer, headers=record.headers())
        source = await self._engines.open_stream(call)
        resources_of(request).push_async_callback(source.aclose)
        record.engine_answered = True
        lease_of(request).release()  # the body has gone to the engine, and a stream may take minutes
        return EventStream(relay(source, record), source, record, headers=record.headers())

    async def _enter(
        self, request: Request, body: bytes, text_tokens: int, images: Sequence[CheckedImage]
    ) -> EngineCall:
        """Wait for a place, which the request holds until its answer is over."""
        record = record_of(request)
        cost = request_cost(text_tokens, record.schedules)
        if not await self._engines.is_ready():
            raise self._engines.refusal()
        began, has_waited = time.monotonic(), True
        try:
            await resources_of(request).enter_async_context(self._admission.admit(cost))
        except GatewayError as error:
            has_waited = error.reason == "queue_timeout"  # all others are turned away at once
            raise
        finally:
            if has_waited:
                record.queue_seconds = time.monotonic() - began  # in vain, perhaps
        if record.geometry is not None and record.geometry != await self._engines.geometry():
            raise EngineUnreachableError("the engine was replaced while the request waited; try again")
        # Megabytes to hash, and of use only where there is a choice.
        pictures = tuple(hash(image.url) for image in images) if len(self._engines.names) > 1 else ()
        return EngineCall(record.route, body, record.request_id, record.trace_headers, cost, pictures)
