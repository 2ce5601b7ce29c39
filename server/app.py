"""The gateway as an ASGI app: five routes, one error handler."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from server.chat import ChatHandler
from server.drain import Drain
from server.engine_pool import EnginePool
from server.errors import EngineUnreachableError, GatewayError, from_http_status
from server.metrics import CHAT_ROUTE, Metrics
from server.recording import RecordingMiddleware, record_of
from server.settings import Settings
from server.version import package_version
from vd_plugin.schedule import FULL, MIN_BUDGET, PRESETS


def create_app(settings: Settings, engine: EnginePool, drain: Drain | None = None) -> FastAPI:
    """The app that serves the engines of a pool to clients. It closes the pool when it shuts down."""
    metrics = Metrics()
    chat = ChatHandler(settings, engine)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await engine.aclose()

    app = FastAPI(
        title="VisionDrop",
        version=package_version(),
        lifespan=lifespan,
        redirect_slashes=False,
        openapi_url=None,  # the chat request is read by hand, so the generated page would be wrong
    )

    @app.post(CHAT_ROUTE)
    async def chat_completions(request: Request) -> Response:
        return await chat.handle(request, record_of(request))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model_card(entry, settings) for entry in await engine.models()]}

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """The process lives; says nothing about the engine."""
        return {"status": "ok", "version": package_version()}

    @app.get("/ready")
    async def ready() -> dict[str, Any]:
        """The engine answers, and counts as we do."""
        if not await engine.is_ready():
            raise EngineUnreachableError("the engine does not answer", code="engine_unreachable")
        await engine.geometry()
        return {"status": "ready"}

    @app.get("/metrics")
    async def render_metrics() -> Response:
        metrics.engine_up.set(await engine.is_ready())
        return Response(metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    @app.exception_handler(GatewayError)
    async def handle_error(request: Request, error: GatewayError) -> Response:
        record_of(request).mark_failure(error.status, error.message)
        return JSONResponse(error.body(), error.status)

    @app.exception_handler(HTTPException)
    async def handle_framework_error(request: Request, error: HTTPException) -> Response:
        ours = from_http_status(error.status_code, error.detail, request.method, request.url.path)
        response = await handle_error(request, ours)
        response.headers.update(error.headers or {})
        return response

    routes = (CHAT_ROUTE, "/v1/models", "/health", "/ready", "/metrics")
    app.add_middleware(RecordingMiddleware, metrics=metrics, routes=routes)
    return app


def _model_card(entry: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """The engine's entry without its file paths, and with the budgets that a request may choose from."""
    public = ("id", "object", "created", "owned_by", "max_model_len")
    return {
        **{name: entry[name] for name in public if name in entry},
        "visual_token_budget": {
            "default": settings.default_budget,
            "minimum": MIN_BUDGET,
            "presets": {**PRESETS, FULL: FULL},
        },
    }
