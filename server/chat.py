"""A chat completion from arrival to last byte.

1. read the body, within the limit of its size        (schemas.py)
2. check every picture, in threads                     (images.py)
3. resolve the budget for each                         (budget.py)
4. send it to the engine                               (engine_request.py, engine_client.py)
5. relay the answer with our usage                     (relay.py)

A client that goes away at any point stops the work: what is awaited is cancelled, and the engine aborts the request.
"""

from __future__ import annotations

import anyio
import anyio.to_thread
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from server.budget import plan_images
from server.disconnect import until_disconnect
from server.engine_client import EngineCall
from server.engine_pool import EnginePool
from server.engine_request import build_engine_body
from server.errors import ClientDisconnectedError, InvalidRequestError, PayloadTooLargeError
from server.images import CheckedImage, check_image
from server.record import RequestRecord
from server.relay import EventStream, relay_events
from server.schemas import ChatRequest, parse_chat_request
from server.settings import Settings


class ChatHandler:
    """Serves POST /v1/chat/completions."""

    def __init__(self, settings: Settings, engine: EnginePool) -> None:
        self._settings = settings
        self._engine = engine
        self._image_threads = anyio.CapacityLimiter(settings.image_threads)

    async def handle(self, request: Request, record: RequestRecord) -> Response:
        """Serve one request and fill its record.

        Raises:
            GatewayError: whatever goes wrong before the first byte of the answer.
        """
        chat = parse_chat_request(await self._read_body(request))
        record.model, record.stream = chat.model, bool(chat.stream)
        return await until_disconnect(request.receive, lambda: self._serve(chat, record), _discard)

    async def _serve(self, chat: ChatRequest, record: RequestRecord) -> Response:
        images = await self._check_images(chat)
        if images:
            record.geometry = await self._engine.geometry()
            budget = chat.visual_token_budget or self._settings.default_budget
            record.schedules = plan_images(record.geometry, images, budget)
            if (chat.model_extra or {}).get("prompt_logprobs") is not None and not all(
                schedule.is_full for schedule in record.schedules
            ):
                raise InvalidRequestError(
                    "prompt_logprobs are not available for pruned images: set visual_token_budget to 'full'",
                    param="prompt_logprobs",
                )
        body = build_engine_body(chat, images, record.schedules)
        call = EngineCall(record.route, body, record.request_id)
        if chat.stream:
            source = await self._engine.open_stream(call)
            record.engine_answered = True
            include_usage = bool(chat.stream_options and chat.stream_options.include_usage)
            events = relay_events(source, record, include_usage)
            return EventStream(events, source, record, headers=record.headers())
        answer = await self._engine.complete(call)
        record.engine_answered = True
        answer["usage"] = record.usage(answer.get("usage") or {})
        return JSONResponse(answer, headers=record.headers())

    async def _read_body(self, request: Request) -> bytes:
        limit = self._settings.max_body_bytes
        body = bytearray()
        try:
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise PayloadTooLargeError(f"the request body has more than {limit} bytes", code="body_too_large")
        except ClientDisconnect:
            raise ClientDisconnectedError("the client closed the connection") from None
        return bytes(body)

    async def _check_images(self, chat: ChatRequest) -> list[CheckedImage]:
        parts = list(chat.image_parts())
        limit = self._settings.max_images_per_request
        if len(parts) > limit:
            raise InvalidRequestError(
                f"the request has {len(parts)} images; at most {limit} are accepted", param="messages"
            )
        # One after the other within a request, so that a big one cannot keep all the threads for itself.
        return [
            await anyio.to_thread.run_sync(
                check_image, part.image_url.url, self._settings, param, limiter=self._image_threads
            )
            for param, part in parts
        ]


async def _discard(response: Response) -> None:
    if isinstance(response, EventStream):
        await response.aclose()
