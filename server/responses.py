"""POST /v1/responses: vLLM's own, without its memory. Usage and events come back with our figures in them.

vLLM's usage of this route has no count of visual tokens, so that here they are as planned, not as counted.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from server.budget import effective_budget
from server.cost import estimate_text_tokens
from server.disconnect import until_disconnect
from server.dispatch import Dispatcher
from server.engine_client import EventSource
from server.errors import EngineFailedError, GatewayError
from server.intake import Intake
from server.planner import Planner
from server.record import RequestRecord
from server.recording import record_of
from server.relay import dump_event, read_event
from server.responses_request import ResponsesRequest, parse_responses_request

_LAST: Final = ("response.completed", "response.incomplete", "response.failed")


class ResponsesHandler:
    """Serves POST /v1/responses."""

    def __init__(self, intake: Intake, planner: Planner, dispatcher: Dispatcher) -> None:
        self._intake = intake
        self._planner = planner
        self._dispatcher = dispatcher

    async def respond(self, request: Request) -> Response:
        """Answer one request.

        Raises:
            GatewayError: whatever goes wrong before the first byte of the answer.
        """
        asked = parse_responses_request(await self._intake.read(request))
        record = record_of(request)
        record.model, record.stream = asked.model, bool(asked.stream)
        return await until_disconnect(request.receive, lambda: self._respond(request, asked))

    async def _respond(self, request: Request, asked: ResponsesRequest) -> Response:
        images, record = await self._planner.plan(request, asked), record_of(request)
        budgets = [effective_budget(schedule) for schedule in record.schedules]
        body, tokens = asked.engine_body([image.url for image in images], budgets), estimate_text_tokens(_texts(asked))
        relay = relay_responses if asked.stream else None
        return await self._dispatcher.reply(request, body, tokens, images, relay=relay, usage=_usage)


async def relay_responses(source: EventSource, record: RequestRecord) -> AsyncGenerator[bytes, None]:
    """The client's events, named as OpenAI does.

    If the engine breaks off or reports an error, the last event is `error`.
    """
    number = 0
    try:
        async for data in source:
            event = read_event(data)
            kind = str(event.get("type"))
            number = int(event.get("sequence_number") or number)
            if kind.endswith(".delta"):
                record.mark_token()
            response = event.get("response")
            if isinstance(response, dict) and response.get("usage"):
                response["usage"] = _usage(record, response["usage"])
            if kind == "response.failed":
                record.mark_failure(EngineFailedError("the engine failed on this request", code="engine_failed"))
            yield _event(kind, event)
            if kind in _LAST:
                return
        raise EngineFailedError("the engine's answer ended too early", code="engine_failed")
    except GatewayError as error:
        record.mark_failure(error)
        body = error.body()
        # OpenAI's event has the fields of the error object at its top; its clients look for `error`, too.
        yield _event("error", {**body["error"], "type": "error", "sequence_number": number + 1, **body})


def _usage(record: RequestRecord, engine_usage: Mapping[str, Any]) -> dict[str, Any]:
    """The engine's usage with our figures; in the record it stands as that of a chat completion."""
    details = engine_usage.get("input_tokens_details") or {}
    names = (("input_tokens", "prompt_tokens"), ("output_tokens", "completion_tokens"), ("total_tokens",) * 2)
    ours = record.usage({chat: engine_usage.get(name) or 0 for name, chat in names})
    counts = {name: ours["prompt_tokens_details"][name] for name in ("image_tokens", "text_tokens")}
    return {
        **engine_usage,
        "input_tokens_details": {**details, **counts},
        "visual_tokens": ours["visual_tokens"],
    }


def _texts(asked: ResponsesRequest) -> Iterator[str]:
    if asked.instructions is not None:
        yield asked.instructions
    if isinstance(asked.input, str):
        yield asked.input
        return
    for message in asked.input:
        if isinstance(message.content, str):
            yield message.content
        else:
            yield from (part.text for part in message.content if hasattr(part, "text"))


def _event(kind: str, event: Mapping[str, Any]) -> bytes:
    return f"event: {kind}\ndata: ".encode() + dump_event(event) + b"\n\n"
