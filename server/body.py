"""A request's body: JSON by its own account, within the limits of size, in time."""

from __future__ import annotations

from starlette.requests import ClientDisconnect, Request

from server.errors import ClientDisconnectedError, MediaTypeError, PayloadTooLargeError
from server.memory_budget import MemoryLease
from server.settings import Settings


async def read_json_body(request: Request, settings: Settings, lease: MemoryLease) -> bytes:
    """The bytes of a JSON body. How long it may take is the connection's matter (connection_guard.py).

    Raises:
        MediaTypeError: the headers say that it is something else.
        PayloadTooLargeError: too many bytes.
        OverloadedError: too many bytes in all requests together.
        ClientDisconnectedError: the client went away.
    """
    _check_media_type(request)
    limit = settings.max_body_bytes
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise _too_large(limit)
    body = bytearray()
    try:
        async for chunk in request.stream():
            lease.add(len(chunk))
            body += chunk
            if len(body) > limit:
                raise _too_large(limit)
    except ClientDisconnect:
        raise ClientDisconnectedError("the client closed the connection") from None
    return bytes(body)


def _check_media_type(request: Request) -> None:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not (
        media_type.startswith("application/") and media_type.endswith("+json")
    ):
        raise MediaTypeError(
            f"the request must have the header Content-Type: application/json; got {media_type or 'none'!r}",
            code="unsupported_media_type",
        )
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise MediaTypeError(
            f"compressed request bodies are not accepted (Content-Encoding: {encoding})", code="unsupported_media_type"
        )


def _too_large(limit: int) -> PayloadTooLargeError:
    return PayloadTooLargeError(f"the request body has more than {limit} bytes", code="body_too_large")
