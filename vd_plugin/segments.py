"""A decoder's layers, cut into one module a stage, each of which vLLM compiles by itself (docs/decisions/0016).

Pruning stands between them, outside of what is compiled: its shapes follow from requests. It scores an image with the
next layer's queries and keys, so the cut is behind that layer's projections. They are made once, for all rows, and go
on with those rows that stay as they are.

vLLM compiles once and drops all guards (`vllm/compilation/wrapper.py`), so a tensor that is absent in one step and
there in the next would run the wrong code in silence: whatever a segment takes, it always takes.

Where the engine compiles nothing, a segment is a loop over its layers.

Upstream: `vllm/model_executor/models/llama.py`, whose model loop this replaces; `gemma4.py`, which cuts its decoder
into two parts (vLLM 0.32).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice, pairwise
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig


class Segment(nn.Module):
    """The first layers of a Llama-shaped decoder, and the projections of the layer that follows them."""

    def __init__(self, *, layers: nn.ModuleList, following: Any, norm: Any, vllm_config: VllmConfig) -> None:
        """Take layers, and the layer that follows them; behind the last one none does, but the decoder's norm."""
        super().__init__()
        self.layers = layers
        self.following = following
        self.norm = norm

    def forward(self, positions: Tensor, stream: Tensor) -> Any:
        """(N,) int64 positions, (N, D) embeddings -> what `_run` returns. May write into the embeddings."""
        return self._run(positions, stream, None, self.layers)

    def _run(self, positions: Tensor, hidden: Tensor, residual: Tensor | None, layers: Iterable[Any]) -> Any:
        """(N, D) residual stream behind the layers and (N, W) projections of the following one, neither rotated nor
        split; behind the last layer the (N, D) normed stream alone."""
        for layer in layers:
            hidden, residual = layer(positions, hidden, residual)
        if self.following is None:
            norm: Any = self.norm
            return norm(hidden, residual)[0]
        following: Any = self.following
        hidden, residual = following.input_layernorm(hidden, residual)
        return residual, following.self_attn.qkv_proj(hidden)[0]


class LaterSegment(Segment):
    """Layers of which the first has been projected."""

    def forward(self, positions: Tensor, stream: Tensor, qkv: Tensor) -> Any:  # type: ignore[override]
        """(N,) int64 positions, (N, D) residual stream, (N, W) projections -> what `_run` returns.

        May write into stream and projections.
        """
        layer: Any = self.layers[0]
        attention = layer.self_attn
        query, key, value = qkv.split([attention.q_size, attention.kv_size, attention.kv_size], dim=-1)
        query, key = attention.rotary_emb(positions, query, key)
        hidden, _ = attention.o_proj(attention.attn(query, key, value))
        hidden, residual = layer.post_attention_layernorm(hidden, stream)
        return self._run(positions, layer.mlp(hidden), residual, islice(self.layers, 1, None))


def cut(decoder: Any, edges: Sequence[int], vllm_config: VllmConfig) -> list[Segment]:
    """Segments of a decoder (`layers`, `norm`), layers edges[k]..edges[k + 1] each."""
    segments = []
    for first, end in pairwise(edges):
        name = f"layers_{first}_{end}"
        is_last = end == edges[-1]
        with set_model_tag(name):
            segment = _compilable(LaterSegment if first else Segment, name)(
                layers=decoder.layers[first:end],
                following=None if is_last else decoder.layers[end],
                norm=decoder.norm if is_last else None,
                vllm_config=vllm_config,
            )
        segments.append(segment)
    return segments


def _compilable(base: type[Segment], name: str) -> type[Segment]:
    """A subclass that vLLM compiles.

    vLLM finds compiled code of an earlier start by the qualified name of `forward` and the engine's settings, among
    which boundaries are not (`_model_hash_key` in `vllm/compilation/decorators.py`), and torch by its code object. So
    each cut has both of its own: another segment's code would run with the wrong layers.
    """
    stock: Any = base.forward
    qualified = f"{base.__qualname__}.{name}"
    code = stock.__code__.replace(co_name=name, co_qualname=qualified)
    forward = FunctionType(code, stock.__globals__, name, stock.__defaults__, stock.__closure__)
    forward.__qualname__ = qualified
    forward.__annotations__ = stock.__annotations__
    cls = type(f"{base.__name__}_{name}", (base,), {"forward": forward})
    rows = dict.fromkeys(code.co_varnames[1 : code.co_argcount], 0)
    compilable: type[Segment] = support_torch_compile(dynamic_arg_dims=rows)(cls)
    return compilable
