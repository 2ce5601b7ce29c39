"""VisionDrop for vLLM: LLaVA-NeXT and LLaVA-1.5 whose visual tokens are pruned to a budget chosen by each request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vd_plugin.options import engine_args

__all__ = ["engine_args"]


def __getattr__(name: str) -> Any:
    """Import late: the gateway takes `vd_plugin.schedule` from here and must get nothing else along with it."""
    if name == "engine_args":
        from vd_plugin.options import engine_args

        return engine_args
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
