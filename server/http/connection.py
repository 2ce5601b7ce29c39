"""Guards every connection against clients that are slow, by accident or on purpose; uvicorn itself waits for ever.

    connected --header_seconds--> headers --body_seconds--> body --> answer, its bytes taken within send_seconds

A body must also keep coming, at `min_upload_bytes_per_second`: one that stalls holds memory that others need.

A request that is late gets a 408 with OpenAI's error object, one that is not HTTP a 400, and the app sees a disconnect.
A connection on which nothing was ever sent is closed silently. Between requests uvicorn's keep-alive time holds.

When there are as many connections as there may be, a newcomer takes the place of one whose client is owed no answer: it
has not sent a request's headers, or has all of its answer, as those who are refused before their body is read. Of
these, the network with the most has to give up its oldest.

Built on uvicorn's h11 protocol, not on the httptools one: h11 comes with uvicorn, bounds the size of headers, and tells
at any moment which part of a request is awaited. That costs about 20 us for each event of a stream, and 1.5 ms for 1 MB
of a body.
"""

from __future__ import annotations

import asyncio
import re
import sys
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, ClassVar, Final, Self

import h11
from starlette.types import Scope
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle
from uvicorn.server import ServerState

from server.admission.party import network_of
from server.context import context_of
from server.errors import GatewayError, InvalidRequestError, OverloadedError, SlowRequestError, error_event, error_json
from server.settings import Settings
from server.telemetry.record import choose_request_id

MAX_HEADER_BYTES: Final = 64 * 1024
"""Method, target, and all names and values of headers together, without what separates them; also what has come so far
of headers, a chunk's size line or trailers that are not complete."""

_ABSOLUTE_TARGET: Final = re.compile(rb"https?://[^/?]*", re.IGNORECASE)

_UPLOAD_SECONDS: Final = 10.0
"""The rate of a body is looked at so often: longer than a lost packet or a phone's change of cells interrupts it."""

_LINGER_SECONDS: Final = 2.0
"""After a refusal the rest of the request is taken in and thrown away: a reset would cost the client the answer."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Times in seconds; see the settings of the same names."""

    header_seconds: float
    body_seconds: float
    send_seconds: float
    max_connections: int
    min_upload_bytes_per_second: int = 0

    @classmethod
    def of(cls, settings: Settings, max_connections: int) -> Self:
        return cls(
            settings.header_seconds,
            settings.body_seconds,
            settings.send_seconds,
            max_connections,
            settings.min_upload_bytes_per_second,
        )


class _Phase(Enum):
    """What a connection is waiting for."""

    REQUEST = auto()
    HEADERS = auto()
    BODY = auto()
    ANSWER = auto()


class ConnectionGuard(H11Protocol):
    """One connection. Use `guard_connections` for the class that a server makes its connections of."""

    limits: ClassVar[ConnectionLimits]
    evictable: ClassVar[dict[str, dict[ConnectionGuard, None]]]
    """By the client's network, connections that can make room for newcomers, the first to become so first."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.conn = _StrictConnection(h11.SERVER, MAX_HEADER_BYTES)
        self._phase = (_Phase.REQUEST, self.cycle)
        self._deadline: asyncio.TimerHandle | None = None
        self._send_watch: asyncio.TimerHandle | None = None
        self._upload_watch: asyncio.TimerHandle | None = None
        self._num_received = 0
        self._is_refused = False
        self._network = ""

    # What the transport calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        # Writing pauses as soon as the kernel takes no more: only then is the client known to be slow.
        transport.set_write_buffer_limits(high=0)
        self._network = network_of(self.client[0]) if self.client else ""
        self._arm(self.limits.header_seconds)
        self._update_evictable()
        if len(self.connections) > self.limits.max_connections:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        self._arm(None)
        self._watch_sending(None)
        self._watch_upload(is_on=False)
        self._leave_evictable()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        self._num_received += len(data)
        super().data_received(data)
        self._follow()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_sending(self.transport.get_write_buffer_size())
        self._update_evictable()

    def resume_writing(self) -> None:
        self._watch_sending(None)
        super().resume_writing()
        self._update_evictable()

    # What uvicorn calls

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._follow()

    def send_400_response(self, msg: str) -> None:
        error = sys.exception()  # called while h11's complaint is handled
        if isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431:
            sentence = f"the request's headers are larger than {MAX_HEADER_BYTES} bytes"
            self._refuse(InvalidRequestError(sentence, code="headers_too_large"), status=431)
        elif isinstance(error, _TwoLengthsError):
            sentence = "the request has both Content-Length and Transfer-Encoding; send one of them"
            self._refuse(InvalidRequestError(sentence, code="invalid_http"))
        else:
            self._refuse(InvalidRequestError("the request is not valid HTTP/1.1", code="invalid_http"))

    def shutdown(self) -> None:
        if self.cycle is None or self.cycle.response_complete or self._is_refused:
            self.transport.close()
        else:
            self.cycle.keep_alive = False

    # What the server calls

    def cut_off(self, error: GatewayError) -> None:
        """End the answer that is under way, with `error` where it can still be sent."""
        if self.cycle is None or self.cycle.response_complete or self._is_refused:
            return
        if self.cycle.response_started and context_of(_scope(self.cycle)).sends_events:
            self._write(h11.Data(error_event(error)), h11.EndOfMessage())
            self._disconnect_app(error)
            self.transport.close()
        else:
            self._refuse(error)

    # Time

    def _follow(self) -> None:
        """Set the deadline of what is awaited now, if that is something else than before."""
        self._update_evictable()
        if self._is_refused or self.transport.is_closing():
            return
        state = self.conn.their_state
        if state is h11.IDLE:
            phase = _Phase.HEADERS if self.conn.trailing_data[0] else _Phase.REQUEST
        else:
            phase = _Phase.BODY if state is h11.SEND_BODY else _Phase.ANSWER
        if (phase, self.cycle) == self._phase:
            return
        # A connection's first deadline begins before its first byte.
        is_first = self.cycle is None and phase is _Phase.HEADERS
        self._phase = (phase, self.cycle)
        self._watch_upload(is_on=phase is _Phase.BODY)
        if not is_first:
            seconds = {_Phase.HEADERS: self.limits.header_seconds, _Phase.BODY: self.limits.body_seconds}
            self._arm(seconds.get(phase))

    def _arm(self, seconds: float | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if seconds is None else self.loop.call_later(seconds, self._end_late)

    def _end_late(self) -> None:
        phase, _ = self._phase
        if phase is _Phase.REQUEST:
            self.transport.close()
            return
        part, seconds = ("headers", self.limits.header_seconds)
        if phase is _Phase.BODY:
            part, seconds = ("body", self.limits.body_seconds)
        sentence = f"the request's {part} did not arrive within {seconds:g} s"
        self._refuse(SlowRequestError(sentence, code="request_timeout"))

    def _watch_upload(self, *, is_on: bool) -> None:
        """End a body that comes too slowly. A client that is not read from, since the app is late, cannot send."""
        if self._upload_watch is not None:
            self._upload_watch.cancel()
            self._upload_watch = None
        rate, num_before = self.limits.min_upload_bytes_per_second, self._num_received
        if not is_on or not rate:
            return

        def probe() -> None:
            if self._num_received - num_before >= rate * _UPLOAD_SECONDS or self.flow.read_paused:
                self._watch_upload(is_on=True)
                return
            sentence = f"the request's body came at less than {rate} bytes a second for {_UPLOAD_SECONDS:g} s"
            self._refuse(SlowRequestError(sentence, code="request_timeout"))

        self._upload_watch = self.loop.call_later(_UPLOAD_SECONDS, probe)

    def _watch_sending(self, num_unsent: int | None, blocked_seconds: float = 0.0) -> None:
        """Abort when the client takes no byte for too long. `num_unsent` None: nothing is left to watch."""
        if self._send_watch is not None:
            self._send_watch.cancel()
            self._send_watch = None
        if num_unsent is None:
            return
        seconds = self.limits.send_seconds / 4

        def probe() -> None:
            now_unsent = self.transport.get_write_buffer_size()
            blocked = 0.0 if now_unsent < num_unsent else blocked_seconds + seconds
            if blocked >= self.limits.send_seconds:
                self._send_watch = None
                self.transport.abort()  # close() would wait for the client to take the rest
            else:
                self._watch_sending(now_unsent, blocked)

        self._send_watch = self.loop.call_later(seconds, probe)

    # Room

    def _update_evictable(self) -> None:
        """To those that can make room, or to those that are kept."""
        is_owed = self.cycle is not None and not self.cycle.response_complete and not self._is_refused
        has_unsent = self._send_watch is not None
        if is_owed or has_unsent or self.transport.is_closing():
            self._leave_evictable()
        else:
            self.evictable.setdefault(self._network, {}).setdefault(self)

    def _leave_evictable(self) -> None:
        others = self.evictable.get(self._network, {})
        others.pop(self, None)
        if not others:
            self.evictable.pop(self._network, None)

    def _make_room(self) -> None:
        crowd = max(self.evictable.values(), key=len)
        oldest = next(iter(crowd))
        if oldest is not self:
            oldest._leave_evictable()
            oldest.transport.abort()
            return
        sentence = "the server has as many connections as it can hold; try again"
        error = OverloadedError(sentence, reason="queue_full", code="too_many_connections")
        self._refuse(error, linger=False)

    # Ends

    def _refuse(self, error: GatewayError, status: int | None = None, *, linger: bool = True) -> None:
        """Close the connection, with an error object if no answer has been begun; the app sees a disconnect."""
        if self._is_refused or self.transport.is_closing():
            return
        can_answer = self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE)
        self._is_refused = True
        self._unset_keepalive_if_required()
        request_id = self._request_id()
        self._disconnect_app(error)
        if not can_answer:
            self.transport.abort()
            return
        self._write(*_answer(error, status or error.status, self.server_state.default_headers, request_id))
        if linger and self.transport.can_write_eof():
            self.transport.write_eof()
            self.flow.resume_reading()
            self._deadline_to_close()
        else:
            self.transport.close()
        self._update_evictable()

    def _deadline_to_close(self) -> None:
        self._arm(None)
        self._deadline = self.loop.call_later(_LINGER_SECONDS, self.transport.abort)

    def _request_id(self) -> str:
        """That of the request which is under way, so that the client's answer and the log name the same one."""
        if self.cycle is None or self.cycle.response_complete:
            return choose_request_id(None)
        return context_of(_scope(self.cycle)).request_id

    def _disconnect_app(self, error: GatewayError) -> None:
        """As when the connection is lost: what the app still sends goes nowhere. It is left a note of the reason."""
        if self.cycle is not None and not self.cycle.response_complete:
            context_of(_scope(self.cycle)).refusal = error
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.flow.resume_writing()

    def _write(self, *events: h11.Event) -> None:
        self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))


def guard_connections(limits: ConnectionLimits) -> type[ConnectionGuard]:
    """The class of one server's connections."""
    return type("GuardedConnection", (ConnectionGuard,), {"limits": limits, "evictable": {}})


class _TwoLengthsError(h11.RemoteProtocolError):
    """A proxy might read another length out of it, and take the rest for the next client's request."""


class _StrictConnection(h11.Connection):
    """What h11 leaves to its users.

    It bounds headers that are incomplete; those that come whole can be larger. It prefers Transfer-Encoding to
    Content-Length. It hands on targets as they came; the path of an absolute one is what all others are
    (RFC 9112, 3.2.2). It does not accept a body in the answer to HEAD.
    """

    _is_head = False

    def start_next_cycle(self) -> None:
        super().start_next_cycle()
        self._is_head = False

    def send_with_data_passthrough(self, event: h11.Event) -> list[bytes] | None:  # what `send` is made of
        return [] if self._is_head and isinstance(event, h11.Data) else super().send_with_data_passthrough(event)

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._is_head = event.method == b"HEAD"
            size = len(event.method) + len(event.target) + sum(len(name) + len(value) for name, value in event.headers)
            if size > MAX_HEADER_BYTES:
                raise h11.RemoteProtocolError("headers too large", error_status_hint=431)
            if {b"content-length", b"transfer-encoding"} <= {name for name, _ in event.headers}:
                raise _TwoLengthsError("two lengths")
            if absolute := _ABSOLUTE_TARGET.match(event.target):
                path = event.target[absolute.end() :]
                target = path if path.startswith(b"/") else b"/" + path
                return h11.Request(
                    method=event.method, target=target, headers=event.headers, http_version=event.http_version
                )
        return event


def _answer(
    error: GatewayError, status: int, headers: list[tuple[bytes, bytes]], request_id: str
) -> tuple[h11.Event, ...]:
    body = error_json(error)
    own = {
        **error.headers(),
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Connection": "close",
        "X-Request-Id": request_id,
    }
    lines = headers + [(name.encode(), value.encode()) for name, value in own.items()]
    return h11.Response(status_code=status, headers=lines), h11.Data(body), h11.EndOfMessage()


def _scope(cycle: RequestResponseCycle) -> Scope:
    return cycle.scope  # type: ignore[return-value]  # uvicorn's type is closed
