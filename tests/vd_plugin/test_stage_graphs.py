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
    """Notes what it is called with; adds positions to the two other inputs, of which one is twice as wide."""

    def __init__(self) -> None:
        self.calls: list[tuple[CUDAGraphMode, int | None, int, tuple[int, ...]]] = []

    def __call__(self, positions: Tensor, stream: Tensor, qkv: Tensor) -> Tensor:
        context = get_forward_context()
        named = context.batch_descriptor and context.batch_descriptor.num_tokens
        assert len(positions) == len(stream) == len(qkv)
        places = tuple(each.data_ptr() for each in (positions, stream, qkv))
        self.calls.append((context.cudagraph_runtime_mode, named, len(stream), places))
        return torch.cat((stream, qkv), dim=-1) + positions.unsqueeze(-1)


def make_inputs(rows: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, WIDTH), torch.randn(rows, 2 * WIDTH)


@pytest.fixture
def graphs() -> StageGraphs:
    return StageGraphs(torch.zeros(2, 64, dtype=torch.int64), MAX_ROWS, (WIDTH, 2 * WIDTH), torch.float32)


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
        graphs.run(1, segment, graphs.positions[0, :size], make_inputs(size), pruned=False)


def test_pieces_always_read_where_they_were_recorded(graphs: StageGraphs, context: ForwardContext) -> None:
    segment = Segment()
    recorded(graphs, context, segment)
    for rows, mode in ((8, CUDAGraphMode.PIECEWISE), (20, CUDAGraphMode.NONE), (3, CUDAGraphMode.PIECEWISE)):
        ask(context, mode, 48)
        positions, inputs = graphs.positions[0, :rows], make_inputs(rows)
        positions += 5
        found = graphs.run(1, segment, positions, inputs, pruned=True)
        torch.testing.assert_close(found[:rows], torch.cat(inputs, dim=-1) + positions.unsqueeze(-1))
        assert (context.cudagraph_runtime_mode, context.batch_descriptor) == (mode, BatchDescriptor(48))
    assert [call[:3] for call in segment.calls] == [
        (CUDAGraphMode.PIECEWISE, size, size) for size in (16, 8, 32, 8, 32, 8)
    ]
    assert len({call[3] for call in segment.calls}) == 1


def test_too_many_rows_run_without_graphs(graphs: StageGraphs, context: ForwardContext) -> None:
    """Even if vLLM has chosen one for the tokens of the step, which are others."""
    segment = Segment()
    recorded(graphs, context, segment)
    ask(context, CUDAGraphMode.PIECEWISE, 32)
    inputs = make_inputs(MAX_ROWS + 1)
    graphs.run(1, segment, graphs.positions[0, : MAX_ROWS + 1], inputs, pruned=True)
    assert segment.calls[-1][0] == CUDAGraphMode.NONE
    assert segment.calls[-1][3][1:] == tuple(each.data_ptr() for each in inputs)


@pytest.mark.parametrize("pruned", [True, False])
def test_without_graphs_nothing_is_copied(graphs: StageGraphs, context: ForwardContext, pruned: bool) -> None:
    segment = Segment()
    ask(context, CUDAGraphMode.NONE, 4)
    positions, inputs = graphs.positions[0, :4], make_inputs(4)
    graphs.run(1, segment, positions, inputs, pruned=pruned)
    places = tuple(each.data_ptr() for each in (positions, *inputs))
    assert segment.calls == [(CUDAGraphMode.NONE, 4, 4, places)]


def test_stages_have_rooms_of_their_own(graphs: StageGraphs, context: ForwardContext) -> None:
    segment = Segment()
    recorded(graphs, context, segment)
    ask(context, CUDAGraphMode.NONE, 48)
    for stage in (1, 2):
        inputs = tuple(torch.full_like(each, stage) for each in make_inputs(8))
        graphs.run(stage, segment, graphs.positions[stage - 1, :8], inputs, pruned=True)
    for room in graphs.rooms:
        assert room[:, :8].unique(dim=-1).squeeze(-1).tolist() == [[1.0] * 8, [2.0] * 8]
    assert segment.calls[-1][3] == tuple(each[1].data_ptr() for each in (graphs.positions, *graphs.rooms))


def test_what_vllm_asked_for_returns_after_a_failure(graphs: StageGraphs, context: ForwardContext) -> None:
    recorded(graphs, context, Segment())
    ask(context, CUDAGraphMode.NONE, 48)

    def fail(*inputs: Tensor) -> Tensor:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        graphs.run(1, fail, graphs.positions[0, :4], make_inputs(4), pruned=True)
    assert (context.cudagraph_runtime_mode, context.batch_descriptor) == (CUDAGraphMode.NONE, BatchDescriptor(48))
