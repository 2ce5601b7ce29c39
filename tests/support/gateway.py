"""The gateway's app over fake engines, with nothing but the transport between them replaced."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from asgi_transport import AsgiTransport
from fastapi import FastAPI

from server.admission.drain import Drain
from server.app import create_app
from server.engine.client import HttpEngineClient
from server.engine.pool import EnginePool
from server.images.fetch import ImageFetcher
from server.settings import Settings


def make_app(settings: Settings, *engines: Any, drain: Drain | None = None, **seams: Any) -> FastAPI:
    """`engines` are ASGI apps or finished clients, named "0", "1", ...; `seams` are those of create_app."""
    clients = [
        item if isinstance(item, HttpEngineClient) else HttpEngineClient(AsgiTransport(item)) for item in engines
    ]
    pool = EnginePool({str(number): client for number, client in enumerate(clients)}, settings)
    return create_app(settings, pool, drain, **seams)


@asynccontextmanager
async def gateway(
    *engines: Any, drain: Drain | None = None, fetches_locally: bool = False, **values: Any
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of `make_app`.

    Args:
        fetches_locally: addresses of this machine count as public, and `http:` is fetched.
        values: settings.
    """
    settings = Settings(**values, **({"fetch_http": True} if fetches_locally else {}))
    fetcher = ImageFetcher(settings, is_allowed=lambda _: True) if fetches_locally else None
    app = make_app(settings, *engines, drain=drain, fetcher=fetcher)
    async with httpx.AsyncClient(transport=AsgiTransport(app), base_url="http://gateway", timeout=60) as client:
        yield client


def assert_error(response: httpx.Response, status: int, param: str | None, *words: str) -> None:
    """The response is an error object with these words in its sentence."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    for word in words:
        assert word in error["message"]
    assert "Traceback" not in error["message"]
    assert response.headers["x-request-id"]


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def write_keys(folder: Path, text: str) -> Path:
    """A key file that nobody else can read."""
    path = folder / "keys.toml"
    path.write_text(text)
    path.chmod(0o600)
    return path
