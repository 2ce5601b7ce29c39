"""Stages 1..: prune the images of a step between two layers of the decoder, and run the layers of every stage.

VisionDrop, arXiv 2506.22283, sections 3.2 and 3.3. After a boundary, an image's rows of the residual stream are scored
with the NEXT layer's norm, projections and rotary embedding. The sequence that they are scored in is the one that the
next stage sees up to the image: what precedes the image is already pruned, its keys lie in the next layer's KV cache or
in this step. Hence a result that depends on nothing after the image, on no neighbour, and on no cut between steps.

Upstream: `vllm/model_executor/models/llama.py`, whose model loop this replaces (vLLM 0.32).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import async_tensor_h2d

from vd_plugin.key_reader import KeyReader
from vd_plugin.schedule import TokenSplit
from vd_plugin.selection import Plan, apply, attention_received, select
from vd_plugin.spans import ImageSpan
from vd_plugin.step_layout import ImageRows, PrunedRequest, RequestRows, StageRows, StepLayout, plan_stages
from vd_plugin.tensor_parallel import mean_over_ranks


class Observer(Protocol):
    """Notified of every plan: stage, request, image and the plan (for `explain` and tests)."""

    def __call__(self, stage: int, req_id: str, span: ImageSpan, scores: Tensor, plan: Plan) -> None: ...


class StagedDecoder:
    """Runs a Llama-shaped decoder (`layers`, `norm`) stage by stage."""

    def __init__(self, model: Any, boundaries: Sequence[int]) -> None:
        self.model = model
        self.edges = (0, *boundaries, len(model.layers))
        self.key_reader: KeyReader | None = None
        self.observer: Observer | None = None

    @property
    def entry_layers(self) -> list[Any]:
        """The first layer of each stage from 1: it scores, and its KV cache holds what precedes an image."""
        return [self.model.layers[depth] for depth in self.edges[1:-1]]

    def run(self, hidden: Tensor, positions: Tensor, layout: StepLayout) -> Tensor:
        """(T, D) embeddings -> (T, D) final hidden states, one row for each token before pruning."""
        if layout.slot_mapping:
            get_forward_context().slot_mapping.update(layout.slot_mapping)
        residual = None
        for stage in range(len(self.edges) - 1):
            if stage > 0:
                positions = layout.positions[stage - 1]
                if layout.stages:
                    stream = hidden if residual is None else hidden + residual
                    hidden, residual = self._prune(stage, stream, layout), None
            for layer in self.model.layers[self.edges[stage] : self.edges[stage + 1]]:
                hidden, residual = layer(positions, hidden, residual)
        hidden, _ = self.model.norm(hidden, residual)
        return hidden if layout.logits_rows is None else hidden[layout.logits_rows]

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
        stream = norm.new_zeros(rows[0], len(norm))
        for stage in range(1, num_stages + 1):
            stream = self._prune(stage, stream, layout)

    def _prune(self, stage: int, stream: Tensor, layout: StepLayout) -> Tensor:
        """Rows of stage - 1 -> rows of `stage`: images replaced by what they keep, everything else as it is."""
        rows: StageRows = layout.stages[stage - 1]
        pieces = []
        done = 0
        for request in rows.requests:
            block_table = layout.block_tables[stage - 1][request.request.batch_index]
            for image, kept in self._prune_request(stage, stream[request.start : request.end], request, block_table):
                pieces += [stream[done : image.start], kept]
                done = image.start + image.span.rows[stage - 1]
        return torch.cat((*pieces, stream[done:])) if pieces else stream

    def _prune_request(
        self, stage: int, stream: Tensor, request: RequestRows, block_table: Tensor
    ) -> list[tuple[ImageRows, Tensor]]:
        """Prune the images of one request, in order: an image sees the earlier ones as they are after this stage.

        Args:
            stream: (N, D) the request's rows of this step, up to the end of its last image.
        """
        layer = self.entry_layers[stage - 1]
        positions = async_tensor_h2d(_positions(stage, request, len(stream)), device=stream.device)
        queries, keys = self._project(layer, stream, positions)
        attention = layer.self_attn.attn
        before = [keys[:0]]
        if request.context:
            assert self.key_reader is not None
            before = [self.key_reader.read(attention.kv_cache, block_table, request.context)]
        done = gone = 0
        results: list[tuple[ImageRows, Tensor]] = []
        for image in request.images:
            rows = slice(image.offset, image.offset + image.span.rows[stage - 1])
            split = image.span.splits[stage - 1]
            assert split is not None
            before.append(keys[done : rows.start])
            scores, metric = self._score(queries[rows], torch.cat((*before, keys[rows])))
            plan = select(scores, metric, *split)
            if self.observer is not None:
                self.observer(stage, request.request.req_id, image.span, scores, plan)
            kept = apply(plan, stream[rows])
            results.append((image, kept))
            done = rows.stop
            if image is not request.images[-1]:
                start = request.context + rows.start - gone
                positions = torch.arange(start, start + len(kept), device=stream.device)
                before.append(self._project(layer, kept, positions)[1])
                gone += (rows.stop - rows.start) - len(kept)
        return results

    def _score(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (M,) and key metric (M, d) of an image, means over all heads of all ranks.

        Args:
            queries: (M, heads, d) of the image.
            keys: (N, kv_heads, d) of everything up to the image's end.
        """
        count, heads, _ = queries.shape
        received = attention_received(queries.transpose(0, 1), keys.transpose(0, 1))
        return mean_over_ranks(received / (heads * count)), mean_over_ranks(keys[-count:].float().mean(dim=1))

    @staticmethod
    def _project(layer: Any, stream: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's rotated queries (N, heads, d) and keys (N, kv_heads, d) of rows of the residual stream (N, D)."""
        attention = layer.self_attn
        qkv, _ = attention.qkv_proj(layer.input_layernorm(stream))
        query, key, _ = qkv.split([attention.q_size, attention.kv_size, attention.kv_size], dim=-1)
        query, key = attention.rotary_emb(positions, query.contiguous(), key.contiguous())
        return query.unflatten(-1, (-1, attention.head_dim)), key.unflatten(-1, (-1, attention.head_dim))


def _positions(stage: int, request: RequestRows, count: int) -> Tensor:
    """(count,) positions at which rows are scored: those of the new stage, but with the image itself still whole."""
    positions = torch.arange(request.context, request.context + count)
    for image in request.images:
        behind = image.offset + image.span.rows[stage - 1]
        positions[behind:] -= image.span.rows[stage - 1] - image.span.rows[stage]
    return positions
