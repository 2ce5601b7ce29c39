"""Entry point `vllm.endpoint_plugins`: GET /visiondrop/geometry, from which a gateway learns how the engine counts.

vLLM loads it when `VLLM_PLUGINS` names `visiondrop`.
"""

from __future__ import annotations

from argparse import Namespace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, HTTPException, Request

from vd_plugin.drain import DrainMiddleware
from vd_plugin.options import ARCHITECTURES, read_geometry
from vd_plugin.validation import check_server
from vd_plugin.wire import GEOMETRY_PATH

if TYPE_CHECKING:
    from starlette.datastructures import State
    from vllm.engine.protocol import EngineClient


class GeometryRoute:
    """vLLM's `EndpointPlugin` protocol."""

    name = "visiondrop"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.add_middleware(DrainMiddleware)

        @app.get(GEOMETRY_PATH)
        async def geometry(request: Request) -> dict[str, Any]:
            answer: dict[str, Any] | None = request.app.state.visiondrop_geometry
            if answer is None:
                raise HTTPException(404, "this engine runs a model without visual token budgets")
            return answer

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        state.visiondrop_geometry = None
        if engine_client is None:
            return
        hf_config = engine_client.model_config.hf_config
        if hf_config.architectures[0] in ARCHITECTURES.values():
            check_server(args)
            state.visiondrop_geometry = {
                "geometry": read_geometry(hf_config).to_dict(),
                "plugin_version": version("visiondrop"),
            }
