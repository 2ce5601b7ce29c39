"""A GatewayError on the wire."""

from __future__ import annotations

from starlette.responses import JSONResponse

from server.errors import GatewayError


def error_response(error: GatewayError) -> JSONResponse:
    """OpenAI's error object with its status and headers."""
    return JSONResponse(error.body(), error.status, error.headers())
