"""A chat completion from arrival to last byte.

1. read the body, within the limits                     (intake.py, body.py, schemas.py)
2. choose the budget of every picture                   (planner.py, budget.py)
3. fetch and check every picture                        (pictures.py, image_fetch.py, images.py)
4. resolve the budgets                                  (budget.py)
5. wait for a place                                     (dispatch.py, admission.py)
6. send it to an engine                                 (engine_request.py, engine_pool.py, engine_client.py)
7. relay the answer with our usage                      (relay.py, record.py)

A client that goes away at any point stops the work: what is awaited is cancelled, and the engine aborts the request.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.budget import Choice, plan_images
from server.cost import estimate_text_tokens
from server.disconnect import until_disconnect
from server.dispatch import Dispatcher
from server.engine_request import build_engine_body
from server.errors import InvalidRequestError
from server.intake import Intake
from server.planner import Planner
from server.record import RequestRecord, visual_tokens
from server.recording import record_of
from server.relay import relay_events
from server.schemas import ChatRequest, parse_chat_request
from vd_plugin.schedule import FULL, PRESETS


class ChatHandler:
    """Serves POST /v1/chat/completions, and POST /v1/visual_tokens/count."""

    def __init__(self, intake: Intake, planner: Planner, dispatcher: Dispatcher) -> None:
        self._intake = intake
        self._planner = planner
        self._dispatcher = dispatcher

    async def complete(self, request: Request) -> Response:
        """Answer one request.

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
        record = record_of(request)
        record.model = chat.model
        return await until_disconnect(request.receive, lambda: self._count(request, chat, record))

    async def _complete(self, request: Request, chat: ChatRequest, record: RequestRecord) -> Response:
        images = await self._planner.plan(request, chat)
        _check_pruned(chat, record)
        body, tokens = build_engine_body(chat, images, record.schedules), estimate_text_tokens(_texts(chat))
        relay = partial(relay_events, include_usage=chat.include_usage) if chat.stream else None
        return await self._dispatcher.reply(request, body, tokens, images, relay=relay)

    async def _count(self, request: Request, chat: ChatRequest, record: RequestRecord) -> Response:
        images = await self._planner.plan(request, chat)
        presets: dict[str, Any] = {}
        for name in (*PRESETS, FULL):
            choice = Choice(PRESETS.get(name, FULL), None)
            schedules = () if record.geometry is None else plan_images(record.geometry, images, [choice] * len(images))
            presets[name] = visual_tokens(schedules)
        answer = {"object": "visual_tokens.count", "model": chat.model}
        return JSONResponse({**answer, "requested": record.visual_tokens(), "presets": presets})


def _check_pruned(chat: ChatRequest, record: RequestRecord) -> None:
    """Log-probabilities of a prompt exist for every token of it, and pruned ones are gone."""
    # vLLM takes `echo` as a wish for them.
    wish = "prompt_logprobs" if chat.prompt_logprobs is not None else "echo" if chat.echo else None
    if wish is not None and not all(schedule.is_full for schedule in record.schedules):
        raise InvalidRequestError(
            f"{wish} is not available for pruned images: set visual_token_budget to 'full'", param=wish
        )


def _texts(chat: ChatRequest) -> Iterator[str]:
    """All that the template may write into the prompt."""
    for message, sent in zip(chat.messages, chat.sent["messages"], strict=True):
        if isinstance(message.content, str):
            yield message.content
        else:
            for part in message.content or ():
                text = getattr(part, "text", None) or getattr(part, "refusal", None)
                if isinstance(text, str):
                    yield text
        if rest := {name: value for name, value in sent.items() if name not in ("role", "content")}:
            yield json.dumps(rest, ensure_ascii=False)
    for name in ("tools", "documents"):
        if name in chat.sent:
            yield json.dumps(chat.sent[name], ensure_ascii=False)
