"""The gateway's app over fake engines, with nothing but the transport between them replaced."""

from __future__ import annotations

from typing import Any

from asgi_transport import AsgiTransport
from fastapi import FastAPI

from server.admission.drain import Drain
from server.app import create_app
from server.engine.client import HttpEngineClient
from server.engine.pool import EnginePool
from server.settings import Settings


def make_app(settings: Settings, *engines: Any, drain: Drain | None = None, **seams: Any) -> FastAPI:
    """`engines` are ASGI apps or finished clients, named "0", "1", ...; `seams` are those of create_app."""
    clients = [
        item if isinstance(item, HttpEngineClient) else HttpEngineClient(AsgiTransport(item)) for item in engines
    ]
    pool = EnginePool({str(number): client for number, client in enumerate(clients)}, settings)
    return create_app(settings, pool, drain, **seams)
