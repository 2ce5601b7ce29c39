"""What every request that asks for work goes through first: the drain, the key's rate, and a JSON body that fits."""

from __future__ import annotations

from starlette.requests import ClientDisconnect, Request

from server.admission.drain import Drain
from server.admission.memory import MemoryBudget, MemoryLease
from server.admission.rates import RateLimits
from server.context import RequestContext
from server.errors import ClientDisconnectedError, MediaTypeError, PayloadTooLargeError
from server.settings import Settings


class Intake:
    """What it takes for a request is given back when the request is over (RequestContext.cleanup)."""

    def __init__(self, settings: Settings, drain: Drain, rates: RateLimits, memory: MemoryBudget) -> None:
        self._settings = settings
        self._drain = drain
        self._rates = rates
        self._memory = memory

    async def read(self, request: Request, context: RequestContext) -> bytes:
        """The request's body.

        Raises:
            GatewayError: the gateway is stopping or full, the key has used up its rate, or the body does not fit.
        """
        context.cleanup.enter_context(self._drain.work())
        try:
            self._rates.take_request(context.key)
        finally:
            context.record.rate_headers = self._rates.headers(context.key)
        context.lease = context.cleanup.enter_context(self._memory.lease(context.party.name))
        return await _read_json_body(request, self._settings, context.lease)


async def _read_json_body(request: Request, settings: Settings, lease: MemoryLease) -> bytes:
    """The bytes of a JSON body. How long it may take is the connection's matter (http/connection.py).

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
