"""A client's side of a connection, without a network: for servers in virtual time."""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from uvicorn.server import ServerState

from server.http.connection import ConnectionGuard


class ClientSide(asyncio.Transport):
    """What the client was sent, and whether the connection is over.

    Args:
        protocol: the class of the server's connections (`guard_connections`).
        num_writes_taken: what is written after them waits for the client for ever; None for no end.
    """

    def __init__(
        self,
        app: Any,
        protocol: type[ConnectionGuard],
        state: ServerState,
        address: str = "192.0.2.1",
        *,
        num_writes_taken: int | None = None,
    ) -> None:
        super().__init__({"peername": (address, 1), "sockname": ("192.0.2.9", 80)})
        self.sent = b""
        self.is_over = False
        self._num_writes_taken = num_writes_taken
        self._num_writes = self._num_unsent = 0
        config = uvicorn.Config(app, lifespan="off", log_config=None, log_level="error")
        self._connection = protocol(config, state, {})
        self._connection.connection_made(self)

    async def send(self, data: bytes, after_seconds: float = 0.0) -> None:
        await asyncio.sleep(after_seconds)
        if data:
            self._connection.data_received(data)
        for _ in range(5):
            await asyncio.sleep(0)

    def write(self, data: Any) -> None:
        self.sent += data
        self._num_writes += 1
        if data and self._num_writes_taken is not None and self._num_writes > self._num_writes_taken:
            self._num_unsent += len(data)
            self._connection.pause_writing()

    def get_write_buffer_size(self) -> int:
        return self._num_unsent

    def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        if not self.is_over:
            self.is_over = True
            asyncio.get_running_loop().call_soon(self._connection.connection_lost, None)

    def is_closing(self) -> bool:
        return self.is_over

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None: ...

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...
