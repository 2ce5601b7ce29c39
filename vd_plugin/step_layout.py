"""The layout of one step at every stage: which rows there are, at which positions, in which KV slots.

After an image has lost d rows at a stage, everything behind it lies d positions earlier there. Row counts follow from
schedules alone, so the host knows every length; positions and slots are computed on the device from the step's own.

Shapes: R requests of the step, T tokens before pruning, N rows at a stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from vd_plugin.spans import ImageSpan


@dataclass(frozen=True, slots=True)
class PrunedRequest:
    """A request whose step computes images that are pruned in the decoder."""

    req_id: str
    batch_index: int
    slot: int
    """Row of the request in per-request state."""
    num_computed: int
    """Its tokens that were computed before this step."""
    spans: tuple[ImageSpan, ...]
    """The images of this step."""


@dataclass(frozen=True, slots=True)
class ImageRows:
    """An image among the rows that enter a stage."""

    start: int
    """First row, counted over the whole step."""
    offset: int
    """First row, counted from the request's first row in the step."""
    span: ImageSpan


@dataclass(frozen=True, slots=True)
class RequestRows:
    """A request that a stage prunes: its rows as they enter the stage."""

    request: PrunedRequest
    start: int
    end: int
    """Behind its last image; text after it does not matter to the stage."""
    context: int
    """Rows of the request that are in the stage's KV cache, computed in earlier steps."""
    images: tuple[ImageRows, ...]


@dataclass(slots=True)
class StageRows:
    """One stage of a step that prunes. Host arrays are int32 and per request."""

    lengths: np.ndarray
    starts: np.ndarray
    """(R + 1,) cumulative lengths."""
    requests: tuple[RequestRows, ...]
    """What pruning at the beginning of this stage works on; rows are counted as they enter it."""

    @property
    def num_rows(self) -> int:
        return int(self.starts[-1])


@dataclass(slots=True)
class StepLayout:
    """What the decoder needs to run a step."""

    positions: list[Tensor]
    """For stages 1.., (N,) int64 each."""
    stages: list[StageRows] = field(default_factory=list)
    """For stages 1.., in steps that prune; empty in all others."""
    slot_mapping: dict[str, Tensor] = field(default_factory=dict)
    """Layer -> (N,) slots, in steps that prune."""
    block_tables: list[Tensor] = field(default_factory=list)
    """For stages 1.., the (R, blocks) table of the stage's first layer, in steps that prune."""
    logits_rows: Tensor | None = None
    """(T,) for each token before pruning a row of the last stage; its own wherever it was not pruned away."""

    def num_rows(self, stage: int) -> int:
        """Rows of the step at a stage, 0 included, without padding; in steps that prune."""
        assert self.logits_rows is not None
        return self.stages[stage - 1].num_rows if stage else len(self.logits_rows)


def plan_stages(
    lengths: np.ndarray, pruned: Sequence[PrunedRequest], drops: np.ndarray, num_stages: int
) -> list[StageRows]:
    """Rows of a step at stages 1..num_stages.

    Args:
        lengths: (R,) tokens of each request in this step, before pruning.
        pruned: requests of the step with images to prune, by batch index.
        drops: (num_stages, slots) rows that each request had lost at stages 1.. before this step.
    """
    stages: list[StageRows] = []
    starts = _cumulate(lengths)
    for stage in range(1, num_stages + 1):
        lengths = lengths.copy()
        requests = []
        for request in pruned:
            start = int(starts[request.batch_index])
            gone = 0
            images = []
            for span in request.spans:
                offset = span.offset - request.num_computed - gone
                if span.splits[stage - 1] is not None:
                    images.append(ImageRows(start + offset, offset, span))
                gone += span.dropped(stage - 1)
                lengths[request.batch_index] -= span.rows[stage - 1] - span.rows[stage]
            if images:
                end = images[-1].start + images[-1].span.rows[stage - 1]
                context = request.num_computed - int(drops[stage - 1, request.slot])
                requests.append(RequestRows(request, start, end, context, tuple(images)))
        starts = _cumulate(lengths)
        stages.append(StageRows(lengths, starts, tuple(requests)))
    return stages


def final_rows(lengths: np.ndarray, pruned: Sequence[PrunedRequest], last: StageRows, num_stages: int) -> np.ndarray:
    """(T,) row of the last stage for each token before pruning.

    An image's rows are right-aligned in its span, so that a prompt that ends with an image is continued from its last
    row. Tokens that were pruned away get the image's first row: nothing reads them.
    """
    starts = _cumulate(lengths)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    rows: np.ndarray = np.arange(starts[-1]) - starts[:-1][owner] + last.starts[:-1][owner]
    for request in pruned:
        base = int(starts[request.batch_index]) - request.num_computed
        end = int(starts[request.batch_index + 1])
        for span in request.spans:
            gone = span.dropped(num_stages)
            first = int(rows[base + span.offset])
            rows[base + span.offset : end] -= gone
            inside = slice(base + span.offset, base + span.end)
            rows[inside] = np.maximum(rows[inside], first)
    return rows


def _cumulate(lengths: np.ndarray) -> np.ndarray:
    starts = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=starts[1:])
    return starts
