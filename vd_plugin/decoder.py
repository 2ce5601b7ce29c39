"""Stages 1..: prune the images of a step between two layers of the decoder, and run the layers of every stage.

VisionDrop, arXiv 2506.22283, sections 3.2 and 3.3. After a boundary, an image's rows of the residual stream are scored
with the NEXT layer's norm, projections and rotary embedding. The segment before has projected all rows; only what rows
were merged into is projected again. The sequence that they are scored in is the one that the next stage sees up to the
image: what precedes the image is already pruned, its keys lie in the next layer's KV cache or in this step. Hence a
result that depends on nothing after the image, on no neighbour, and on no cut between steps.

Upstream: `vllm/model_executor/models/llama.py`, whose model loop this replaces (vLLM 0.32).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import async_tensor_h2d

from vd_plugin.image_batches import ImageKeys, StageImages, Wave, batch_images, portions
from vd_plugin.key_reader import KeyReader
from vd_plugin.schedule import TokenSplit
from vd_plugin.segments import Segment
from vd_plugin.selection import Plan, apply, attention_received, images_at_once, select
from vd_plugin.spans import ImageSpan
from vd_plugin.stage_graphs import StageGraphs
from vd_plugin.step_layout import PrunedRequest, RequestRows, StepLayout, plan_stages
from vd_plugin.tensor_parallel import mean_over_ranks

_POOL_ELEMENTS = 1 << 26
"""Keys of requests that are pruned together: 16,384 of Vicuna-7B, 128 MiB. Contexts may be long, and requests many."""

_LEAST_ROWS = 4
"""Of a product: a CPU takes another kernel for fewer, which rounds otherwise; images would not be pruned as alone."""


class Observer(Protocol):
    """Notified of every plan: stage, request, image and the plan (for `explain` and tests)."""

    def __call__(self, stage: int, req_id: str, span: ImageSpan, scores: Tensor, plan: Plan) -> None: ...


class SeenRows(NamedTuple):
    """The rows of some requests up to the end of each one's last image: what the images' scores depend on."""

    stream: Tensor
    """(P, D)."""
    qkv: Tensor
    """(P, W) what the stage's first layer projects them to."""
    queries: Tensor
    """(P, heads, d) rotated."""
    metric: Tensor
    """(P, d) mean key."""


class PrunedBatch(NamedTuple):
    """Images that were pruned together."""

    images: tuple[ImageKeys, ...]
    scores: Tensor
    """(images, M)."""
    plan: Plan
    kept: Tensor
    """(images, rows that stay, D)."""
    qkv: Tensor
    """(images, rows that stay, W)."""


class StagedDecoder:
    """Runs a Llama-shaped decoder (`layers`, `norm`) stage by stage."""

    def __init__(self, model: Any, edges: Sequence[int], segments: Sequence[Segment]) -> None:
        """Take a decoder and its segments: of stage k, layers edges[k]..edges[k + 1]."""
        self.model = model
        self.edges = edges
        self.segments = segments
        self.graphs: StageGraphs | None = None
        """Set where the runner's own inputs are known."""
        self.key_reader: KeyReader | None = None
        self.observer: Observer | None = None

    @property
    def entry_layers(self) -> list[Any]:
        """The first layer of each stage from 1: it scores, and its KV cache holds what precedes an image."""
        return [self.model.layers[depth] for depth in self.edges[1:-1]]

    @property
    def width(self) -> int:
        """D, of the residual stream."""
        return len(self.model.layers[0].input_layernorm.weight)

    @property
    def projected_width(self) -> int:
        """W, of a layer's queries, keys and values together, on this rank."""
        attention = self.model.layers[0].self_attn
        width: int = attention.q_size + 2 * attention.kv_size
        return width

    def run(self, hidden: Tensor, positions: Tensor, layout: StepLayout) -> Tensor:
        """(T, D) embeddings -> (T, D) final hidden states, one row for each token before pruning.

        May write into `hidden`.
        """
        if layout.slot_mapping:
            get_forward_context().slot_mapping.update(layout.slot_mapping)
        rows = self.segments[0](positions, hidden)
        for stage, segment in enumerate(self.segments[1:], start=1):
            stream, qkv = rows
            if layout.stages:
                # Behind the rows of the step there may be padding.
                count = layout.num_rows(stage - 1)
                stream, qkv = self._prune(stage, stream[:count], qkv[:count], layout)
            assert self.graphs is not None
            positions = layout.positions[stage - 1]
            rows = self.graphs.run(stage, segment, positions, (stream, qkv), pruned=bool(layout.stages))
        final: Tensor = rows
        return final if layout.logits_rows is None else final[layout.logits_rows]

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Prune an image of zeros at every stage, so that the first request does not wait while a GPU loads kernels.

        vLLM's own warm-up has no images. Reads the KV cache and writes nothing.
        """
        num_stages = len(self.edges) - 2
        rows = tuple(16 << stage for stage in reversed(range(num_stages + 1)))
        span = ImageSpan(1, rows, tuple(TokenSplit(kept // 2, kept // 2) for kept in rows[1:]))
        request = PrunedRequest("warm-up", batch_index=0, slot=0, num_computed=1, spans=(span,))
        lengths, drops = np.array(rows[:1], dtype=np.int32), np.zeros((num_stages, 1), dtype=np.int32)
        norm: Tensor = self.entry_layers[0].input_layernorm.weight
        table = torch.zeros(1, 1, dtype=torch.int32, device=norm.device)
        layout = StepLayout([], plan_stages(lengths, [request], drops, num_stages), block_tables=[table] * num_stages)
        stream, qkv = norm.new_zeros(rows[0], self.width), norm.new_zeros(rows[0], self.projected_width)
        for stage in range(1, num_stages + 1):
            stream, qkv = self._prune(stage, stream, qkv, layout)

    def _prune(self, stage: int, stream: Tensor, qkv: Tensor, layout: StepLayout) -> tuple[Tensor, Tensor]:
        """Rows of stage - 1 -> rows of `stage`: images replaced by what they keep, everything else as it is.

        Args:
            stream: (N, D) residual stream.
            qkv: (N, W) what the stage's first layer projects it to.
        """
        requests = layout.stages[stage - 1].requests
        max_keys = _POOL_ELEMENTS // self.entry_layers[stage - 1].self_attn.kv_size
        pruned: list[PrunedBatch] = []
        for portion in portions(requests, max_keys):
            pruned += self._prune_requests(stage, stream, qkv, portion, layout.block_tables[stage - 1])
        if not pruned:
            return stream, qkv

        rows, projections, done = [], [], 0
        placed = [(image, batch, place) for batch in pruned for place, image in enumerate(batch.images)]
        for each, batch, place in sorted(placed, key=lambda one: one[0].image.start):
            if self.observer is not None:
                plan = Plan(*(part[place] for part in batch.plan))
                self.observer(stage, each.request.request.req_id, each.image.span, batch.scores[place], plan)
            rows += [stream[done : each.image.start], batch.kept[place]]
            projections += [qkv[done : each.image.start], batch.qkv[place]]
            done = each.image.start + each.image.span.rows[stage - 1]
        return torch.cat((*rows, stream[done:])), torch.cat((*projections, qkv[done:]))

    def _prune_requests(
        self, stage: int, stream: Tensor, qkv: Tensor, requests: Sequence[RequestRows], block_table: Tensor
    ) -> list[PrunedBatch]:
        """Prune all images of some requests; `block_table` (R, blocks) is that of the new stage."""
        assert self.key_reader is not None
        images = batch_images(stage, requests, self.key_reader.block_shape[0])
        indices = _to_device(images, stream.device)
        layer = self.entry_layers[stage - 1]
        places = next(indices)
        stream, qkv = stream.index_select(0, places), qkv.index_select(0, places)
        queries, keys = self._rotate(layer, qkv, next(indices))
        metric = keys.mean(dim=1, dtype=torch.promote_types(keys.dtype, torch.float32))
        rows = SeenRows(stream, qkv, queries, metric)
        owners, numbers = next(indices), next(indices)
        pool = keys
        if len(owners):
            read = self.key_reader.read(layer.self_attn.attn.kv_cache, block_table[owners, numbers])
            pool = torch.cat((keys, read))
        pruned: list[PrunedBatch] = []
        for wave in images.waves:
            batches = self._prune_wave(wave, indices, layer, rows, pool)
            pruned += batches
            positions = next(indices)
            if wave.followed:
                followed = torch.cat([batches[number].qkv[place] for number, place in wave.followed])
                pool = torch.cat((pool, self._rotate(layer, followed, positions)[1]))
        return pruned

    def _prune_wave(
        self, wave: Wave, indices: Iterator[Tensor], layer: Any, rows: SeenRows, pool: Tensor
    ) -> list[PrunedBatch]:
        """Prune images that see nothing of each other.

        Args:
            indices: whose next ones are the places of each batch's keys in the pool.
            layer: the stage's first.
            pool: (keys, kv_heads, d), first those of `rows`.
        """
        scores, places = [], []
        for batch in wave.batches:
            arrays = [next(indices) for _ in batch.key_arrays()]
            own = [array[:, -batch.num_rows :].contiguous() for array in arrays]
            scores.append(_join([self._score(rows.queries, pool, *each) for each in zip(own, arrays, strict=True)]))
            places.append(_join(own))
        means = mean_over_ranks(*scores, *(_take(rows.metric, place) for place in places))
        plans = [
            select(means[number], means[len(places) + number], *batch.split)
            for number, batch in enumerate(wave.batches)
        ]
        kept = [apply(plan, _take(rows.stream, place)) for plan, place in zip(plans, places, strict=True)]
        merged = self._project_merged(layer, plans, kept)
        pruned = []
        for number, (batch, plan, place) in enumerate(zip(wave.batches, plans, places, strict=True)):
            qkv = _take(rows.qkv, place.gather(-1, plan.kept))
            if plan.anchors.shape[-1]:
                qkv = torch.cat((qkv, merged[number].unflatten(0, plan.anchors.shape)), dim=1)
            pruned.append(PrunedBatch(batch.images, means[number], plan, kept[number], qkv))
        return pruned

    def _project_merged(self, layer: Any, plans: Sequence[Plan], kept: Sequence[Tensor]) -> Sequence[Tensor]:
        """Of each batch (images * C, W): what others were merged into is new, and all of it is projected at once."""
        merged = [rows[:, plan.kept.shape[-1] :].flatten(end_dim=1) for plan, rows in zip(plans, kept, strict=True)]
        counts = [len(rows) for rows in merged]
        if not sum(counts):
            return merged
        rows, missing = _join(merged), max(0, _LEAST_ROWS - sum(counts))
        if missing:
            rows = F.pad(rows, (0, 0, 0, missing))
        projected: Sequence[Tensor] = self._project(layer, rows).split([*counts, missing])
        return projected

    @staticmethod
    def _score(queries: Tensor, pool: Tensor, own: Tensor, places: Tensor) -> Tensor:
        """Scores (images, M) of images, means over all heads of this rank.

        Args:
            queries: (P, heads, d).
            pool: (keys, kv_heads, d).
            own: (images, M), places of each image's queries.
            places: (images, N), of each image's keys in the pool, of which the last M are its own.
        """
        heads, width = queries.shape[1:]
        at_once = images_at_once(heads, own.shape[1], places.shape[1], width, queries.device)
        received = []
        for mine, all_keys in zip(own.split(at_once), places.split(at_once), strict=True):
            asking, asked = _take(queries, mine), _take(pool, all_keys)
            received.append(attention_received(asking.transpose(1, 2), asked.transpose(1, 2)))
        return _join(received) / (heads * own.shape[1])

    @staticmethod
    def _project(layer: Any, stream: Tensor) -> Tensor:
        """(N, D) rows of the residual stream -> (N, W) what the layer projects them to."""
        qkv: Tensor = layer.self_attn.qkv_proj(layer.input_layernorm(stream))[0]
        return qkv

    @staticmethod
    def _rotate(layer: Any, qkv: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's rotated queries (N, heads, d) and keys (N, kv_heads, d) of projected rows (N, W)."""
        attention = layer.self_attn
        query, key, _ = qkv.split([attention.q_size, attention.kv_size, attention.kv_size], dim=-1)
        query, key = attention.rotary_emb(positions, query.contiguous(), key.contiguous())
        return query.unflatten(-1, (-1, attention.head_dim)), key.unflatten(-1, (-1, attention.head_dim))


def _to_device(images: StageImages, device: torch.device) -> Iterator[Tensor]:
    """All of a stage's indices by one copy: in the order of the fields, and for each wave its batches' keys first."""
    arrays = [images.rows, images.positions, images.block_owners, images.block_numbers]
    for wave in images.waves:
        arrays += [array for batch in wave.batches for array in batch.key_arrays()]
        arrays.append(wave.positions)
    packed = async_tensor_h2d(np.concatenate([array.ravel() for array in arrays]), device=device)
    parts = packed.split([array.size for array in arrays])
    return (part.view(array.shape) for part, array in zip(parts, arrays, strict=True))


def _take(tensor: Tensor, places: Tensor) -> Tensor:
    """Rows of a tensor (rows, ...) at places (images, N) -> (images, N, ...)."""
    return tensor.index_select(0, places.flatten()).view(*places.shape, *tensor.shape[1:])


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))
