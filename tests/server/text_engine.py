"""The fake engine with vLLM's routes for text: completions and tokens. A word is a token."""

from __future__ import annotations

import json
from typing import Any

from fake_engine import MODEL, FakeEngine, _read, _Reply


class TextEngine(FakeEngine):
    """`calls` are the paths and bodies of what reached it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, dict[str, Any]]] = []

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        path = scope.get("path")
        if path not in ("/v1/completions", "/tokenize", "/detokenize"):
            await super().__call__(scope, receive, send)
            return
        body = json.loads(await _read(receive))
        self.calls.append((path, body))
        self.asked.set()
        reply = _Reply(send)
        if self.refusal is not None:
            await reply.json(*self.refusal)
        elif path == "/tokenize":
            words = str(body["prompt"] if "prompt" in body else body["messages"]).split()
            strs = words if body.get("return_token_strs") else None
            answer = {"count": len(words), "max_model_len": 99, "tokens": list(range(len(words))), "token_strs": strs}
            await reply.json(200, answer)
        elif path == "/detokenize":
            await reply.json(200, {"prompt": "word " * len(body["tokens"])})
        else:
            await self._complete(body, receive, reply)

    async def _complete(self, body: dict[str, Any], receive: Any, reply: Any) -> None:
        if self.hold_before_answer:
            await self._hold(receive)
        head = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": MODEL}
        details = {"cached_tokens": 0, "created_cache_tokens": None, "multimodal_tokens": None}
        usage = {"prompt_tokens": 4, "completion_tokens": 2, "total_tokens": 6, "prompt_tokens_details": details}
        if not body.get("stream"):
            choices = [
                {"index": place, "text": "a b", "finish_reason": "stop"} for place in range(int(body.get("n", 1)))
            ]
            await reply.json(200, {**head, "choices": choices, "usage": usage})
            return
        await reply.start(200, "text/event-stream")
        for word in ("a ", "b"):
            await reply.event({**head, "choices": [{"index": 0, "text": word, "finish_reason": None}]})
            if self.hold:
                await self._hold(receive)
        await reply.event({**head, "choices": [], "usage": usage})
        await reply.event("[DONE]")
        await reply.end()
