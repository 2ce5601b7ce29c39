"""Where later stages find their rows, and which graph they name, in steps that vLLM replays in pieces."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import BatchDescriptor, ForwardContext, get_forward_context, override_forward_context

from vd_plugin.stage_graphs import StageGraphs

MAX_ROWS, WIDTH = 32, 3


class Segment:
    """Notes what it is called with; adds one."""

    def __init__(self) -> None:
        self.calls: list[tuple[CUDAGraphMode, int | None, int, int, int]] = []

    def __call__(self, positions: Tensor, stream: Tensor) -> Tensor:
        context = get_forward_context()
        named = context.batch_descriptor and context.batch_descriptor.num_tokens
        self.calls.append((context.cudagraph_runtime_mode, named, len(stream), positions.data_ptr(), stream.data_ptr()))
        return stream + positions.unsqueeze(-1)


@pytest.fixture
def graphs() -> StageGraphs:
    return StageGraphs(torch.zeros(2, 64, dtype=torch.int64), MAX_ROWS, WIDTH, torch.float32)


@pytest.fixture
def context() -> Iterator[ForwardContext]:
    made = ForwardContext(no_compile_layers={}, attn_metadata={}, slot_mapping={}, batch_descriptor=BatchDescriptor(0))
    with override_forward_context(made):
        yield made


def ask(context: ForwardContext, mode: CUDAGraphMode, num_tokens: int) -> None:
    context.cudagraph_runtime_mode, context.batch_descriptor = mode, BatchDescriptor(num_tokens)


def recorded(graphs: StageGraphs, context: ForwardContext, segment: Segment) -> None:
    for size in (16, 8, 32):
        ask(context, CUDAGraphMode.PIECEWISE, size)
        graphs.run(1, segment, graphs.positions[0, :size], torch.zeros(size, WIDTH), pruned=False)


def test_pieces_always_read_where_they_were_recorded(graphs: StageGraphs, context: ForwardContext) -> None:
    segment = Segment()
    recorded(graphs, context, segment)
    for rows, mode in ((8, CUDAGraphMode.PIECEWISE), (20, CUDAGraphMode.NONE), (3, CUDAGraphMode.PIECEWISE)):
        ask(context, mode, 48)
        positions, stream = graphs.positions[0, :rows], torch.randn(rows, WIDTH)
        positions += 5
        found = graphs.run(1, segment, positions, stream, pruned=True)
        torch.testing.assert_close(found, stream + positions.unsqueeze(-1))
        assert (context.cudagraph_runtime_mode, context.batch_descriptor) == (mode, BatchDescriptor(48))
    assert [call[:3] for call in segment.calls] == [
        (CUDAGraphMode.PIECEWISE, size, size) for size in (16, 8, 32, 8, 32, 8)
    ]
    assert len({call[3:] for call in segment.calls}) == 1


def test_too_many_rows_run_without_graphs(graphs: StageGraphs, context: ForwardContext) -> None:
    """Even if vLLM has chosen one for the tokens of the step, which are others."""
    segment = Segment()
    recorded(graphs, context, segment)
    ask(context, CUDAGraphMode.PIECEWISE, 32)
    stream = torch.randn(MAX_ROWS + 1, WIDTH)
    graphs.run(1, segment, graphs.positions[0, : len(stream)], stream, pruned=True)
    assert segment.calls[-1][0] == CUDAGraphMode.NONE
    assert segment.calls[-1][4] == stream.data_ptr()


@pytest.mark.parametrize("pruned", [True, False])
def test_without_graphs_nothing_is_copied(graphs: StageGraphs, context: ForwardContext, pruned: bool) -> None:
    segment = Segment()
    ask(context, CUDAGraphMode.NONE, 4)
    positions, stream = graphs.positions[0, :4], torch.randn(4, WIDTH)
    graphs.run(1, segment, positions, stream, pruned=pruned)
    assert segment.calls == [(CUDAGraphMode.NONE, 4, 4, positions.data_ptr(), stream.data_ptr())]


def test_stages_have_rooms_of_their_own(graphs: StageGraphs, context: ForwardContext) -> None:
    segment = Segment()
    recorded(graphs, context, segment)
    ask(context, CUDAGraphMode.NONE, 48)
    for stage in (1, 2):
        graphs.run(stage, segment, graphs.positions[stage - 1, :8], torch.full((8, WIDTH), float(stage)), pruned=True)
    assert graphs.streams[:, :8].unique(dim=-1).squeeze(-1).tolist() == [[1.0] * 8, [2.0] * 8]
    assert segment.calls[-1][3:] == (graphs.positions[1].data_ptr(), graphs.streams[1].data_ptr())


def test_what_vllm_asked_for_returns_after_a_failure(graphs: StageGraphs, context: ForwardContext) -> None:
    recorded(graphs, context, Segment())
    ask(context, CUDAGraphMode.NONE, 48)

    def fail(positions: Tensor, stream: Tensor) -> Tensor:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        graphs.run(1, fail, graphs.positions[0, :4], torch.zeros(4, WIDTH), pruned=True)
    assert (context.cudagraph_runtime_mode, context.batch_descriptor) == (CUDAGraphMode.NONE, BatchDescriptor(48))
