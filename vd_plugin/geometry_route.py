"""Entry point `vllm.endpoint_plugins`: GET /visiondrop/geometry, from which a gateway learns how the engine counts.

With it come the engine's boot id, which each run of an engine has of its own, and its limits: the context length, the
characters that a token has at most (by which vLLM itself refuses texts before it tokenizes them), and how many
sequences run at a time.

vLLM loads it when `VLLM_PLUGINS` names `visiondrop`.
"""

from __future__ import annotations

import multiprocessing
from argparse import Namespace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import psutil
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
                "boot_id": boot_id(),
                "limits": _read_limits(engine_client),
            }


def boot_id() -> str:
    """The same in all API servers of an engine, which are children of one process if they are several."""
    parent = multiprocessing.parent_process()
    process = psutil.Process(None if parent is None else parent.pid)
    return f"{process.pid}-{process.create_time()}"


def _read_limits(engine_client: EngineClient) -> dict[str, int | None]:
    """What a gateway need not send, and need not keep waiting. None: not known."""
    config, tokenizer = engine_client.vllm_config, engine_client.renderer.tokenizer
    return {
        "max_model_len": engine_client.model_config.max_model_len,
        "max_chars_per_token": None if tokenizer is None else tokenizer.max_chars_per_token,
        "max_num_seqs": config.scheduler_config.max_num_seqs * config.parallel_config.data_parallel_size,
    }
