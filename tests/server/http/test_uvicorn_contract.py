"""What http/connection.py and http/server.py lean on in uvicorn: not its public interface, hence the narrow pin."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from uvicorn import Config, Server
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle
from uvicorn.server import ServerState

OVERRIDDEN = {
    H11Protocol.__init__: ["self", "config", "server_state", "app_state", "_loop"],
    H11Protocol.connection_made: ["self", "transport"],
    H11Protocol.connection_lost: ["self", "exc"],
    H11Protocol.data_received: ["self", "data"],
    H11Protocol.pause_writing: ["self"],
    H11Protocol.resume_writing: ["self"],
    H11Protocol.on_response_complete: ["self"],
    H11Protocol.send_400_response: ["self", "msg"],
    H11Protocol.shutdown: ["self"],
    H11Protocol._unset_keepalive_if_required: ["self"],
    Server.shutdown: ["self", "sockets"],
    Server.capture_signals: ["self"],
}
"""Method -> its parameters; all but the last of H11Protocol are replaced or extended."""

CONNECTION = ["app", "client", "conn", "connections", "cycle", "flow", "loop", "server_state", "transport"]
CYCLE = ["disconnected", "keep_alive", "message_event", "response_complete", "response_started", "scope"]


async def app(scope: Any, receive: Any, send: Any) -> None: ...


@pytest.mark.parametrize("method", OVERRIDDEN, ids=lambda method: method.__qualname__)
def test_a_method_has_these_parameters(method: Any) -> None:
    assert list(inspect.signature(method).parameters) == OVERRIDDEN[method]


@pytest.mark.anyio
async def test_a_connection_has_these_fields() -> None:
    connection = H11Protocol(Config(app), ServerState(), {})
    assert set(CONNECTION) <= set(vars(connection))


def test_a_request_has_these_fields() -> None:
    names = inspect.getclosurevars(RequestResponseCycle.__init__).unbound  # what it sets is among its attribute names
    assert set(CYCLE) <= names


def test_a_server_has_these_fields() -> None:
    server = Server(Config(app))
    assert not server.started
    assert not server.should_exit
    assert server.server_state.connections == set()
    assert server.server_state.default_headers == []


def test_a_bad_request_is_reported_while_h11s_complaint_is_handled() -> None:
    """`send_400_response` reads the complaint from the exception being handled."""
    source = inspect.getsource(H11Protocol.handle_events)
    assert "except h11.RemoteProtocolError" in source
    assert source.index("except h11.RemoteProtocolError") < source.index("self.send_400_response(msg)")
