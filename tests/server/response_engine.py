"""The fake engine with vLLM's /v1/responses."""

from __future__ import annotations

import base64
import json
from io import BytesIO
from typing import Any

from fake_engine import GEOMETRY, MODEL, WORDS, _read, _Reply
from PIL import Image
from text_engine import TextEngine

from vd_plugin.schedule import resolve


class ResponseEngine(TextEngine):
    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope.get("path") != "/v1/responses":
            await super().__call__(scope, receive, send)
            return
        body = json.loads(await _read(receive))
        self.calls.append((scope["path"], body))
        self.asked.set()
        reply = _Reply(send)
        if self.hold_before_answer:
            await self._hold(receive)
        if self.refusal is not None:
            await reply.json(*self.refusal)
            return
        parts = [{"type": "output_text", "text": "".join(WORDS), "annotations": []}]
        whole = {
            "id": "resp_1",
            "object": "response",
            "created_at": 1,
            "model": MODEL,
            "status": "completed",
            "output": [{"type": "message", "id": "msg_1", "role": "assistant", "content": parts}],
            "usage": response_usage(body),
        }
        if not body.get("stream"):
            await reply.json(200, whole)
            return
        await reply.start(200, "text/event-stream")
        events = [{"type": "response.created", "response": {**whole, "usage": None}}]
        events += [{"type": "response.output_text.delta", "delta": word} for word in WORDS]
        events += [{"type": "response.completed", "response": whole}]
        for number, event in enumerate(events):
            if self.break_after == number:
                raise ConnectionResetError("the fake engine breaks off")
            if self.error_after is not None and self.error_after[0] == number:
                await reply.event({"error": self.error_after[1]})
                break
            if self.end_after == number:
                break
            data = json.dumps({**event, "sequence_number": number})
            text = f"event: {event['type']}\ndata: {data}\n\n".encode()
            await send({"type": "http.response.body", "body": text, "more_body": True})
        await reply.end()


def response_usage(body: dict[str, Any]) -> dict[str, Any]:
    """As vLLM counts here: pictures are in the sum, without a figure of their own."""
    turns = body["input"] if isinstance(body["input"], list) else []
    parts = [part for turn in turns if isinstance(turn["content"], list) for part in turn["content"]]
    urls = [part["image_url"] for part in parts if part["type"] == "input_image"]
    budgets = body.get("mm_processor_kwargs", {}).get("visual_token_budget", [])
    assert len(urls) == len(budgets)
    pictures = [Image.open(BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]
    tokens = 10 + sum(
        resolve(GEOMETRY, item.height, item.width, budget).num_placeholders
        for item, budget in zip(pictures, budgets, strict=True)
    )
    details = {"cached_tokens": 2, "cache_write_tokens": 0}
    return {"input_tokens": tokens, "input_tokens_details": details, "output_tokens": 3, "total_tokens": tokens + 3}
