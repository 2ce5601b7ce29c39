"""Per-request state of pruning in the model runner, and the attention metadata of every stage.

A decode-only step costs one kernel whatever the number of requests: each request's lost rows are kept by slot where the
device reads them, and positions, lengths and KV slots of all stages follow from the step's own. Nothing waits for the
device. Steps that prune run eagerly and loop over the requests whose images they compute.

Captured CUDA graphs read positions, sequence lengths and slots from the buffers that are filled here before a replay.

Upstream: `vllm/v1/worker/gpu/model_states/default.py` (vLLM 0.32, second model runner).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.kv_cache_interface import KVCacheConfig, UniformTypeKVCacheSpecs
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.utils import AttentionGroup

from vd_plugin.kv_cache import StagedAttentionSpec
from vd_plugin.row_layout import StageBuffers, StageGroup, StepRows, lay_out_rows
from vd_plugin.row_layout_kernel import RowLayoutKernel
from vd_plugin.spans import ImageSpan, dropped_before, read_spans
from vd_plugin.stage_graphs import StageGraphs
from vd_plugin.step_layout import PrunedRequest, StepLayout, final_rows, plan_stages

logger = init_logger(f"vllm.{__name__}")


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What vLLM's runner gives for a step, and what follows from it for all stages."""

    batch: InputBatch
    num_reqs: int
    num_tokens: int
    """Both padded where a full graph is replayed."""
    block_tables: tuple[Tensor, ...]
    """By KV-cache group."""
    slot_mappings: Tensor
    attn_groups: list[list[AttentionGroup]]
    kv_cache_config: KVCacheConfig
    for_capture: bool
    is_dummy: bool
    """Whether its requests are none of the runner's: a capture, or a run to measure memory."""


class StagedModelState(DefaultModelState):
    def __init__(
        self, vllm_config: VllmConfig, model: Any, encoder_cache: EncoderCache | None, device: torch.device
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        num_stages = len(model.geometry.boundaries)
        self.num_stages = num_stages
        # Rows that each request has lost so far at stages 1.., by request slot: written on the host, and handed to the
        # device once a step, if at all. It has as many buffers as there are steps in flight.
        self.drops = UvaBackedTensor((num_stages, self.max_num_reqs), dtype=torch.int32)
        self.drops_changed = False
        # Read by captured graphs.
        self.positions = torch.zeros(num_stages, self.max_num_tokens, dtype=torch.int64, device=device)
        self.seq_lens = torch.zeros(num_stages, self.max_num_reqs, dtype=torch.int32, device=device)
        self.buffers = StageBuffers(self.positions, self.seq_lens)
        compilation = vllm_config.compilation_config
        has_pieces = compilation.cudagraph_mode.has_piecewise_cudagraphs()
        max_rows = max(compilation.cudagraph_capture_sizes) if has_pieces else 0
        widths = model.decoder.width, model.decoder.projected_width
        model.decoder.graphs = StageGraphs(self.positions, max_rows, widths, vllm_config.model_config.dtype)

        self.pending: dict[str, tuple[ImageSpan, ...]] = {}
        """Request id -> its images that are still to be computed."""
        self.known: set[str] = set()
        """Requests of the runner; a dummy batch has others."""
        self.layout: StepLayout | None = None
        self.layout_batch: InputBatch | None = None
        self.stage_groups: list[list[int]] = []
        """Stage -> its KV-cache groups."""
        self.lay_out_rows: Callable[[StepRows, Tensor, StageBuffers, Tensor], None]

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)
        req_id, num_computed = new_req_data.req_id, new_req_data.num_computed_tokens
        spans = read_spans(new_req_data.mm_features)
        pending = tuple(span for span in spans if span.end > num_computed)
        assert not pending or pending[0].offset >= num_computed, "an image was split between steps"
        self.known.add(req_id)
        self.pending.pop(req_id, None)
        if pending:
            self.pending[req_id] = pending
        # A slot is reused, and a preempted request comes back with other counts: write it at every add.
        drops = [dropped_before(spans, stage, num_computed) for stage in range(1, self.num_stages + 1)]
        self.drops.np[:, req_index] = drops
        self.drops_changed = True

    def remove_request(self, req_id: str) -> None:
        super().remove_request(req_id)
        self.known.discard(req_id)
        self.pending.pop(req_id, None)

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, block_tables: BlockTables) -> None:
        super().initialize_kv_cache(kv_cache_config, block_tables)
        groups: list[list[int]] = [[] for _ in range(self.num_stages + 1)]
        for group_id, group in enumerate(kv_cache_config.kv_cache_groups):
            spec = group.kv_cache_spec
            if isinstance(spec, UniformTypeKVCacheSpecs):
                spec = spec.first_spec
            if not isinstance(spec, StagedAttentionSpec):
                raise NotImplementedError(
                    "VisionDrop needs a KV-cache group for each stage: leave disable_hybrid_kv_cache_manager unset"
                )
            groups[spec.stage].append(group_id)
        self.stage_groups = groups
        later = [
            StageGroup(stage, group, block_tables.block_sizes[group], block_tables.input_block_tables[group])
            for stage, of_stage in enumerate(groups[1:], start=1)
            for group in of_stage
        ]
        # Triton's interpreter would take milliseconds.
        if current_platform.is_cpu():
            self.lay_out_rows = partial(lay_out_rows, later)
        else:
            self.lay_out_rows = RowLayoutKernel(later, self.device)
        self.model.bind_kv_cache(kv_cache_config)
        if self.vllm_config.cache_config.num_gpu_blocks is None:
            return  # a small cache, thrown away once vLLM has measured what CUDA graphs take
        self._log_capacity(kv_cache_config)
        if current_platform.is_cuda():
            self.model.decoder.warm_up()

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[Tensor, ...],
        slot_mappings: Tensor,
        attn_groups: list[list[AttentionGroup]],
        kv_cache_config: KVCacheConfig,
        for_capture: bool = False,
        ubatch_idx: int = 0,
    ) -> dict[str, Any]:
        metadata: dict[str, Any] = super().prepare_attn(
            input_batch,
            cudagraph_mode,
            block_tables,
            slot_mappings,
            self._of_stage(attn_groups, 0),
            kv_cache_config,
            for_capture,
            ubatch_idx,
        )
        is_full_graph = cudagraph_mode == CUDAGraphMode.FULL
        step = StepInputs(
            batch=input_batch,
            num_reqs=input_batch.num_reqs_after_padding if is_full_graph else input_batch.num_reqs,
            num_tokens=input_batch.num_tokens_after_padding if is_full_graph else input_batch.num_tokens,
            block_tables=block_tables,
            slot_mappings=slot_mappings,
            attn_groups=attn_groups,
            kv_cache_config=kv_cache_config,
            for_capture=for_capture,
            is_dummy=for_capture or input_batch.req_ids[0] not in self.known,
        )
        if self.drops_changed:
            self.drops.copy_to_uva()
            self.drops_changed = False
        pruned = [] if step.is_dummy else self._pruned_requests(input_batch)
        row_starts: Tensor | None = None
        if pruned:
            assert not is_full_graph, "a step that prunes has no graph"
            layout, row_starts = self._lay_out_pruning(step, pruned)
        else:
            layout = self._lay_out(step)
        bounds = self._bound_lengths(step, layout)
        for stage in range(1, self.num_stages + 1):
            starts = input_batch.query_start_loc if row_starts is None else row_starts[stage - 1]
            metadata |= self._build_metadata(step, stage, layout, starts, bounds[stage - 1])
        self._advance(pruned)
        self.layout, self.layout_batch = layout, input_batch
        return metadata

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        inputs: dict[str, Any] = super().prepare_inputs(input_batch, req_states)
        if self.layout_batch is input_batch:
            return {**inputs, "layout": self.layout}
        # A memory-profiling run, which prepares no attention.
        return {**inputs, "layout": StepLayout([input_batch.positions] * self.num_stages)}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        inputs: dict[str, Any] = super().prepare_dummy_inputs(num_reqs, num_tokens)
        return {**inputs, "layout": StepLayout(list(self.positions[:, :num_tokens]))}

    def _pruned_requests(self, input_batch: InputBatch) -> list[PrunedRequest]:
        """Requests whose images are computed in this step. Iterates over prefilling requests only."""
        if not input_batch.has_prefill or not self.pending:
            return []
        pruned = []
        for index in np.flatnonzero(input_batch.is_prefilling_np[: input_batch.num_reqs]).tolist():
            pending = self.pending.get(input_batch.req_ids[index], ())
            start = int(input_batch.num_computed_tokens_np[index])
            end = start + int(input_batch.num_scheduled_tokens[index])
            spans = tuple(span for span in pending if span.offset < end)
            if spans:
                assert spans[-1].end <= end, "an image was split between steps"
                slot = int(input_batch.idx_mapping_np[index])
                pruned.append(PrunedRequest(input_batch.req_ids[index], index, slot, start, spans))
        return pruned

    def _lay_out(self, step: StepInputs) -> StepLayout:
        """A step without images to prune: every request is shifted by what it has lost before."""
        batch = step.batch
        if step.is_dummy:
            # Its slots are padding, and its requests are none of ours.
            self.seq_lens[:, : batch.num_reqs] = batch.seq_lens[: batch.num_reqs]
            self.seq_lens[:, batch.num_reqs :] = 0
            self.positions[:, : batch.num_tokens] = batch.positions[: batch.num_tokens]
            self.positions[:, batch.num_tokens : batch.num_tokens_after_padding] = 0
        else:
            num_rows = [batch.num_tokens] * self.num_stages
            rows = StepRows(batch.idx_mapping, batch.query_start_loc, batch.positions, num_rows, row_starts=None)
            self.lay_out_rows(rows, self.drops.gpu, self.buffers, step.slot_mappings)
        return StepLayout(list(self.positions[:, : batch.num_tokens_after_padding]))

    def _lay_out_pruning(self, step: StepInputs, pruned: list[PrunedRequest]) -> tuple[StepLayout, Tensor]:
        """A step that prunes, and the first row of each request at stages 1.. of it, (stages, R + 1) int32."""
        batch, slot_mappings = step.batch, step.slot_mappings
        lengths = batch.num_scheduled_tokens[: batch.num_reqs].astype(np.int32)
        stages = plan_stages(lengths, pruned, self.drops.np, self.num_stages)
        starts = np.stack([stage.starts for stage in stages])
        logits_rows = final_rows(lengths, pruned, stages[-1], self.num_stages)
        # One copy to the device.
        packed = async_tensor_h2d(np.concatenate((starts.ravel(), logits_rows.astype(np.int32))), device=self.device)
        row_starts = packed[: starts.size].view(starts.shape)
        num_rows = [stage.num_rows for stage in stages]
        rows = StepRows(batch.idx_mapping, batch.query_start_loc, batch.positions, num_rows, row_starts)
        self.lay_out_rows(rows, self.drops.gpu, self.buffers, slot_mappings)

        layout = StepLayout([], stages, logits_rows=packed[starts.size :].to(torch.int64))
        for stage, count in enumerate(num_rows, start=1):
            layout.positions.append(self.positions[stage - 1, :count])
            layout.block_tables.append(step.block_tables[self.model.entry_groups[stage - 1]])
            for group in self.stage_groups[stage]:
                layer_names = step.kv_cache_config.kv_cache_groups[group].layer_names
                layout.slot_mapping |= dict.fromkeys(layer_names, slot_mappings[group, :count])
        return layout, row_starts

    def _bound_lengths(self, step: StepInputs, layout: StepLayout) -> Tensor:
        """(stages, R) upper bounds of the sequence lengths at stages 1.., on the host."""
        batch = step.batch
        bounds = np.tile(batch.seq_lens_cpu_upper_bound[: step.num_reqs].numpy(), (self.num_stages, 1))
        if not step.is_dummy:
            bounds[:, : batch.num_reqs] -= self.drops.np[:, batch.idx_mapping_np]
            for bound, rows in zip(bounds, layout.stages, strict=False):
                bound[: batch.num_reqs] -= batch.num_scheduled_tokens[: batch.num_reqs] - rows.lengths
        return torch.from_numpy(bounds)

    def _build_metadata(
        self, step: StepInputs, stage: int, layout: StepLayout, query_starts: Tensor, bound: Tensor
    ) -> dict[str, Any]:
        input_batch, num_reqs, slot_mappings = step.batch, step.num_reqs, step.slot_mappings
        rows = layout.stages[stage - 1] if layout.stages else None
        if rows is None:
            starts_np, lengths = input_batch.query_start_loc_np, input_batch.num_scheduled_tokens
            num_rows = step.num_tokens
        else:
            starts_np, lengths, num_rows = rows.starts, rows.lengths, rows.num_rows
            slot_mappings = slot_mappings[:, :num_rows]
        metadata: dict[str, Any] = build_attn_metadata(
            attn_groups=self._of_stage(step.attn_groups, stage),
            num_reqs=num_reqs,
            num_tokens=num_rows,
            query_start_loc_gpu=query_starts[: num_reqs + 1],
            query_start_loc_cpu=torch.from_numpy(starts_np[: num_reqs + 1]),
            max_query_len=input_batch.max_query_len if input_batch.max_query_len else int(lengths.max()),
            seq_lens=self.seq_lens[stage - 1],
            # A graph must be valid at any replay.
            max_seq_len=self.max_model_len if step.for_capture else int(bound.max()),
            block_tables=step.block_tables,
            slot_mappings=slot_mappings,
            kv_cache_config=step.kv_cache_config,
            seq_lens_cpu_upper_bound=bound,
            positions=layout.positions[stage - 1],
            is_prefilling=torch.from_numpy(input_batch.is_prefilling_np),
            for_cudagraph_capture=step.for_capture,
            req_idx=input_batch.idx_mapping_np,
        )
        return metadata

    def _advance(self, pruned: list[PrunedRequest]) -> None:
        """After the layout of a step that prunes: the images' rows are gone for all steps to come."""
        for request in pruned:
            gone = [sum(span.dropped(stage) for span in request.spans) for stage in range(1, self.num_stages + 1)]
            self.drops.np[:, request.slot] += gone
            self.drops_changed = True
            rest = self.pending.pop(request.req_id)[len(request.spans) :]
            if rest:
                self.pending[request.req_id] = rest

    def _of_stage(self, attn_groups: list[list[AttentionGroup]], stage: int) -> list[list[AttentionGroup]]:
        mine = set(self.stage_groups[stage])
        return [groups if group_id in mine else [] for group_id, groups in enumerate(attn_groups)]

    def _log_capacity(self, kv_cache_config: KVCacheConfig) -> None:
        from vd_plugin.kv_capacity import KVCapacity, describe_capacity

        logger.info_once(describe_capacity(self.model.geometry, KVCapacity.of_engine(kv_cache_config)))
