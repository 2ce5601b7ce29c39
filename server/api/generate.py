"""A request for an answer of the model, from arrival to last byte: one pipeline for all generating routes.

1. read the body, within the limits                     (intake.py, schemas/)
2. choose the budget of every image                     (plan.py, budget.py)
   refuse what is surely too long for the model         (admission/context_length.py)
3. fetch and check every image                          (images/)
4. resolve the budgets                                  (budget.py)
5. wait for a place                                     (engine/dispatch.py, admission/queue.py)
6. send it to an engine                                 (engine/pool.py, engine/client.py)
7. relay the answer with our usage                      (engine/relay.py, telemetry/record.py)

What differs between the routes lies in their schemas and in the shape of their answers: a further route is a schema
and a line in ROUTES.

A client that goes away at any point stops the work: what is awaited is cancelled, and the engine aborts the request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server import paths
from server.admission.load import load_of
from server.api.intake import Intake
from server.api.plan import Planner
from server.budget import header_budget
from server.context import Context, RequestContext
from server.engine import relay, relay_responses
from server.engine.dispatch import AnswerShape, Dispatcher
from server.http.disconnect import until_disconnect
from server.schemas.chat import ChatRequest
from server.schemas.completions import CompletionRequest
from server.schemas.generation import GenerationRequest
from server.schemas.responses import ResponsesRequest
from vd_plugin.schedule import Budget


@dataclass(frozen=True, slots=True)
class GeneratingRoute:
    path: str
    schema: type[GenerationRequest]
    shape: AnswerShape


ROUTES: Final = (
    GeneratingRoute(paths.CHAT, ChatRequest, relay.SHAPE),
    GeneratingRoute(paths.COMPLETIONS, CompletionRequest, relay.SHAPE),
    GeneratingRoute(paths.RESPONSES, ResponsesRequest, relay_responses.SHAPE),
)


def generating_routes(intake: Intake, planner: Planner, dispatcher: Dispatcher) -> APIRouter:
    """All of ROUTES, each through the same pipeline."""
    router = APIRouter()
    for route in ROUTES:
        router.post(route.path)(_Pipeline(route, intake, planner, dispatcher).answer)
    return router


class _Pipeline:
    """The steps of one route."""

    def __init__(self, route: GeneratingRoute, intake: Intake, planner: Planner, dispatcher: Dispatcher) -> None:
        self._route = route
        self._intake = intake
        self._planner = planner
        self._dispatcher = dispatcher

    async def answer(self, request: Request, context: Context) -> Response:
        """Answer one request.

        Raises:
            GatewayError: whatever goes wrong before the first byte of the answer.
        """
        body = self._route.schema.parse(await self._intake.read(request, context))
        context.record.model, context.record.stream = body.model, bool(body.stream)
        header = header_budget(request.headers)
        return await until_disconnect(request.receive, lambda: self._answer(context, body, header))

    async def _answer(self, context: RequestContext, body: GenerationRequest, header: Budget | None) -> Response:
        urls = await self._planner.plan(context, body, header)
        schedules = context.record.schedules
        body.check_schedules(schedules)
        sent = body.engine_body(urls, [schedule.effective_budget for schedule in schedules])
        load = load_of(body, context.record.kept, context.record.max_model_len)
        call = await self._dispatcher.enter(context, sent, load, urls)
        if body.stream:
            return await self._dispatcher.stream(context, call, self._route.shape, include_usage=body.include_usage)
        return await self._dispatcher.complete(context, call, self._route.shape)
