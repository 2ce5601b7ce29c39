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


class Layer(nn.Module):
    """Shaped as vLLM's Llama layers: the residual stream is split into what the last layer added and what was there."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, positions: Tensor, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        residual = hidden if residual is None else hidden + residual
        return self.linear(residual) + positions.unsqueeze(-1), residual


class Norm(nn.Module):
    def forward(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * (hidden + residual), residual


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
    found = stream
    for segment in segments(decoder, *edges):
        found = segment(positions, found)
    torch.testing.assert_close(found, expected)


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
