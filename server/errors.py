"""What can go wrong with a request: one tree, one table, one shape on the wire.

GatewayError
  InvalidRequestError         the client's request is at fault
    ImageUnavailableError     ... in the address of an image, or what is behind it
  AuthenticationError         no key, or one that is not known
  SlowRequestError            the request did not arrive in time
  PayloadTooLargeError        it is too large
  MediaTypeError              it is not JSON by its own account
  UnknownRouteError           no such path
  MethodNotAllowedError       no such method on this path
  UnknownModelError           no such model
  RateLimitError              the key has used up its rate
  OverloadedError             overloaded; a later attempt may succeed
  RelayedError                the engine refused the request; its status is kept
  EngineFailedError           the engine answered with a failure of its own, or stopped answering
  EngineMismatchError         the engine computes budgets differently, or has no VisionDrop at all
  EngineUnreachableError      nothing listens where the engine should be
  EngineDrainingError         the engine is being stopped, and takes no more requests
  ClientDisconnectedError     nobody waits for the answer any more; never seen on the wire
  InternalError               a defect of the gateway

The wire shape is OpenAI's: `{"error": {"message", "type", "param", "code"}}`; `code` is a word or null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from pydantic import ValidationError
from starlette.responses import JSONResponse

LONGEST_RETRY_AFTER_SECONDS: Final = 120
_RETRY_AFTER_SECONDS: Final = 5.0
"""Where nothing better is known: load balancers have noticed by then, and another gateway or engine has taken over."""
_LONGEST_MESSAGE: Final = 1000
_LONGEST_PARAM: Final = 200

REJECTION_REASONS: Final = (
    "invalid_api_key",
    "requests_per_minute",
    "images_per_minute",
    "parallel_requests",
    "too_long",
    "queue_full",
    "queue_share",
    "queue_timeout",
    "memory_full",
    "memory_share",
    "slow_request",
    "stopping",
    "engine_down",
    "engine_overloaded",
)
"""Why requests are rejected: labels of a metric."""


class GatewayError(Exception):
    """A request that fails, with a sentence for the person who sent it.

    Args:
        message: one sentence (or two); never a traceback.
        param: the field of the request that is at fault.
        code: a word that a program can act on.
    """

    reason: str | None = None
    """One of REJECTION_REASONS, for a request that was turned away before an engine saw it."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        # What a client sent may be quoted in both.
        self.message = _shortened(message, _LONGEST_MESSAGE)
        super().__init__(self.message)
        self.param = None if param is None else _shortened(param, _LONGEST_PARAM)
        self.code = code

    @property
    def status(self) -> int:
        return _TABLE[type(self)].status

    @property
    def openai_type(self) -> str:
        return _TABLE[type(self)].openai_type

    def body(self) -> dict[str, Any]:
        """The error object that goes on the wire."""
        error = {"message": self.message, "type": self.openai_type, "param": self.param, "code": self.code}
        return {"error": error}

    def headers(self) -> dict[str, str]:
        """Headers that go with the error object."""
        return {}


class InvalidRequestError(GatewayError): ...


class ImageUnavailableError(InvalidRequestError):
    """An image that could not be fetched. The error never reveals what a blocked URL pointed to."""


class AuthenticationError(GatewayError):
    reason = "invalid_api_key"

    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": "Bearer"}


class SlowRequestError(GatewayError):
    reason = "slow_request"

    def headers(self) -> dict[str, str]:
        return {"Connection": "close"}


class PayloadTooLargeError(GatewayError): ...


class MediaTypeError(GatewayError): ...


class _TryLaterError(GatewayError):
    """A request that may succeed later.

    Args:
        reason: one of REJECTION_REASONS, for the metric.
        retry_after_seconds: when to try again; rounded up to whole seconds, 1 to 120, on the wire.
    """

    def __init__(
        self,
        message: str,
        *,
        reason: str,
        retry_after_seconds: float = _RETRY_AFTER_SECONDS,
        code: str | None = None,
    ) -> None:
        super().__init__(message, code=code or reason)
        self.reason = reason
        self.retry_after_seconds = retry_after_seconds

    def headers(self) -> dict[str, str]:
        return _retry_after(self.retry_after_seconds)


class RateLimitError(_TryLaterError): ...


class OverloadedError(_TryLaterError): ...


class UnknownRouteError(GatewayError): ...


class UnknownModelError(GatewayError): ...


class MethodNotAllowedError(GatewayError): ...


class EngineFailedError(GatewayError): ...


class _NoEngineError(GatewayError):
    """No engine takes the request now. `code` is the class's own if none is given."""

    reason = "engine_down"
    own_code: str

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param=param, code=code or self.own_code)

    def headers(self) -> dict[str, str]:
        return _retry_after(_RETRY_AFTER_SECONDS)


class EngineMismatchError(_NoEngineError):
    own_code = "engine_mismatch"


class EngineUnreachableError(_NoEngineError):
    own_code = "engine_unreachable"


class EngineDrainingError(_NoEngineError):
    own_code = "engine_draining"


class ClientDisconnectedError(GatewayError): ...


class InternalError(GatewayError): ...


class RelayedError(GatewayError):
    """A refusal by the engine (4xx), passed on with its status."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param=param, code=code)
        self._status = status

    @property
    def status(self) -> int:
        return self._status


class _Row(NamedTuple):
    status: int
    openai_type: str


_TABLE: Final[Mapping[type[GatewayError], _Row]] = {
    InvalidRequestError: _Row(400, "invalid_request_error"),
    ImageUnavailableError: _Row(400, "invalid_request_error"),
    AuthenticationError: _Row(401, "invalid_request_error"),
    UnknownRouteError: _Row(404, "invalid_request_error"),
    UnknownModelError: _Row(404, "invalid_request_error"),
    MethodNotAllowedError: _Row(405, "invalid_request_error"),
    SlowRequestError: _Row(408, "invalid_request_error"),
    PayloadTooLargeError: _Row(413, "invalid_request_error"),
    MediaTypeError: _Row(415, "invalid_request_error"),
    RateLimitError: _Row(429, "rate_limit_error"),
    OverloadedError: _Row(503, "overloaded_error"),
    RelayedError: _Row(400, "invalid_request_error"),
    EngineFailedError: _Row(502, "engine_error"),
    EngineMismatchError: _Row(503, "engine_error"),
    EngineUnreachableError: _Row(503, "engine_error"),
    EngineDrainingError: _Row(503, "engine_error"),
    # nginx's number for a client that went away; it reaches logs and metrics only.
    ClientDisconnectedError: _Row(499, "client_disconnected"),
    InternalError: _Row(500, "server_error"),
}

STATUSES: Final = tuple(sorted({row.status for row in _TABLE.values()} | {422, 431}))
"""Statuses of errors: labels of a metric. 422 is relayed from the engine, 431 is for headers that are too long."""


class Complaint(NamedTuple):
    """What pydantic reports about one value.

    Args:
        location: the steps to the value; tags of unions are in angle brackets.
        kind: pydantic's word for the complaint.
        reason: one sentence. For a `value_error` it is that of our own validator, and complete.
    """

    location: tuple[int | str, ...]
    kind: str
    reason: str

    @property
    def path(self) -> str | None:
        """("messages", 0, "content", "<parts>", 1) -> `messages[0].content[1]`"""
        path = ""
        for step in self.location:
            if isinstance(step, int):
                path += f"[{step}]"
            elif not step.startswith("<"):
                path += f".{step}" if path else step
        return path or None


def first_complaint(error: ValidationError) -> Complaint:
    """What to report of pydantic's errors: a missing field of the whole, else the first in the order of fields."""
    errors = error.errors(include_url=False, include_input=False)
    first = next((entry for entry in errors if entry["type"] == "missing" and len(entry["loc"]) == 1), errors[0])
    reason = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]
    return Complaint(first["loc"], first["type"], reason)


def error_response(error: GatewayError) -> JSONResponse:
    """The error on the wire: OpenAI's error object with its status and headers."""
    return JSONResponse(error.body(), error.status, error.headers())


def error_json(error: GatewayError) -> bytes:
    """OpenAI's error object alone."""
    return json.dumps(error.body(), ensure_ascii=False, separators=(",", ":")).encode()


def error_event(error: GatewayError) -> bytes:
    """OpenAI's error object as the last event of a stream."""
    return b"data: " + error_json(error) + b"\n\n"


def from_http_status(status: int, detail: str, method: str, path: str) -> GatewayError:
    """What the web framework refuses by itself: an unknown path or method."""
    if status == 404:
        return UnknownRouteError(f"there is no {path!r} here", code="unknown_url")
    if status == 405:
        return MethodNotAllowedError(f"{path!r} does not answer {method}", code="method_not_allowed")
    return InvalidRequestError(detail) if status < 500 else InternalError(detail)


def _retry_after(seconds: float) -> dict[str, str]:
    return {"Retry-After": str(min(max(math.ceil(seconds), 1), LONGEST_RETRY_AFTER_SECONDS))}


def _shortened(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[:longest]}..."
