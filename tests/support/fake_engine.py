"""An engine without a model: vLLM's HTTP surface as far as the gateway uses it, as a small ASGI app.

It counts as the real one does: it decodes the images that it is sent and resolves the budgets of
`mm_processor_kwargs` with the project's arithmetic, so that a gateway that plans with other sizes is found out.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from io import BytesIO
from typing import Any

from PIL import Image

from vd_plugin.schedule import RULE_VERSION, DecoderShape, Geometry, resolve
from vd_plugin.wire import DRAINING

MODEL = "fake-llava"
WORDS = ("A ", "red\u2028", "square.")
TEXT_TOKENS = 10

GEOMETRY = Geometry(
    rule_version=RULE_VERSION,
    tile_size=336,
    patch_size=14,
    grid_pinpoints=((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)),
    boundaries=(8, 16, 24),
    decoder=DecoderShape(32, 4096, 11008, 32, 32, 128),
)

CANARY = {"prompt": [1], "max_tokens": 1, "temperature": 0}
"""What the gateway's monitor sends."""

_METRICS = """# HELP vllm:generation_tokens_total Number of generation tokens processed.
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{{engine="0",model_name="fake-llava"}} {tokens}.0
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{{engine="0",model_name="fake-llava"}} 100.0
# TYPE vllm:iteration_tokens_total histogram
vllm:iteration_tokens_total_count{{engine="0",model_name="fake-llava"}} {steps}.0
vllm:iteration_tokens_total_sum{{engine="0",model_name="fake-llava"}} {tokens}.0
# TYPE http_requests_total counter
http_requests_total{{handler="/v1/completions",method="POST",status="2xx"}} 7.0
"""


class FakeEngine:
    """Set its fields to make it misbehave; read `calls` and `closed` to see what reached it.

    `calls` are the paths and bodies of all that asked it for work, canaries excepted.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.num_canaries = 0
        self.num_refused = 0
        self.canary_refusal: tuple[int, Any] | None = None
        self.num_steps = 0
        self.steps_while_stalled = False
        self._getting_on = asyncio.Event()
        self._getting_on.set()
        self.request_ids: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.refusal: tuple[int, Any] | None = None
        self.break_after: int | None = None
        self.error_after: tuple[int, dict[str, Any]] | None = None
        self.end_after: int | None = None
        self.abort_after: int | None = None
        self.hold = False
        self.hold_before_answer = False
        self.asked = asyncio.Event()
        self.closed = asyncio.Event()
        self.is_up = True
        self.model = MODEL
        self.is_draining = False
        self.extra_image_tokens = 0
        self.reports_details = True
        self.misreport: Callable[[dict[str, Any]], Any] = lambda usage: usage
        self.decodes = True
        self.geometry: dict[str, Any] | None = {"geometry": GEOMETRY.to_dict(), "plugin_version": "0.1.0"}

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [body for _, body in self.calls]

    @property
    def _reason(self) -> str:
        """As vLLM may end what runs when it is stopped: as if nothing were amiss."""
        return "stop" if self.abort_after is None else "abort"

    @property
    def is_stalled(self) -> bool:
        """As when the core is stopped: requests are accepted and wait, /health stays 200, nothing gets on."""
        return not self._getting_on.is_set()

    @is_stalled.setter
    def is_stalled(self, value: bool) -> None:
        if value:
            self._getting_on.clear()
        else:
            self._getting_on.set()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while True:
                kind = (await receive())["type"].removeprefix("lifespan.")
                await send({"type": f"lifespan.{kind}.complete"})
                if kind == "shutdown":
                    return
        reply = _Reply(send)
        path = scope["path"]
        if self.is_draining and (path == "/health" or scope["method"] == "POST"):
            await _read(receive)
            self.num_refused += path != "/health"
            await reply.json(503, {"error": {"message": "the engine is shutting down", "type": DRAINING, "code": 503}})
        elif path == "/health":
            await reply.json(200 if self.is_up else 503, {})
        elif path == "/v1/models":
            data = [{"id": self.model, "object": "model", "root": "/secret"}]
            await reply.json(200, {"object": "list", "data": data})
        elif path == "/visiondrop/geometry":
            await reply.json(*((404, {"detail": "Not Found"}) if self.geometry is None else (200, self.geometry)))
        elif path == "/metrics":
            self.num_steps += self.steps_while_stalled
            await reply.text(200, _METRICS.format(steps=self.num_steps, tokens=4 * self.num_steps))
        else:
            work = {
                "/v1/chat/completions": self._chat,
                "/v1/completions": self._complete,
                "/v1/responses": self._respond,
                "/tokenize": self._tokenize,
                "/detokenize": self._detokenize,
            }[path]
            body = json.loads(await _read(receive))
            if body != CANARY:
                self.calls.append((path, body))
                self.headers.append({name.decode(): value.decode() for name, value in scope["headers"]})
                self.request_ids.append(self.headers[-1]["x-request-id"])
                self.asked.set()
                if self.hold_before_answer:
                    await self._hold(receive)
                if self.refusal is not None:
                    await reply.json(*self.refusal)
                    return
            await work(body, receive, reply)

    async def _chat(self, body: dict[str, Any], receive: Any, reply: _Reply) -> None:
        if not body.get("stream"):
            await self._step(receive)
        usage = self.misreport(self._usage(body))
        if not body.get("stream"):
            choice = {
                "index": 0,
                "finish_reason": self._reason,
                "message": {"role": "assistant", "content": "".join(WORDS)},
            }
            await reply.json(200, {**_head("chat.completion"), "choices": [choice], "usage": usage})
            return
        events: list[dict[str, Any]] = []
        for word in WORDS:
            delta = {"index": 0, "delta": {"content": word}, "finish_reason": None}
            events.append({**_head("chat.completion.chunk"), "choices": [delta]})
            if body["stream_options"].get("continuous_usage_stats"):
                events[-1]["usage"] = usage
        if await self._send_events(events, receive, reply):
            if body["stream_options"]["include_usage"]:
                await reply.event({**_head("chat.completion.chunk"), "choices": [], "usage": usage})
            await reply.event("[DONE]")
            await reply.end()

    async def _complete(self, body: dict[str, Any], receive: Any, reply: _Reply) -> None:
        if body == CANARY:
            self.num_canaries += 1
            if self.canary_refusal is not None:
                await reply.json(*self.canary_refusal)
                return
        if not body.get("stream"):
            await self._step(receive)
        details = {"cached_tokens": 0, "created_cache_tokens": None, "multimodal_tokens": None}
        usage = self.misreport(
            {"prompt_tokens": 4, "completion_tokens": 2, "total_tokens": 6, "prompt_tokens_details": details}
        )
        head = _head("text_completion")
        if not body.get("stream"):
            choices = [
                {"index": place, "text": "a b", "finish_reason": self._reason} for place in range(int(body.get("n", 1)))
            ]
            await reply.json(200, {**head, "choices": choices, "usage": usage})
            return
        choices = [{"index": 0, "text": word, "finish_reason": None} for word in ("a ", "b")]
        if await self._send_events([{**head, "choices": [choice]} for choice in choices], receive, reply):
            await reply.event({**head, "choices": [], "usage": usage})
            await reply.event("[DONE]")
            await reply.end()

    async def _respond(self, body: dict[str, Any], receive: Any, reply: _Reply) -> None:
        parts = [{"type": "output_text", "text": "".join(WORDS), "annotations": []}]
        whole = {
            "id": "resp_1",
            "object": "response",
            "created_at": 1,
            "model": MODEL,
            "status": "completed",
            "output": [{"type": "message", "id": "msg_1", "role": "assistant", "content": parts}],
            "usage": self.misreport(self._response_usage(body)),
        }
        if not body.get("stream"):
            await reply.json(200, whole)
            return
        events = [{"type": "response.created", "response": {**whole, "usage": None}}]
        events += [{"type": "response.output_text.delta", "delta": word} for word in WORDS]
        events += [{"type": "response.completed", "response": whole}]
        if await self._send_events(
            [{**event, "sequence_number": number} for number, event in enumerate(events)], receive, reply
        ):
            await reply.end()

    async def _send_events(self, events: list[dict[str, Any]], receive: Any, reply: _Reply) -> bool:
        """Begin a stream with these events, named by their types; False if a fault has ended it."""
        await reply.start(200, "text/event-stream")
        for number, event in enumerate(events):
            await self._step(receive)
            if self.break_after == number:
                raise ConnectionResetError("the fake engine breaks off")
            if self.error_after is not None and self.error_after[0] == number:
                await reply.event({"error": self.error_after[1]})
            if self.end_after == number or (self.error_after is not None and self.error_after[0] == number):
                await reply.end()
                return False
            if self.abort_after == number:
                event["choices"][0]["finish_reason"] = "abort"
            await reply.event(event, event.get("type"))
            if self.abort_after == number:
                return True
            if self.hold:
                await self._hold(receive)
        return True

    async def _tokenize(self, body: dict[str, Any], receive: Any, reply: _Reply) -> None:
        """A word is a token."""
        words = str(body["prompt"] if "prompt" in body else body["messages"]).split()
        strs = words if body.get("return_token_strs") else None
        answer = {"count": len(words), "max_model_len": 99, "tokens": list(range(len(words))), "token_strs": strs}
        await reply.json(200, answer)

    async def _detokenize(self, body: dict[str, Any], receive: Any, reply: _Reply) -> None:
        await reply.json(200, {"prompt": "word " * len(body["tokens"])})

    async def _step(self, receive: Any) -> None:
        """One step of the model; it does not end while the engine is stalled, unless the gateway goes away."""
        if self.is_stalled:
            getting_on, gone = asyncio.ensure_future(self._getting_on.wait()), asyncio.ensure_future(_gone(receive))
            try:
                await asyncio.wait((getting_on, gone), return_when=asyncio.FIRST_COMPLETED)
                if self.is_stalled:
                    self.closed.set()
                    raise ConnectionResetError("the gateway went away")
            finally:
                getting_on.cancel()
                gone.cancel()
                await asyncio.wait((getting_on, gone))
        self.num_steps += 1

    def _usage(self, body: dict[str, Any]) -> dict[str, Any]:
        if not self.decodes:
            return {"prompt_tokens": TEXT_TOKENS, "completion_tokens": len(WORDS), "total_tokens": 0}
        images = images_of(body)
        tokens = self.extra_image_tokens + _image_tokens(body, images)
        prompt = TEXT_TOKENS + tokens
        details = {"cached_tokens": 3, "multimodal_tokens": {"image": tokens} if images else None}
        return {
            "prompt_tokens": prompt,
            "completion_tokens": len(WORDS),
            "total_tokens": prompt + len(WORDS),
            **({"prompt_tokens_details": details} if self.reports_details else {}),
        }

    def _response_usage(self, body: dict[str, Any]) -> dict[str, Any]:
        """As vLLM counts here: images are in the sum, without a figure of their own."""
        tokens = TEXT_TOKENS + _image_tokens(body, images_of(body))
        details = {"cached_tokens": 2, "cache_write_tokens": 0}
        return {"input_tokens": tokens, "input_tokens_details": details, "output_tokens": 3, "total_tokens": tokens + 3}

    async def _hold(self, receive: Any) -> None:
        """Wait as a busy model would, and notice when nobody waits any more."""
        await _gone(receive)
        self.closed.set()
        raise ConnectionResetError("the gateway went away")


def images_of(body: dict[str, Any]) -> list[Image.Image]:
    """The images of a chat or responses request as vLLM would decode them."""
    turns = body["messages"] if "messages" in body else body["input"]
    parts = [
        part
        for turn in turns
        if isinstance(turn, dict) and isinstance(turn["content"], list)
        for part in turn["content"]
    ]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    urls += [part["image_url"] for part in parts if part["type"] == "input_image"]
    return [Image.open(BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]


def _image_tokens(body: dict[str, Any], images: list[Image.Image]) -> int:
    budgets = body.get("mm_processor_kwargs", {}).get("visual_token_budget", [])
    assert len(budgets) == len(images)
    return sum(
        resolve(GEOMETRY, image.height, image.width, budget).num_placeholders
        for image, budget in zip(images, budgets, strict=True)
    )


class _Reply:
    def __init__(self, send: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
        self._send = send

    async def start(self, status: int, kind: str) -> None:
        headers = [(b"content-type", kind.encode())]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def json(self, status: int, value: Any) -> None:
        await self.start(status, "application/json")
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def text(self, status: int, value: str) -> None:
        await self.start(status, "text/plain; version=0.0.4; charset=utf-8")
        await self._send({"type": "http.response.body", "body": value.encode(), "more_body": False})

    async def event(self, value: Any, name: str | None = None) -> None:
        data = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        text = f"data: {data}\n\n" if name is None else f"event: {name}\ndata: {data}\n\n"
        await self._send({"type": "http.response.body", "body": text.encode(), "more_body": True})

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


async def _gone(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _head(kind: str) -> dict[str, Any]:
    return {"id": "chatcmpl-1", "object": kind, "created": 1, "model": MODEL}


async def _read(receive: Any) -> bytes:
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            return body


async def sse_data(chunks: AsyncIterator[bytes]) -> list[str]:
    """The data of all events of a stream."""
    text = b"".join([chunk async for chunk in chunks]).decode()
    return [event.removeprefix("data: ") for event in text.split("\n\n") if event]
