"""Request and schedules -> the body that the engine gets. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from server.budget import effective_budget
from server.images import CheckedImage
from server.request_body import Slots, dump_json
from server.schemas import ChatRequest, ImagePart, Message
from vd_plugin.schedule import Schedule


def build_engine_body(request: ChatRequest, images: Sequence[CheckedImage], schedules: Sequence[Schedule]) -> bytes:
    """The engine's request as JSON.

    `images` and `schedules` are in the order in which the pictures appear in the messages.

    Raises:
        InvalidRequestError: a number that passes through is infinite.
    """
    payload = {name: value for name, value in request.sent.items() if name not in ("messages", "visual_token_budget")}
    slots = Slots()
    urls = iter([slots.add(image.url) for image in images])
    payload["messages"] = [_engine_message(message, urls) for message in request.messages]
    if schedules:
        payload["mm_processor_kwargs"] = {"visual_token_budget": [effective_budget(item) for item in schedules]}
    if request.stream:
        payload["stream_options"] = {**payload.get("stream_options", {}), **request.engine_stream_options()}
    return slots.fill(dump_json(payload))


def _engine_message(message: Message, urls: Iterator[str]) -> dict[str, Any]:
    body = message.model_dump(exclude_unset=True, exclude={"content"})
    if isinstance(message.content, list):
        body["content"] = [
            {"type": "image_url", "image_url": {"url": next(urls)}}
            if isinstance(part, ImagePart)
            else part.model_dump()
            for part in message.content
        ]
    else:
        body["content"] = message.content
    return body
