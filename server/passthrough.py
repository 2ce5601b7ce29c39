"""Routes without pictures: a checked request goes to an engine, its answer comes back with usage in our shape."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.budget import header_budget, refuse_without_pictures
from server.completion_request import CompletionRequest, parse_completion_request
from server.disconnect import until_disconnect
from server.dispatch import Dispatcher
from server.engine_client import EngineCall
from server.engine_pool import EnginePool
from server.intake import Intake
from server.recording import record_of
from server.relay import relay_events
from server.tokenize_request import (
    DetokenizeRequest,
    TokenizeRequest,
    parse_detokenize_request,
    parse_tokenize_request,
)


class CompletionHandler:
    """Serves POST /v1/completions."""

    def __init__(self, intake: Intake, dispatcher: Dispatcher) -> None:
        self._intake = intake
        self._dispatcher = dispatcher

    async def complete(self, request: Request) -> Response:
        """Continue a text.

        Raises:
            GatewayError: whatever goes wrong before the first byte of the answer.
        """
        completion = parse_completion_request(await self._intake.read(request))
        refuse_without_pictures(None, header_budget(request.headers))
        record = record_of(request)
        record.model, record.stream = completion.model, bool(completion.stream)
        return await until_disconnect(request.receive, lambda: self._complete(request, completion))

    async def _complete(self, request: Request, completion: CompletionRequest) -> Response:
        relay = partial(relay_events, include_usage=completion.include_usage) if completion.stream else None
        return await self._dispatcher.reply(request, completion.engine_body(), completion.cost, relay=relay)


class TokenizeHandler:
    """Serves POST /tokenize and POST /detokenize: no model runs, so there is no queue."""

    def __init__(self, intake: Intake, engines: EnginePool) -> None:
        self._intake = intake
        self._engines = engines

    async def tokenize(self, request: Request) -> Response:
        """Text, or a conversation, to token ids."""
        return await self._relay(request, parse_tokenize_request)

    async def detokenize(self, request: Request) -> Response:
        """Token ids to text."""
        return await self._relay(request, parse_detokenize_request)

    async def _relay(self, request: Request, parse: Callable[[bytes], TokenizeRequest | DetokenizeRequest]) -> Response:
        parsed = parse(await self._intake.read(request))
        refuse_without_pictures(None, header_budget(request.headers))
        record = record_of(request)
        record.model = parsed.model
        call = EngineCall(record.route, parsed.engine_body(), record.request_id, record.trace_headers)
        return JSONResponse(await until_disconnect(request.receive, lambda: self._engines.complete(call)))
