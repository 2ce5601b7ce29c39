"""A GatewayError on the wire: as a response, as JSON alone, as the last event of a stream."""

from __future__ import annotations

import json

from starlette.responses import JSONResponse

from server.errors import GatewayError


def error_response(error: GatewayError) -> JSONResponse:
    """OpenAI's error object with its status and headers."""
    return JSONResponse(error.body(), error.status, error.headers())


def error_json(error: GatewayError) -> bytes:
    """OpenAI's error object alone."""
    return json.dumps(error.body(), ensure_ascii=False, separators=(",", ":")).encode()


def error_event(error: GatewayError) -> bytes:
    """OpenAI's error object as an event."""
    return b"data: " + error_json(error) + b"\n\n"
