"""Routes without pictures: a checked request goes to the engine, its answer comes back with usage in our shape."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, nullcontext
from typing import Any, Final, Protocol, TypeAlias

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.completion_request import CompletionRequest, parse_completion_request
from server.disconnect import until_disconnect
from server.engine_client import EngineCall, EventSource
from server.record import RequestRecord
from server.recording import record_of
from server.relay import EventStream, relay_events
from server.tokenize_request import (
    DetokenizeRequest,
    TokenizeRequest,
    parse_detokenize_request,
    parse_tokenize_request,
)

COMPLETIONS_ROUTE: Final = "/v1/completions"
TOKENIZE_ROUTE: Final = "/tokenize"
DETOKENIZE_ROUTE: Final = "/detokenize"
ROUTES: Final = (COMPLETIONS_ROUTE, TOKENIZE_ROUTE, DETOKENIZE_ROUTE)

ReadBody: TypeAlias = Callable[[Request], Awaitable[bytes]]
Admit: TypeAlias = Callable[[int], AbstractAsyncContextManager[Any]]
"""Takes a request's cost in tokens; the request is in flight while the context is open."""


class Engine(Protocol):
    """What these routes need of the engines."""

    async def complete(self, call: EngineCall) -> dict[str, Any]: ...

    async def open_stream(self, call: EngineCall) -> EventSource: ...


def admit_all(_: int) -> AbstractAsyncContextManager[Any]:
    """Whoever comes."""
    return nullcontext()


class CompletionHandler:
    """Serves POST /v1/completions."""

    def __init__(self, engine: Engine, read_body: ReadBody, admit: Admit = admit_all) -> None:
        self._engine = engine
        self._read_body = read_body
        self._admit = admit

    async def handle(self, request: Request, record: RequestRecord) -> Response:
        """Serve one request and fill its record.

        Raises:
            GatewayError: whatever goes wrong before the first byte of the answer.
        """
        completion = parse_completion_request(await self._read_body(request))
        record.model, record.stream = completion.model, bool(completion.stream)
        return await until_disconnect(request.receive, lambda: self._serve(completion, record), discard_stream)

    async def _serve(self, completion: CompletionRequest, record: RequestRecord) -> Response:
        call = EngineCall(COMPLETIONS_ROUTE, completion.engine_body(), record.request_id, cost=completion.cost)
        async with AsyncExitStack() as admission:
            await admission.enter_async_context(self._admit(completion.cost))
            if completion.stream:
                source = await self._engine.open_stream(call)
                record.engine_answered = True
                admitted = AdmittedSource(source, admission.pop_all())
                events = relay_events(admitted, record, completion.include_usage)
                return EventStream(events, admitted, record, headers=record.headers())
            answer = await self._engine.complete(call)
        record.engine_answered = True
        answer["usage"] = record.usage(answer.get("usage") or {})
        return JSONResponse(answer, headers=record.headers())


class TokenizeHandler:
    """Serves POST /tokenize and POST /detokenize: no model runs, so nothing is admitted or counted."""

    def __init__(self, engine: Engine, read_body: ReadBody) -> None:
        self._engine = engine
        self._read_body = read_body

    async def tokenize(self, request: Request, record: RequestRecord) -> Response:
        """Text, or a conversation, to token ids."""
        return await self._relay(TOKENIZE_ROUTE, request, record, parse_tokenize_request)

    async def detokenize(self, request: Request, record: RequestRecord) -> Response:
        """Token ids to text."""
        return await self._relay(DETOKENIZE_ROUTE, request, record, parse_detokenize_request)

    async def _relay(
        self,
        path: str,
        request: Request,
        record: RequestRecord,
        parse: Callable[[bytes], TokenizeRequest | DetokenizeRequest],
    ) -> Response:
        parsed = parse(await self._read_body(request))
        record.model = parsed.model
        call = EngineCall(path, parsed.engine_body(), record.request_id)
        return JSONResponse(await until_disconnect(request.receive, lambda: self._engine.complete(call)))


class AdmittedSource:
    """The events of an answer whose admission ends with it."""

    def __init__(self, source: EventSource, admission: AsyncExitStack) -> None:
        self._source = source
        self._admission = admission

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._source.__aiter__()

    async def aclose(self) -> None:
        """Let go of the engine's answer, then of the admission."""
        try:
            await self._source.aclose()
        finally:
            await self._admission.aclose()


def add_routes(app: FastAPI, engine: Engine, read_body: ReadBody, admit: Admit = admit_all) -> None:
    """Give an app the routes of this file."""
    completions = CompletionHandler(engine, read_body, admit)
    tokens = TokenizeHandler(engine, read_body)

    @app.post(COMPLETIONS_ROUTE)
    async def text_completions(request: Request) -> Response:
        return await completions.handle(request, record_of(request))

    @app.post(TOKENIZE_ROUTE)
    async def tokenize(request: Request) -> Response:
        return await tokens.tokenize(request, record_of(request))

    @app.post(DETOKENIZE_ROUTE)
    async def detokenize(request: Request) -> Response:
        return await tokens.detokenize(request, record_of(request))


async def discard_stream(response: Response) -> None:
    """Release an answer that came too late."""
    if isinstance(response, EventStream):
        await response.aclose()
