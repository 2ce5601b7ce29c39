"""What clients send to a server in an ordinary minute: every budget class, every route, and some mistakes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import httpx
from engines import draw
from images import data_url, encode

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
BUDGETS = ("low", "medium", "high", "full")


@dataclass(slots=True)
class Tally:
    """What came back."""

    statuses: Counter[int] = field(default_factory=Counter)
    visual_tokens: Counter[str] = field(default_factory=Counter)
    """Sums of `usage.visual_tokens`: images, full, kept, saved."""

    def count(self, status: int, usage: Any) -> None:
        self.statuses[status] += 1
        for name in ("images", "full", "kept", "saved") if usage else ():
            self.visual_tokens[name] += usage["visual_tokens"][name]


class Traffic:
    """Requests of two clients: `key` may do all it likes, `limited_key` one request a minute."""

    def __init__(self, url: str, key: str, limited_key: str, image_url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=120, headers={"Authorization": f"Bearer {key}"})
        self._limited = {"Authorization": f"Bearer {limited_key}"}
        self._model = self._client.get("/v1/models").json()["data"][0]["id"]
        self._image_url = image_url
        self.tally = Tally()

    def round(self, number: int) -> None:
        """One request of each kind; `number` changes the images, every other one is sent twice."""
        url = data_url(encode(draw(672, 672, seed=number // 2)))
        for budget in BUDGETS:
            self.chat(url, budget, stream=bool(number % 2))
        self.chat(self._image_url, "low", stream=False)
        self.chat(None, None, stream=True)
        self.post(COMPLETIONS, prompt="one two three", max_tokens=4)
        self.post(RESPONSES, input="one two three", max_output_tokens=4)
        self.post("/tokenize", prompt="one two three")
        self.post(CHAT, messages=[], max_tokens=4)
        self.post(CHAT, messages=[_user(None)], max_tokens=4, headers={"Authorization": "Bearer a-guess"})
        self.post(CHAT, messages=[_user(None)], max_tokens=4, headers=self._limited)
        self.post("/v1/visual_tokens/count", messages=[_user(url)])

    def flood(self, number: int) -> None:
        """Many streams at once: some wait, some are turned away."""
        url = data_url(encode(draw(672, 672, seed=1000)))
        with ThreadPoolExecutor(number) as pool:
            list(pool.map(lambda _: self.chat(url, "full", stream=True), range(number)))

    def chat(self, image_url: str | None, budget: str | None, *, stream: bool) -> None:
        extra = {"visual_token_budget": budget} if budget else {}
        options = {"stream_options": {"include_usage": True}} if stream else {}
        self.post(CHAT, messages=[_user(image_url)], max_tokens=6, stream=stream, **extra, **options)

    def post(self, path: str, headers: dict[str, str] | None = None, **fields: Any) -> None:
        response = self._client.post(path, json={"model": self._model, **fields}, headers=headers)
        usage = None
        if response.status_code == 200 and path == CHAT:
            usage = _last_usage(response.text) if fields.get("stream") else response.json()["usage"]
        self.tally.count(response.status_code, usage)

    def close(self) -> None:
        self._client.close()


@contextmanager
def image_host(body: bytes) -> Iterator[str]:
    """An HTTP server on loopback that answers with this PNG; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "image/png")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        log_message: Callable[..., None] = lambda *_: None  # type: ignore[assignment]

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/image.png"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _user(image_url: str | None) -> dict[str, Any]:
    if image_url is None:
        return {"role": "user", "content": "What is this?"}
    parts = [{"type": "image_url", "image_url": {"url": image_url}}, {"type": "text", "text": "What is this?"}]
    return {"role": "user", "content": parts}


def _last_usage(events: str) -> Any:
    chunks = [json.loads(line[6:]) for line in events.splitlines() if line.startswith("data: {")]
    return chunks[-1].get("usage")
