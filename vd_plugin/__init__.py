"""VisionDrop for vLLM: LLaVA-NeXT and LLaVA-1.5 whose visual tokens are pruned to a budget chosen by each request."""

from vd_plugin.options import engine_args

__all__ = ["engine_args"]
