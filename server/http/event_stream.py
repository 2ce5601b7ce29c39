"""An answer as a stream of events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Final

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from server.context import RequestContext
from server.errors import ClientDisconnectedError
from server.http.disconnect import until_disconnect

# They keep proxies from holding events back.
_HEADERS: Final = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class EventStream(StreamingResponse):
    """Sends events as they come, and ends when the client goes away; the context then closes the engine's side."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        context: RequestContext,
        headers: Mapping[str, str],
    ) -> None:
        super().__init__(events, headers={**headers, **_HEADERS})
        self._events = events
        self._context = context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with aclosing(self._events):
                # Starlette itself notices a client that leaves only when it sends.
                await until_disconnect(receive, lambda: self.stream_response(send))
        except ClientDisconnectedError as error:
            self._context.record.mark_failure(error)
