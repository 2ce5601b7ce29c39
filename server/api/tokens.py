"""POST /tokenize and POST /detokenize: no model runs, so there is no queue."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server import paths
from server.api.intake import Intake
from server.budget import header_budget, refuse_without_images
from server.context import Context, RequestContext
from server.engine.client import EngineCall
from server.engine.pool import EnginePool
from server.http.disconnect import until_disconnect
from server.schemas.engine_json import dump_json
from server.schemas.tokens import DetokenizeRequest, TokenizeRequest


def token_routes(intake: Intake, engines: EnginePool) -> APIRouter:
    router = APIRouter()

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
        refuse_without_images(None, header_budget(request.headers))
        record = context.record
        record.model = body.model
        call = EngineCall(record.route, dump_json(body.sent), record.request_id, record.trace_headers)
        return JSONResponse(await until_disconnect(request.receive, lambda: engines.complete(call)))

    return router
