"""What an operator asks: does the process live, is it ready, what does it count."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from server import paths
from server.admission.drain import Drain
from server.engine.pool import EnginePool
from server.errors import OverloadedError, UnknownRouteError
from server.telemetry.metrics import Metrics
from server.version import package_version


def probe_routes(engines: EnginePool, drain: Drain) -> APIRouter:
    """GET /health and GET /ready."""
    router = APIRouter()

    @router.get(paths.HEALTH)
    async def health() -> dict[str, Any]:
        """The process lives; reports nothing about the engine."""
        return {"status": "ok", "version": package_version()}

    @router.get(paths.READY)
    async def ready() -> dict[str, Any]:
        """New requests are welcome: an engine answers, makes progress, and counts as we do."""
        if drain.is_stopping:
            raise OverloadedError("the server is stopping", reason="stopping")
        if not await engines.is_ready():
            raise engines.refusal()
        return {"status": "ready"}

    return router


def metric_routes(engines: EnginePool, metrics: Metrics) -> APIRouter:
    """GET /metrics, ours; GET /metrics/engine/NAME, vLLM's own, for engines that only the gateway can reach.

    GET /metrics/engines lists the names, in the form of Prometheus' HTTP service discovery.
    """
    router = APIRouter()

    @router.get(paths.METRICS)
    async def gateway_metrics() -> Response:
        """The gateway's metrics."""
        return Response(metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    @router.get(paths.ENGINES)
    async def engine_targets() -> list[dict[str, Any]]:
        """The engines by name; Prometheus' configuration makes an address and a path of each."""
        return [{"targets": list(engines.names), "labels": {}}]

    @router.get(paths.ENGINE_METRICS)
    async def engine_metrics(engine: str) -> Response:
        """The metrics of one engine, as vLLM names them."""
        if engine not in engines.names:
            raise UnknownRouteError(
                f"there is no engine {engine!r}; engines: {', '.join(engines.names)}", code="unknown_url"
            )
        return Response(await engines.metrics(engine), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return router
