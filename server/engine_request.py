"""Request and schedules -> the body that the engine gets. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from server.budget import effective_budget
from server.errors import InvalidRequestError
from server.images import CheckedImage
from server.schemas import ChatRequest, ImagePart, Message
from vd_plugin.schedule import Schedule


def build_engine_body(request: ChatRequest, images: Sequence[CheckedImage], schedules: Sequence[Schedule]) -> bytes:
    """The engine's request as JSON.

    `images` and `schedules` are in the order in which the pictures appear in the messages.

    Raises:
        InvalidRequestError: a number that passes through is infinite.
    """
    payload = request.model_dump(exclude_unset=True, exclude={"messages", "visual_token_budget"})
    checked = iter(images)
    payload["messages"] = [_engine_message(message, checked) for message in request.messages]
    if schedules:
        payload["mm_processor_kwargs"] = {"visual_token_budget": [effective_budget(item) for item in schedules]}
    if request.stream:
        # Our own figures need the usage chunk; the relay takes it out again if the client did not ask for it.
        options = payload.get("stream_options") or {}
        continuous = bool(options.get("include_usage") and options.get("continuous_usage_stats"))
        payload["stream_options"] = {**options, "include_usage": True, "continuous_usage_stats": continuous}
    try:
        return json.dumps(payload, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except ValueError:
        raise InvalidRequestError("the request has a number that is too large") from None


def _engine_message(message: Message, images: Iterator[CheckedImage]) -> dict[str, Any]:
    body = message.model_dump(exclude_unset=True, exclude={"content"})
    if isinstance(message.content, list):
        body["content"] = [
            {"type": "image_url", "image_url": {"url": next(images).url}}
            if isinstance(part, ImagePart)
            else part.model_dump()
            for part in message.content
        ]
    else:
        body["content"] = message.content
    return body
