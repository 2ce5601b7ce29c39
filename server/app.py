"""The gateway as an ASGI app: its parts put together, one error handler."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from server.admission.drain import Drain
from server.admission.keys import ApiKeys
from server.admission.memory import MemoryBudget
from server.admission.queue import Admission
from server.admission.rates import RateLimits
from server.api import openapi
from server.api.count import count_routes
from server.api.generate import generating_routes
from server.api.intake import Intake
from server.api.models import model_routes
from server.api.operations import metric_routes, probe_routes
from server.api.plan import Planner
from server.api.tokens import token_routes
from server.context import context_of
from server.engine.dispatch import Dispatcher
from server.engine.pool import EnginePool
from server.errors import GatewayError, error_response, from_http_status
from server.http.browser import BrowserMiddleware
from server.http.middleware import AccessMiddleware, HeadMiddleware, RecordingMiddleware
from server.images.fetch import ImageFetcher
from server.images.load import ImageLoader
from server.settings import Settings
from server.telemetry.metrics import Metrics
from server.telemetry.tracing import Tracing, make_tracing
from server.version import package_version


def create_app(
    settings: Settings,
    engines: EnginePool,
    drain: Drain | None = None,
    *,
    fetcher: ImageFetcher | None = None,
    tracing: Tracing | None = None,
    num_dropped_lines: Callable[[], int] = lambda: 0,
) -> FastAPI:
    """The app that serves the engines of a pool to clients. It closes the pool when it shuts down.

    Args:
        fetcher, tracing: made from the settings if they are not given.
        num_dropped_lines: of the log, for a metric.

    Raises:
        ValueError: the file of API keys cannot be used, or packages for tracing are missing.
    """
    drain = drain or Drain()
    keys, rates = ApiKeys.from_settings(settings), RateLimits(settings)
    admission = Admission(settings, engines)
    engines.on_capacity_change = admission.update
    fetcher = fetcher or ImageFetcher(settings)
    memory = MemoryBudget(settings.max_buffered_bytes)
    intake, dispatcher = Intake(settings, drain, rates, memory), Dispatcher(engines, admission)
    planner = Planner(settings, engines, ImageLoader(settings, fetcher), rates)
    tracing = tracing or make_tracing(settings)
    metrics = Metrics(keys.names if settings.key_metrics else ())
    metrics.watch_queue(lambda: admission.queue_depth, settings.max_queued_requests)
    metrics.watch_inflight(lambda: admission.inflight_cost, lambda: engines.capacity)
    metrics.watch_memory(lambda: memory.leased_bytes, memory.limit_bytes)
    metrics.watch_log(num_dropped_lines)
    for name in engines.names:
        metrics.watch_engine(name, partial(engines.is_up, name), partial(engines.outstanding_cost, name))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watch = asyncio.create_task(engines.run())
        try:
            yield
        finally:
            watch.cancel()
            with suppress(asyncio.CancelledError):
                await watch
            await fetcher.aclose()
            await engines.aclose()
            tracing.close()

    app = FastAPI(
        title="VisionDrop",
        version=package_version(),
        lifespan=lifespan,
        redirect_slashes=False,
        openapi_url=None,  # requests are read by hand, so the generated document would be wrong
    )
    app.include_router(generating_routes(intake, planner, dispatcher))
    app.include_router(count_routes(intake, planner))
    app.include_router(token_routes(settings, intake, engines))
    openapi.add_route(app)
    app.include_router(model_routes(settings, engines))
    app.include_router(probe_routes(engines, drain))
    operations = metric_routes(engines, metrics)
    if settings.metrics_port is None:
        app.include_router(operations)
    _handle_errors(app)
    app.add_middleware(HeadMiddleware)
    app.add_middleware(AccessMiddleware, keys=keys)
    app.add_middleware(RecordingMiddleware, metrics=metrics, tracing=tracing)
    if settings.allowed_origins:
        app.add_middleware(BrowserMiddleware, origins=settings.allowed_origins, exposed_headers=tuple(openapi.HEADERS))

    app.state.keys = keys
    app.state.metrics_app = metrics_app = FastAPI(openapi_url=None, redirect_slashes=False)
    metrics_app.include_router(operations)
    metrics_app.include_router(probe_routes(engines, drain))
    _handle_errors(metrics_app)
    metrics_app.add_middleware(HeadMiddleware)
    metrics_app.add_middleware(RecordingMiddleware, metrics=metrics, tracing=tracing)
    return app


def metrics_app_of(app: FastAPI) -> FastAPI:
    """The app for a port of the operator's own: metrics and probes of `app`, without keys."""
    metrics_app = app.state.metrics_app
    assert isinstance(metrics_app, FastAPI)
    return metrics_app


def keys_of(app: FastAPI) -> ApiKeys:
    """The keys that requests to `app` need."""
    keys = app.state.keys
    assert isinstance(keys, ApiKeys)
    return keys


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(GatewayError)
    async def handle_error(request: Request, error: GatewayError) -> Response:
        context_of(request.scope).record.mark_failure(error)
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def handle_framework_error(request: Request, error: HTTPException) -> Response:
        ours = from_http_status(error.status_code, error.detail, request.method, request.url.path)
        response = await handle_error(request, ours)
        response.headers.update(error.headers or {})
        if response.headers.get("allow") == "GET":
            response.headers["allow"] = "GET, HEAD"
        return response
