"""The fake engine as a process of its own, with the behaviours that clients need to see.

A request chooses by what it says: tools are called, "slowly" never gets to the end of its stream, an unknown model is
refused as vLLM refuses it. GET /seen tells what has reached the engine: `python client_engine.py SOCKET SECONDS`.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import uvicorn
from fake_engine import MODEL, WORDS, FakeEngine

TOOL_ARGUMENTS = '{"city": "Paris"}'


class ClientEngine(FakeEngine):
    """Args: answer_seconds: how long each answer takes."""

    def __init__(self, answer_seconds: float) -> None:
        super().__init__()
        self._answer_seconds = answer_seconds
        self._seen = {"requests": 0, "abandoned": 0}

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] == "/seen":
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": json.dumps(self._seen).encode()})
            return
        try:
            await super().__call__(scope, receive, send)
        except ConnectionResetError:
            self._seen["abandoned"] += 1
        finally:
            # It runs for thousands of requests.
            self.calls.clear()
            self.request_ids.clear()
            self.headers.clear()

    async def _chat(self, body: dict[str, Any], receive: Any, reply: Any) -> None:
        self._seen["requests"] += 1
        await asyncio.sleep(self._answer_seconds)
        last = body["messages"][-1]
        if body.get("model") not in (None, MODEL):
            message = f"The model `{body['model']}` does not exist."
            error = {"message": message, "type": "NotFoundError", "param": "model", "code": 404}
            await reply.json(404, {"error": error})
        elif body.get("tools") and last["role"] == "user":
            await self._call_tool(body, reply)
        elif body.get("stream") and "slowly" in json.dumps(last["content"]):
            await reply.start(200, "text/event-stream")
            await reply.event(_chunk({"role": "assistant", "content": WORDS[0]}))
            await self._hold(receive)
        else:
            await super()._chat(body, receive, reply)

    async def _call_tool(self, body: dict[str, Any], reply: Any) -> None:
        """Streamed, the arguments come in two halves, as they do from a model."""
        function = {"name": body["tools"][0]["function"]["name"], "arguments": TOOL_ARGUMENTS}
        call: dict[str, Any] = {"id": "call-1", "type": "function", "function": function}
        usage = self._usage(body)
        if not body.get("stream"):
            message = {"role": "assistant", "content": None, "tool_calls": [call]}
            choice = {"index": 0, "finish_reason": "tool_calls", "message": message}
            head = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": MODEL}
            await reply.json(200, {**head, "choices": [choice], "usage": usage})
            return
        first, second = TOOL_ARGUMENTS[:8], TOOL_ARGUMENTS[8:]
        call["function"]["arguments"] = first
        await reply.start(200, "text/event-stream")
        await reply.event(_chunk({"role": "assistant", "tool_calls": [{"index": 0, **call}]}))
        await reply.event(_chunk({"tool_calls": [{"index": 0, "function": {"arguments": second}}]}))
        await reply.event(_chunk({}, finish_reason="tool_calls"))
        await reply.event({**_chunk({}), "choices": [], "usage": usage})
        await reply.event("[DONE]")
        await reply.end()


def _chunk(delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
    return {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}


if __name__ == "__main__":
    path, seconds = sys.argv[1:]
    uvicorn.run(ClientEngine(float(seconds)), uds=path, log_level="warning")
