"""The only I/O to the engine: vLLM's OpenAI server with our plugin, over TCP or a unix socket."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import httpx

from server import paths
from server.admission.context_length import ContextLength
from server.engine.transport import EngineTransport
from server.errors import (
    EngineDrainingError,
    EngineFailedError,
    EngineMismatchError,
    EngineUnreachableError,
    GatewayError,
    OverloadedError,
    RelayedError,
    UnknownModelError,
)
from vd_plugin.schedule import RULE_VERSION, Geometry
from vd_plugin.wire import DRAINING, GEOMETRY_PATH

_PROBE_SECONDS: Final = 3.0
_LONGEST_SOCKET_PATH: Final = 107
"""Of unix(7)."""
_ANSWER_TIMEOUT: Final = httpx.Timeout(None, connect=5.0)
"""An answer may take as long as it takes; only a connection must come about soon."""

_LONGEST_MESSAGE: Final = 2000


@dataclass(frozen=True, slots=True)
class EngineCall:
    """One request to an engine.

    `cost` (tokens) and `images` (something hashable for each) are what an engine is chosen by, and `sequences` is the
    number of its answers; they are not sent.
    """

    path: str
    body: bytes
    request_id: str
    headers: Mapping[str, str] = field(default_factory=dict)
    cost: int = 0
    images: tuple[Hashable, ...] = ()
    sequences: int = 1


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What an engine says that it takes.

    Args:
        context: None if it does not say.
        max_sequences: answers that it works on at a time; infinite if it does not say.
    """

    context: ContextLength | None = None
    max_sequences: float = math.inf


class EventSource(Protocol):
    """The events of one streamed answer. Closing it, at any time, makes the engine abort the request."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        """The data of each event, `[DONE]` included.

        Raises:
            EngineFailedError: the engine broke off.
        """

    async def aclose(self) -> None: ...


class HttpEngineClient:
    """An engine behind HTTP.

    Args:
        transport: how its bytes travel; tests pass their own.
        base_url: "http://host:port"; any host will do on a unix socket.
    """

    def __init__(self, transport: httpx.AsyncBaseTransport, base_url: str = "http://engine") -> None:
        self._http = httpx.AsyncClient(transport=transport, base_url=base_url, timeout=_ANSWER_TIMEOUT, trust_env=False)
        self.limits = EngineLimits()
        """As of the last time that the geometry was requested."""
        self.boot_id = ""
        """Likewise. Each run of an engine has another one."""

    @classmethod
    def at(cls, url: str) -> HttpEngineClient:
        """The engine at "http://host:port", "https://..." or "unix:/path/to/socket".

        Raises:
            ValueError: any other URL. The sentence does not repeat a password.
        """
        url = url.strip()
        if url.startswith("unix:/"):
            path = url.removeprefix("unix:")
            if len(path.encode()) > _LONGEST_SOCKET_PATH:
                raise ValueError(
                    f"the path of an engine's socket has at most {_LONGEST_SOCKET_PATH} bytes; got {path!r}"
                )
            return cls(EngineTransport(uds=path))
        try:
            parts = httpx.URL(url)
            is_address = parts.scheme in ("http", "https") and parts.host and (parts.port or 1) in range(1, 65536)
        except (httpx.InvalidURL, ValueError):
            is_address = False
        if not is_address or "," in url or any(map(str.isspace, url)):
            raise ValueError(f"an engine's URL is http://HOST:PORT or unix:/PATH; got {url!r}")
        path = parts.path.rstrip("/")
        if parts.userinfo or parts.query or parts.fragment or path.endswith("/v1"):
            root = f"{parts.scheme}://{parts.netloc.decode()}{path.removesuffix('/v1')}"
            raise ValueError(f"an engine's URL has no user, no query and no /v1: give {root}")
        ssl_context = httpx.create_ssl_context(trust_env=False) if parts.scheme == "https" else None
        return cls(EngineTransport(ssl_context=ssl_context), url.rstrip("/"))

    async def geometry(self) -> Geometry:
        """The model's sizes.

        Raises:
            EngineMismatchError: no VisionDrop in the engine, or one whose rule differs from ours.
        """
        response = await self._get(GEOMETRY_PATH)
        if response.status_code == 404:
            raise EngineMismatchError("the engine runs without the VisionDrop plugin")
        data = _json_object(response)
        found = data.get("geometry")
        found = found if isinstance(found, dict) else {}
        version = found.get("rule_version")
        if version != RULE_VERSION:
            raise EngineMismatchError(
                f"the engine (VisionDrop {data.get('plugin_version')}) has version {version} of the budget rule, "
                f"this gateway version {RULE_VERSION}: install the same release of visiondrop on both"
            )
        try:
            geometry = Geometry.from_dict(found)
        except (KeyError, TypeError, ValueError) as error:
            raise EngineMismatchError(f"the engine's geometry cannot be read: {error}") from None
        self.limits = _read_limits(data.get("limits"))
        self.boot_id = str(data.get("boot_id"))
        return geometry

    async def models(self) -> list[dict[str, Any]]:
        """The entries of the engine's own GET /v1/models."""
        return _objects(_json_object(await self._get("/v1/models")).get("data"))

    async def is_healthy(self) -> bool:
        try:
            return await self.probe_health() is True
        except EngineDrainingError:
            return False

    async def probe_health(self) -> bool | None:
        """What the engine reports of itself; None if it accepts the request and gives no usable answer.

        Raises:
            EngineDrainingError: it is being stopped.
        """
        try:
            response = await self._get("/health")
        except EngineUnreachableError:
            return False
        except GatewayError:
            return None
        if response.status_code != 200 and isinstance(error := _refusal(response), EngineDrainingError):
            raise error
        return response.status_code == 200

    async def complete(self, call: EngineCall) -> dict[str, Any]:
        """Ask for a whole answer: the engine's response body."""
        response = await self._post(call)
        try:
            await _read(response)
        finally:
            await response.aclose()
        answer = _json_object(response)
        check_complete(answer)
        if call.path in (paths.CHAT, paths.COMPLETIONS) and not answer.get("choices"):
            raise _unreadable()
        return answer

    async def open_stream(self, call: EngineCall) -> EventSource:
        """Ask for a streamed answer; returns once the engine has accepted the request."""
        response = await self._post(call)
        try:
            if response.status_code != 200:
                await _read(response)
                raise _refusal(response)
        except BaseException:
            await response.aclose()
            raise
        return _HttpEventSource(response)

    async def aclose(self) -> None:
        await self._http.aclose()

    async def _get(self, path: str) -> httpx.Response:
        return await self._send(self._http.build_request("GET", path, timeout=_PROBE_SECONDS), stream=False)

    async def metrics(self) -> bytes:
        """The engine's own metrics, in the text exposition format."""
        response = await self._get("/metrics")
        if response.status_code != 200:
            raise _refusal(response)
        return response.content

    async def _post(self, call: EngineCall) -> httpx.Response:
        headers = {**call.headers, "Content-Type": "application/json", "X-Request-Id": call.request_id}
        request = self._http.build_request("POST", call.path, content=call.body, headers=headers)
        response = await self._send(request, stream=True)
        response.request = httpx.Request("POST", request.url)  # lets go of the body, which may be megabytes
        return response

    async def _send(self, request: httpx.Request, *, stream: bool) -> httpx.Response:
        try:
            return await self._http.send(request, stream=stream)
        except (httpx.ConnectError, httpx.ConnectTimeout):
            raise EngineUnreachableError("the engine cannot be reached; try again later") from None
        except httpx.HTTPError as error:
            raise _broken_off(error) from None


class _HttpEventSource:
    def __init__(self, response: httpx.Response) -> None:
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        # Not httpx's aiter_lines: it also splits at U+2028 and the like, which stand unescaped in vLLM's JSON.
        rest = b""
        try:
            async for chunk in self._response.aiter_bytes():
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    if line.startswith(b"data:"):
                        yield line.removeprefix(b"data:").strip()
        except httpx.HTTPError as error:
            raise _broken_off(error) from None

    async def aclose(self) -> None:
        await self._response.aclose()


def _read_limits(found: object) -> EngineLimits:
    values = found if isinstance(found, Mapping) else {}
    max_model_len, max_chars, max_sequences = (
        value if isinstance(value, int) and value > 0 else None
        for value in (values.get(name) for name in ("max_model_len", "max_chars_per_token", "max_num_seqs"))
    )
    context = None if max_model_len is None else ContextLength(max_model_len, max_chars)
    return EngineLimits(context, max_sequences or math.inf)


def _broken_off(error: httpx.HTTPError) -> EngineFailedError:
    return EngineFailedError(f"the engine broke off ({type(error).__name__})", code="engine_failed")


async def _read(response: httpx.Response) -> None:
    try:
        await response.aread()
    except httpx.HTTPError as error:
        raise _broken_off(error) from None


def read_object(data: bytes) -> dict[str, Any]:
    """What an engine sent, which must be a JSON object.

    Raises:
        EngineFailedError: it is something else.
    """
    read = _read_json(data)
    if not isinstance(read, dict):
        raise _unreadable()
    return read


def _read_json(data: bytes) -> Any:
    """None if it is no JSON, or if it would not be when it is written again, although Python reads it."""
    try:
        read = _DECODER.decode(data.decode())
        if b"\\u" in data:  # perhaps one half of a surrogate pair, which no text has
            json.dumps(read, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    return read


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits} is too large")
    return number


_DECODER: Final = json.JSONDecoder(parse_float=_finite, parse_constant=_refuse_constant)
"""Made once: `json.loads` would make one for every event of a stream."""


def _unreadable() -> EngineFailedError:
    return EngineFailedError("the engine's answer cannot be read", code="engine_failed")


def _json_object(response: httpx.Response) -> dict[str, Any]:
    if response.status_code != 200:
        raise _refusal(response)
    return read_object(response.content)


def _refusal(response: httpx.Response) -> GatewayError:
    """The error for an answer other than 200: the client's fault is passed on, the engine's is not explained."""
    wait = response.headers.get("Retry-After", "")
    # Digits alone: the header's other form is a date, which depends on clocks.
    seconds = float(wait[:9]) if wait.isascii() and wait.isdecimal() else None
    return error_from_engine(response.status_code, _read_json(response.content), seconds)


def error_from_engine(status: int, body: object, retry_after_seconds: float | None = None) -> GatewayError:
    """Turn the engine's error object (`{"error": {...}}`, or the inner object alone) into ours.

    401 and 403 are between gateway and engine, not the client's fault. 503 is vLLM's word for a full queue, unless our
    plugin says that the engine is being stopped (vd_plugin/drain.py).
    """
    error = body.get("error", body) if isinstance(body, Mapping) else {}
    error = error if isinstance(error, Mapping) else {}
    if status == 503 and error.get("type") == DRAINING:
        return EngineDrainingError("the engine is shutting down; try again later")
    if status == 503:
        overload = OverloadedError("the engine is overloaded; try again later", reason="engine_overloaded")
        if retry_after_seconds is not None:  # vLLM does not say
            overload.retry_after_seconds = retry_after_seconds
        return overload
    if not 400 <= status < 500 or status in (401, 403):
        return EngineFailedError(f"the engine failed (HTTP status {status})", code="engine_failed")
    message = _without_traceback(str(error.get("message") or f"the engine refused the request (HTTP status {status})"))
    if status == 404 and error.get("param") == "model":
        return UnknownModelError(message, param="model", code="model_not_found")
    param, code = error.get("param"), error.get("type")
    return RelayedError(
        status,
        message,
        param=param if isinstance(param, str) else None,
        code=code if isinstance(code, str) else None,
    )


def check_complete(answer: Mapping[str, Any]) -> None:
    """Look at the choices of an answer, or of one of its events.

    Raises:
        EngineFailedError: they cannot be read, or one was cut off. A vLLM that is stopped may end with `abort` what
            runs or has just come, and that would pass for an answer.
    """
    if any(choice.get("finish_reason") == "abort" for choice in choices_of(answer)):
        raise EngineFailedError("the engine was stopped before the answer was complete", code="engine_failed")


def choices_of(answer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The choices of an answer, or of one of its events; none if it has none.

    Raises:
        EngineFailedError: they cannot be read.
    """
    return _objects(answer.get("choices") or [])


def _objects(items: Any) -> list[dict[str, Any]]:
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise _unreadable()
    return items


def _without_traceback(message: str) -> str:
    if "Traceback (most recent call last)" in message:
        message = message.strip().splitlines()[-1]
    return message[:_LONGEST_MESSAGE]
