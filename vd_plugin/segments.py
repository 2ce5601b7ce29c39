"""A decoder's layers, cut into one module a stage, each of which vLLM compiles by itself (docs/decisions/0016).

Pruning stands between them, outside of what is compiled: its shapes follow from requests. Hence one tensor goes into a
segment and one comes out. vLLM compiles once and drops all guards (`vllm/compilation/wrapper.py`), so a residual that
is absent in one step and there in the next would run the wrong code in silence.

Where the engine compiles nothing, a segment is a loop over its layers.

Upstream: `vllm/model_executor/models/llama.py`, whose model loop this replaces; `gemma4.py`, which cuts its decoder in
the same way (vLLM 0.32).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig


class Segment(nn.Module):
    """Some consecutive layers of a Llama-shaped decoder, and the last norm behind the last of them."""

    def __init__(self, *, layers: nn.ModuleList, norm: nn.Module | None, vllm_config: VllmConfig) -> None:
        super().__init__()
        self.layers = layers
        self.norm = norm

    def forward(self, positions: Tensor, stream: Tensor) -> Tensor:
        """(N,) int64 positions and (N, D) residual stream -> (N, D): the stream behind the layers, or its norm.

        May write into `stream`, as vLLM's norms do.
        """
        hidden: Tensor = stream
        residual: Tensor | None = None
        for layer in self.layers:
            hidden, residual = layer(positions, hidden, residual)
        assert residual is not None
        if self.norm is None:
            return hidden + residual
        hidden, _ = self.norm(hidden, residual)
        return hidden


def cut(decoder: Any, edges: Sequence[int], vllm_config: VllmConfig) -> list[Segment]:
    """Segments of a decoder (`layers`, `norm`), layers edges[k]..edges[k + 1] each."""
    segments = []
    for first, end in pairwise(edges):
        name = f"layers_{first}_{end}"
        norm = decoder.norm if end == edges[-1] else None
        with set_model_tag(name):
            segment = _compilable(name)(layers=decoder.layers[first:end], norm=norm, vllm_config=vllm_config)
        segments.append(segment)
    return segments


def _compilable(name: str) -> type[Segment]:
    """A subclass of `Segment` that vLLM compiles.

    vLLM finds compiled code of an earlier start by the qualified name of `forward` and the engine's settings, among
    which boundaries are not (`_model_hash_key` in `vllm/compilation/decorators.py`), and torch by its code object. So
    each cut has both of its own: another segment's code would run with the wrong layers.
    """
    stock = Segment.forward
    qualified = f"{Segment.__qualname__}.{name}"
    code = stock.__code__.replace(co_name=name, co_qualname=qualified)
    forward = FunctionType(code, stock.__globals__, name, stock.__defaults__, stock.__closure__)
    forward.__qualname__ = qualified
    forward.__annotations__ = stock.__annotations__
    cls = type(f"{Segment.__name__}_{name}", (Segment,), {"forward": forward})
    compilable: type[Segment] = support_torch_compile(dynamic_arg_dims={"positions": 0, "stream": 0})(cls)
    return compilable
