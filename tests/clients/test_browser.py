"""A page of another origin asks the gateway from within a browser, which enforces what the gateway allows.

In jsdom, which has a browser's rules for XMLHttpRequest, and in Chromium where that is installed.
"""

from __future__ import annotations

import json
import queue
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from images import ask, image
from served_gateway import serve

KEY = "a-key-for-pages"
SCRIPT = Path(__file__).parent / "js" / "page.js"
READABLE = {
    *("x-request-id", "x-visual-token-budget", "x-visual-tokens-full"),
    *("x-visual-tokens-kept", "x-visual-tokens-saved"),
}

Open = Callable[[str], Sequence[str]]


@pytest.fixture(params=["jsdom", "chromium"])
def open_page(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """The command that opens a URL."""
    if request.param == "jsdom":
        folder = request.getfixturevalue("node_folder")
        return lambda url: ["node", str(folder / "jsdom.mjs"), url]
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("Chromium is not installed")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={tmp_path}"]
    return lambda url: [program, *options, url]


class Site:
    """A web server with one page; `reports` are what the page sends back."""

    def __init__(self) -> None:
        self.order: dict[str, Any] = {}
        self.reports: queue.Queue[dict[str, Any]] = queue.Queue()
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                order = json.dumps(site.order).replace("<", "\\u003c")
                page = f"<!doctype html><script id=order type=application/json>{order}</script>"
                self.reply(f"{page}<script>{SCRIPT.read_text()}</script>".encode())

            def do_POST(self) -> None:
                site.reports.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.reply(b"")

            def reply(self, body: bytes) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    yield site
    site.server.shutdown()
    site.server.server_close()


@contextmanager
def opened(command: Sequence[str]) -> Iterator[None]:
    process = subprocess.Popen(command)
    try:
        yield
    finally:
        process.terminate()
        process.wait(10)


def test_page_of_an_allowed_origin_can_use_the_server_and_no_other_page(open_page: Open, site: Site) -> None:
    with serve(api_key=KEY, allowed_origins=f"http://127.0.0.1:{site.port}") as gateway:
        site.order = {"url": gateway.url, "key": KEY, "question": ask(image(800, 600))}
        with opened(open_page(f"http://127.0.0.1:{site.port}/")):
            report = site.reports.get(timeout=60)
        assert report["answer"]["status"] == 200
        assert json.loads(report["answer"]["body"])["usage"]["visual_tokens"]["kept"] <= 160
        assert set(report["answer"]["names"]) >= READABLE
        assert report["refusal"]["status"] == 401, "a page can tell a wrong key from a server that is away"
        assert json.loads(report["refusal"]["body"])["error"]["code"] == "invalid_api_key"
        assert report["health"]["status"] == 200

        with opened(open_page(f"http://localhost:{site.port}/")):
            report = site.reports.get(timeout=60)
        assert {name: (part["status"], part["body"]) for name, part in report.items()} == dict.fromkeys(
            ("answer", "refusal", "health"), (0, "")
        )
