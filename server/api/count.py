"""POST /v1/visual_tokens/count: what a chat request would cost at its own budgets and at every preset."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server import paths
from server.api.intake import Intake
from server.api.plan import Planner
from server.budget import Choice, header_budget, plan_images
from server.context import Context, RequestContext
from server.http.disconnect import until_disconnect
from server.schemas.answers import PresetCosts, VisualTokensCount
from server.schemas.chat import ChatRequest
from server.telemetry.record import visual_tokens
from vd_plugin.schedule import FULL, PRESETS, Budget


def count_routes(intake: Intake, planner: Planner) -> APIRouter:
    router = APIRouter()

    @router.post(paths.COUNT)
    async def count(request: Request, context: Context) -> Response:
        """Report the cost; the model does not run.

        Raises:
            GatewayError: the request could not be served either.
        """
        body = ChatRequest.parse(await intake.read(request, context))
        context.record.model = body.model
        header = header_budget(request.headers)
        return await until_disconnect(request.receive, lambda: _count(planner, context, body, header))

    return router


async def _count(planner: Planner, context: RequestContext, body: ChatRequest, header: Budget | None) -> Response:
    await planner.plan(context, body, header)
    record = context.record
    presets = {}
    for name in (*PRESETS, FULL):
        choices = [Choice(PRESETS.get(name, FULL), None)] * len(record.image_sizes)
        schedules = () if record.geometry is None else plan_images(record.geometry, record.image_sizes, choices)
        presets[name] = visual_tokens(schedules)
    answer = VisualTokensCount(
        object="visual_tokens.count",
        model=body.model,
        requested=visual_tokens(record.schedules),
        presets=PresetCosts(**presets),
    )
    return JSONResponse(answer.model_dump())
