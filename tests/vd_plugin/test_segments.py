"""A decoder cut into segments computes what its layers compute, and vLLM can tell the segments apart."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vllm.compilation.decorators import _model_hash_key
from vllm.config import VllmConfig
from vllm.config.compilation import CompilationMode

from vd_plugin.segments import Segment, cut

WIDTH = 8


class Projection(nn.Linear):
    def forward(self, rows: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]  # as vLLM's
        return super().forward(rows), None


class Attention(nn.Module):
    """Without attention: queries, keys and values are added up, rotated by their position."""

    q_size, kv_size = WIDTH, WIDTH // 2

    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj = Projection(WIDTH, 2 * WIDTH)
        self.o_proj = Projection(WIDTH, WIDTH)

    def rotary_emb(self, positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        scale = (1 + positions).unsqueeze(-1)
        return query * scale, key / scale

    def attn(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return query + torch.cat((key, value), dim=-1)

    def forward(self, positions: Tensor, hidden: Tensor) -> Tensor:
        query, key, value = self.qkv_proj(hidden)[0].split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        output: Tensor = self.o_proj(self.attn(*self.rotary_emb(positions, query, key), value))[0]
        return output


class Norm(nn.Module):
    """As vLLM's: with a residual, it normalises the sum and gives that back, too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH))

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            return hidden * self.weight
        return (hidden + residual) * self.weight, hidden + residual


class Layer(nn.Module):
    """Shaped as vLLM's Llama layers: the residual stream is split into what the last layer added and what was there."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(), Norm()
        self.self_attn, self.mlp = Attention(), nn.Linear(WIDTH, WIDTH)

    def forward(self, positions: Tensor, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if residual is None:
            residual, hidden = hidden, self.input_layernorm(hidden)
        else:
            hidden, residual = self.input_layernorm(hidden, residual)
        hidden, residual = self.post_attention_layernorm(self.self_attn(positions, hidden), residual)
        assert residual is not None
        return self.mlp(hidden), residual


@pytest.fixture
def decoder() -> Any:
    torch.manual_seed(0)
    return SimpleNamespace(layers=nn.ModuleList(Layer() for _ in range(8)), norm=Norm())


def segments(decoder: Any, *edges: int) -> list[Segment]:
    config = VllmConfig()
    config.compilation_config.mode = CompilationMode.NONE
    return cut(decoder, edges, config)


@pytest.mark.parametrize("edges", [(0, 8), (0, 2, 4, 6, 8), (0, 1, 2, 7, 8)], ids=str)
def test_segments_in_turn_compute_what_the_decoder_computes(decoder: Any, edges: tuple[int, ...]) -> None:
    positions, stream = torch.arange(5), torch.randn(5, WIDTH)
    hidden, residual = stream, None
    for layer in decoder.layers:
        hidden, residual = layer(positions, hidden, residual)
    expected, _ = decoder.norm(hidden, residual)
    first, *later = segments(decoder, *edges)
    found = first(positions, stream)
    for segment in later:
        found = segment(positions, *found)
    torch.testing.assert_close(found, expected)


def test_a_segment_projects_for_the_layer_that_follows(decoder: Any) -> None:
    positions, stream = torch.arange(5), torch.randn(5, WIDTH)
    first, _ = segments(decoder, 0, 3, 8)
    found, qkv = first(positions, stream)
    torch.testing.assert_close(qkv, decoder.layers[3].self_attn.qkv_proj(decoder.layers[3].input_layernorm(found))[0])


def test_compiled_code_is_kept_for_each_segment_and_each_way_to_cut(decoder: Any) -> None:
    """vLLM finds it by these keys on the next start, and torch by the code object within a process."""
    forwards = [
        segment.forward for edges in [(0, 2, 4, 6, 8), (0, 3, 4, 5, 8)] for segment in segments(decoder, *edges)
    ]
    assert len({_model_hash_key(forward) for forward in forwards}) == len(forwards)
    assert len({forward.__code__ for forward in forwards}) == len(forwards)
    again = segments(decoder, 0, 2, 4, 6, 8)[1].forward
    assert _model_hash_key(again) == _model_hash_key(forwards[1])


def test_segments_share_the_weights_of_the_decoder(decoder: Any) -> None:
    (segment, _) = segments(decoder, 0, 3, 8)
    assert [id(layer) for layer in segment.layers] == [id(layer) for layer in decoder.layers[:3]]
