"""The gateway before a fake engine, in one event loop, with nothing but the transport between them replaced."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from asgi_transport import AsgiTransport
from fake_engine import FakeEngine
from gateway import make_app, write_keys

from server.settings import Settings

KEYS = """
[keys.shop]
secret = "shop-secret"
max_budget = "low"
images_per_minute = 3

[keys.lab]
secret = "lab-secret"
requests_per_minute = 2
"""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def settings() -> Settings:
    return Settings()


@pytest.fixture
async def client(engine: FakeEngine, settings: Settings, anyio_backend: str) -> AsyncIterator[httpx.AsyncClient]:
    app = make_app(settings, engine)
    async with httpx.AsyncClient(transport=AsgiTransport(app), base_url="http://gateway") as http:
        yield http


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A key file of a key with a small budget and few images, and one of few requests."""
    return write_keys(tmp_path, KEYS)
