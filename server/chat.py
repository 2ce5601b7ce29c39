"""A chat completion from arrival to last byte.

1. read the body, within the limits                     (intake.py, body.py)
2. choose the budget of every picture                   (budget.py)
3. fetch and check every picture                        (pictures.py, images.py, image_fetch.py)
4. resolve the budgets                                  (budget.py)
5. wait for a place                                     (admission.py)
6. send it to an engine                                 (engine_request.py, engine_pool.py)
7. relay the answer with our usage                      (relay.py)

A client that goes away at any point stops the work: what is awaited is cancelled, and the engine aborts the request.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server import budget
from server.access import key_of
from server.admission import Admission
from server.cost import estimate_text_tokens, request_cost
from server.disconnect import until_disconnect
from server.engine_client import EngineCall
from server.engine_pool import EnginePool
from server.engine_request import build_engine_body
from server.errors import InvalidRequestError
from server.images import CheckedImage
from server.intake import Intake
from server.pictures import PictureLoader
from server.rate_limits import RateLimits
from server.record import RequestRecord, visual_tokens
from server.recording import record_of, resources_of
from server.relay import EventStream, relay_events
from server.schemas import ChatRequest, parse_chat_request
from server.settings import Settings
from vd_plugin.schedule import FULL, PRESETS


class ChatHandler:
    """Serves POST /v1/chat/completions, and tells what such a request would cost."""

    def __init__(
        self,
        settings: Settings,
        engines: EnginePool,
        intake: Intake,
        pictures: PictureLoader,
        rates: RateLimits,
        admission: Admission,
    ) -> None:
        self._settings = settings
        self._engines = engines
        self._intake = intake
        self._pictures = pictures
        self._rates = rates
        self._admission = admission

    async def complete(self, request: Request) -> Response:
        """Serve one request.

        Raises:
            GatewayError: whatever goes wrong before the first byte of the answer.
        """
        chat = parse_chat_request(await self._intake.read(request))
        record = record_of(request)
        record.model, record.stream = chat.model, bool(chat.stream)
        return await until_disconnect(request.receive, lambda: self._complete(request, chat, record))

    async def count(self, request: Request) -> Response:
        """Tell what a request would cost at its own budgets and at every preset; the model does not run.

        Raises:
            GatewayError: the request could not be served either.
        """
        chat = parse_chat_request(await self._intake.read(request))
        record_of(request).model = chat.model
        return await until_disconnect(request.receive, lambda: self._count(request, chat))

    async def _complete(self, request: Request, chat: ChatRequest, record: RequestRecord) -> Response:
        images = await self._plan(request, chat, record)
        _check_pruned(chat, record)
        body = build_engine_body(chat, images, record.schedules)
        call = EngineCall(
            record.route,
            body,
            record.request_id,
            record.trace_headers,
            request_cost(estimate_text_tokens(_texts(chat)), record.schedules),
            tuple(hash(image.url) for image in images),
        )
        if not await self._engines.is_ready():
            raise self._engines.refusal()
        resources = resources_of(request)
        record.queue_seconds = await resources.enter_async_context(self._admission.admit(call.cost))
        if chat.stream:
            source = await self._engines.open_stream(call)
            resources.push_async_callback(source.aclose)
            record.engine_answered = True
            events = relay_events(source, record, chat.include_usage)
            return EventStream(events, source, record, headers=record.headers())
        answer = await self._engines.complete(call)
        record.engine_answered = True
        answer["usage"] = record.usage(answer.get("usage") or {})
        return JSONResponse(answer, headers=record.headers())

    async def _count(self, request: Request, chat: ChatRequest) -> Response:
        record = record_of(request)
        images = await self._plan(request, chat, record)
        presets: dict[str, Any] = {}
        for name in (*PRESETS, FULL):
            choice = budget.Choice(PRESETS.get(name, FULL), None)
            schedules = budget.plan_images(record.geometry, images, [choice] * len(images)) if record.geometry else ()
            presets[name] = visual_tokens(schedules)
        answer = {"object": "visual_tokens.count", "model": chat.model}
        return JSONResponse({**answer, "requested": record.visual_tokens(), "presets": presets})

    async def _plan(self, request: Request, chat: ChatRequest, record: RequestRecord) -> list[CheckedImage]:
        """Take the pictures of a request and resolve their budgets."""
        key = key_of(request)
        parts = [(param.removesuffix(".url"), part.image_url) for param, part in chat.image_parts()]
        choices = budget.choose_budgets(
            parts,
            chat.visual_token_budget,
            budget.parse_header(request.headers.get(budget.HEADER)),
            self._settings.default_budget,
            budget.lower(key.max_budget, self._settings.max_budget),
        )
        if not parts:
            return []
        self._pictures.check_number(len(parts))
        self._rates.take_images(key, len(parts))
        record.geometry = await self._engines.geometry()
        urls = [(f"{param}.url", image_url.url) for param, image_url in parts]
        images = await self._pictures.load(urls, record, self._intake.lease(request))
        record.schedules = budget.plan_images(record.geometry, images, choices)
        return images


def _check_pruned(chat: ChatRequest, record: RequestRecord) -> None:
    """Log-probabilities of a prompt exist for every token of it, and pruned ones are gone."""
    # vLLM takes `echo` as a wish for them.
    wish = "prompt_logprobs" if chat.prompt_logprobs is not None else "echo" if chat.echo else None
    if wish is not None and not all(schedule.is_full for schedule in record.schedules):
        raise InvalidRequestError(
            f"{wish} is not available for pruned images: set visual_token_budget to 'full'", param=wish
        )


def _texts(chat: ChatRequest) -> Iterator[str]:
    for message in chat.messages:
        if isinstance(message.content, str):
            yield message.content
        else:
            for part in message.content or ():
                text = getattr(part, "text", None)
                if isinstance(text, str):
                    yield text
