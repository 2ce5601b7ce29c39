"""From a planned request to its answer: a place in the queue, an engine, and what comes back."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.responses import JSONResponse, Response

from server.admission.load import Load
from server.admission.queue import WAITED_REASONS, Admission
from server.context import RequestContext
from server.engine.client import EngineCall, EventSource
from server.engine.pool import EnginePool
from server.errors import EngineUnreachableError, GatewayError
from server.http.event_stream import EventStream
from server.telemetry.record import RequestRecord


class Relay(Protocol):
    """The engine's events to the client's."""

    def __call__(
        self, source: EventSource, record: RequestRecord, *, include_usage: bool
    ) -> AsyncGenerator[bytes, None]: ...


@dataclass(frozen=True, slots=True)
class AnswerShape:
    """How a route's answers differ from another's: their events, and their `usage` (made of the engine's)."""

    relay: Relay
    usage: Callable[[RequestRecord, Any], dict[str, Any]]


class Dispatcher:
    """Sends requests to the engines, as many at a time as they take."""

    def __init__(self, engines: EnginePool, admission: Admission) -> None:
        self._engines = engines
        self._admission = admission

    async def enter(self, context: RequestContext, body: bytes, load: Load, urls: Sequence[str]) -> EngineCall:
        """Wait for a place, which the request holds until its answer is over.

        Args:
            body: what the engine gets, on the path that the client used.
            load: what the request takes of an engine.
            urls: its images, as in `body`; the record has their schedules.

        Raises:
            GatewayError: there is no place for the request.
        """
        record = context.record
        if not await self._engines.is_ready():
            raise self._engines.refusal()
        began, has_waited = time.monotonic(), True
        try:
            held = await context.cleanup.enter_async_context(self._admission.admit(load, context.party))
        except GatewayError as error:
            has_waited = error.reason in WAITED_REASONS  # all others are rejected at once
            raise
        finally:
            if has_waited:
                record.queue_seconds = time.monotonic() - began  # in vain, perhaps
        if record.geometry is not None and record.geometry != await self._engines.geometry():
            raise EngineUnreachableError("the engine was replaced while the request waited; try again")
        # Megabytes to hash, and of use only where there is a choice.
        images = tuple(hash(url) for url in urls) if len(self._engines.names) > 1 else ()
        return EngineCall(
            record.route, body, record.request_id, record.trace_headers, held.tokens, images, held.sequences
        )

    async def complete(self, context: RequestContext, call: EngineCall, shape: AnswerShape) -> Response:
        """The engine's whole answer.

        Raises:
            GatewayError: the engine refuses the request or fails.
        """
        record = context.record
        answer = await self._engines.complete(call)
        record.engine_answered = True
        answer["usage"] = shape.usage(record, answer.get("usage"))
        return JSONResponse(answer, headers=record.headers())

    async def stream(
        self, context: RequestContext, call: EngineCall, shape: AnswerShape, *, include_usage: bool
    ) -> Response:
        """The engine's answer as a stream, which begins once the engine has accepted the request. Raises likewise."""
        record = context.record
        source = await self._engines.open_stream(call)
        context.cleanup.push_async_callback(source.aclose)
        record.engine_answered = True
        context.lease.release()  # the body has gone to the engine, and a stream may take minutes
        events = shape.relay(source, record, include_usage=include_usage)
        return EventStream(events, context, headers=record.headers())
