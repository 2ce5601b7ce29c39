"""POST /v1/responses: vLLM's own, without its memory. Usage and events come back with our figures in them.

vLLM's usage of this route has no count of visual tokens, so that here they are as planned, not as counted.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Any, Final

from server.engine.client import EventSource
from server.engine.dispatch import AnswerShape
from server.engine.relay import dump_event, read_event
from server.errors import EngineFailedError, GatewayError
from server.schemas.engine_usage import ResponsesUsage
from server.telemetry.record import RequestRecord

_WITH_USAGE: Final = ("response.completed", "response.incomplete")
_LAST: Final = (*_WITH_USAGE, "response.failed")


async def relay_responses(
    source: EventSource, record: RequestRecord, *, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    """The client's events, named as OpenAI does. The last one always has the usage, unless the engine failed.

    If the engine breaks off, reports an error, or no usage that can be read, the last event is `error`.
    """
    assert include_usage
    number = 0
    try:
        async for data in source:
            event = read_event(data)
            kind = str(event.get("type"))
            sent_number = event.get("sequence_number")
            number = sent_number if isinstance(sent_number, int) else number + 1
            if kind.endswith(".delta"):
                record.mark_token()
            response: Any = event.get("response")
            usage = response.get("usage") if isinstance(response, dict) else None
            if usage is not None or kind in _WITH_USAGE:
                response["usage"] = _usage(record, usage)
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


def _usage(record: RequestRecord, reported: Any) -> dict[str, Any]:
    """The engine's usage with our figures; in the record it stands as that of a chat completion.

    Raises:
        EngineFailedError: it cannot be read.
    """
    usage = ResponsesUsage.parse(reported)
    ours = record.usage(
        {
            "prompt_tokens": usage.input_tokens,
            "completion_tokens": usage.output_tokens,
            "total_tokens": usage.total_tokens,
        }
    )
    counts = {name: ours["prompt_tokens_details"][name] for name in ("image_tokens", "text_tokens")}
    return {
        **reported,
        "input_tokens_details": {**(reported.get("input_tokens_details") or {}), **counts},
        "visual_tokens": ours["visual_tokens"],
    }


def _event(kind: str, event: Mapping[str, Any]) -> bytes:
    return f"event: {kind}\ndata: ".encode() + dump_event(event) + b"\n\n"


SHAPE: Final = AnswerShape(relay_responses, _usage)
