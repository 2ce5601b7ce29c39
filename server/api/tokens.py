"""POST /tokenize and POST /detokenize: no model runs, so they do not wait for one.

vLLM's front end tokenizes one text after another, those of other requests included. So texts go there a few at a time,
through a fair queue of their own.
"""

from __future__ import annotations

import math
from typing import Any, Final

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server import paths
from server.admission.load import Load
from server.admission.queue import Admission
from server.admission.room import FixedRoom
from server.api.intake import Intake
from server.budget import header_budget
from server.context import Context, RequestContext
from server.engine.client import EngineCall
from server.engine.pool import EnginePool
from server.errors import PayloadTooLargeError
from server.http.disconnect import until_disconnect
from server.schemas.tokens import DetokenizeRequest, TokenizeRequest
from server.settings import Settings

_BYTES_PER_TOKEN: Final = 4
LONGEST_BYTES: Final = 1 << 20
"""Of a request: more would hold up the tokenizer for seconds, and no context takes as much."""


_TOKENIZER: Final = FixedRoom(65_536, math.inf)
"""How much text engines get at a time: what vLLM tokenizes in a fraction of a second."""


def token_routes(settings: Settings, intake: Intake, engines: EnginePool) -> APIRouter:
    router = APIRouter()
    admission = Admission(settings, _TOKENIZER)

    @router.post(paths.TOKENIZE)
    async def tokenize(request: Request, context: Context) -> Response:
        """Text, or a conversation, to token ids."""
        return await relay(request, context, TokenizeRequest)

    @router.post(paths.DETOKENIZE)
    async def detokenize(request: Request, context: Context) -> Response:
        """Token ids to text."""
        return await relay(request, context, DetokenizeRequest)

    async def relay(
        request: Request, context: RequestContext, schema: type[TokenizeRequest | DetokenizeRequest]
    ) -> Response:
        body = schema.parse(await intake.read(request, context))
        header_budget(request.headers)  # there are no images that it could be for, but it must be a budget
        record = context.record
        record.model = body.model
        call = EngineCall(record.route, body.engine_body(), record.request_id, record.trace_headers)
        if len(call.body) > LONGEST_BYTES:
            raise PayloadTooLargeError(
                f"a request to {record.route} has at most {LONGEST_BYTES} bytes; got {len(call.body)}",
                code="request_too_large",
            )
        load = Load(len(call.body) // _BYTES_PER_TOKEN + 1)

        async def answer() -> dict[str, Any]:
            async with admission.admit(load, context.party):
                return await engines.complete(call)

        return JSONResponse(await until_disconnect(request.receive, answer))

    return router
