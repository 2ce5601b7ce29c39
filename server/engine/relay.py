"""The engine's stream of events -> the client's: usage in our shape, failures as an error event."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any, Final

from server.engine.client import EventSource, check_complete, choices_of, error_from_engine, read_object
from server.engine.dispatch import AnswerShape
from server.errors import EngineFailedError, GatewayError, error_event
from server.telemetry.record import RequestRecord

_DONE: Final = b"[DONE]"


async def relay_events(
    source: EventSource, record: RequestRecord, *, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    """The client's events, `data: ...` with the empty line that ends each.

    The engine is always asked for usage; without `include_usage` its chunk is taken out. If the engine breaks off,
    reports an error, or no usage that can be read, the last event is an OpenAI error object, and no `[DONE]` follows.
    """
    try:
        async for data in source:
            if data == _DONE:
                if record.engine_usage is None:
                    raise EngineFailedError("the engine's answer ended without its usage", code="engine_failed")
                yield _event(_DONE)
                return
            relayed = _relay_chunk(data, record, include_usage)
            if relayed is not None:
                yield _event(relayed)
        raise EngineFailedError("the engine's answer ended too early", code="engine_failed")
    except GatewayError as error:
        record.mark_failure(error)
        yield error_event(error)


def _relay_chunk(data: bytes, record: RequestRecord, include_usage: bool) -> bytes | None:
    """The chunk for the client, or None if it is not for the client.

    Raises:
        GatewayError: it is an error object, or cannot be read.
    """
    chunk = read_event(data)
    check_complete(chunk)
    if _has_text(chunk):
        record.mark_token()
    if chunk.get("usage") is None:
        return data
    chunk["usage"] = record.usage(chunk["usage"])
    if not include_usage:
        if not chunk.get("choices"):
            return None
        del chunk["usage"]
    return dump_event(chunk)


def read_event(data: bytes) -> dict[str, Any]:
    """An event of the engine's, on any route.

    Raises:
        GatewayError: it is an error object, or cannot be read.
    """
    event = read_object(data)
    if "error" in event or event.get("type") == "error":
        error = event.get("error")
        code = error.get("code") if isinstance(error, Mapping) else None
        raise error_from_engine(code if isinstance(code, int) else 500, event)
    return event


def _has_text(chunk: Mapping[str, Any]) -> bool:
    """Whether an event brings a part of the answer, not only its frame (role, usage)."""
    for choice in choices_of(chunk):
        delta = choice.get("delta")
        parts = delta if isinstance(delta, Mapping) else {}
        if choice.get("text") or any(parts.get(name) for name in ("content", "reasoning", "tool_calls")):
            return True
    return False


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


def dump_event(value: Mapping[str, Any]) -> bytes:
    """The data of an event for the client."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


SHAPE: Final = AnswerShape(relay_events, RequestRecord.usage)
"""Of chat and text completions."""
