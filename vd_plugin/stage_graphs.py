"""CUDA graphs of stages 1.. in steps that are not replayed as a whole: the pieces between attention, by number of rows.

vLLM records the pieces of every compiled module for some numbers of tokens, and replays what the forward context names.
It fills the inputs of the first segment; those of later ones must lie where they lay when the graph was recorded, so
they are copied there. In a step that prunes, each stage has fewer rows than the one before: it is padded to the next
number for which graphs exist, even if the whole step has too many tokens for one. Metadata and slots keep the true
rows; attention runs between the pieces and leaves the padding alone.

Upstream: `vllm/compilation/cuda_graph.py`, `vllm/v1/worker/gpu/cudagraph_utils.py`;
`vllm/model_executor/models/gemma4.py` does the same for one cut (vLLM 0.32).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import get_forward_context


class StageGraphs:
    def __init__(self, positions: Tensor, max_rows: int, widths: Sequence[int], dtype: torch.dtype) -> None:
        """Make room for the inputs of recorded graphs.

        Args:
            positions: (stages, T) int64, from which stages 1.. read their positions in every step.
            max_rows: of the largest graph; 0 if there are none.
            widths: of what else goes into a segment.
        """
        self.positions = positions
        self.rooms = [positions.new_zeros((len(positions), max_rows, width), dtype=dtype) for width in widths]
        self.recorded: list[int] = []
        """Numbers of rows for which graphs exist, ascending."""

    def run(
        self, stage: int, segment: Callable[..., Any], positions: Tensor, inputs: Sequence[Tensor], pruned: bool
    ) -> Any:
        """What `segment` makes of a stage's rows, by a graph where there is one; behind the rows there may be padding.

        Args:
            positions: (N,) int64, the stage's first ones of those that were given at the start.
            inputs: (N, width) each.
            pruned: whether the step prunes, so that N is another number than the one that vLLM has chosen graphs by.
        """
        context = get_forward_context()
        is_piecewise = context.cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE
        rows = len(positions)
        if not pruned:
            if not is_piecewise:
                return segment(positions, *inputs)
            if rows not in self.recorded:  # vLLM is recording them
                insort(self.recorded, rows)
            return segment(positions, *self._place(stage, inputs, rows))

        place = bisect_left(self.recorded, rows)
        size = self.recorded[place] if place < len(self.recorded) else None
        asked = context.cudagraph_runtime_mode, context.batch_descriptor
        assert context.batch_descriptor is not None
        try:
            if size is None:
                context.cudagraph_runtime_mode = CUDAGraphMode.NONE
                return segment(positions, *inputs)
            context.cudagraph_runtime_mode = CUDAGraphMode.PIECEWISE
            context.batch_descriptor = replace(context.batch_descriptor, num_tokens=size)
            return segment(self.positions[stage - 1, :size], *self._place(stage, inputs, size))
        finally:
            context.cudagraph_runtime_mode, context.batch_descriptor = asked

    def _place(self, stage: int, inputs: Sequence[Tensor], size: int) -> list[Tensor]:
        """Put inputs where graphs read them, `size` rows of each room."""
        for room, given in zip(self.rooms, inputs, strict=True):
            room[stage - 1, : len(given)] = given
        return [room[stage - 1, :size] for room in self.rooms]
