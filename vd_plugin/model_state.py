"""Per-request state of pruning in the model runner, and the attention metadata of every stage.

A decode-only step costs a few tensor operations whatever the number of requests: each request's lost rows are kept on
the device by slot, and positions, lengths and KV slots of all stages follow from the step's own. Nothing waits for the
device. Steps that prune run eagerly and loop over the requests whose images they compute.

Captured CUDA graphs read positions, sequence lengths and slots from the buffers that are filled here before a replay.

Upstream: `vllm/v1/worker/gpu/model_states/default.py` (vLLM 0.32, second model runner).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.kv_cache_interface import KVCacheConfig, UniformTypeKVCacheSpecs
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.utils import AttentionGroup

from vd_plugin.kv_cache import StagedAttentionSpec
from vd_plugin.spans import ImageSpan, dropped_before, read_spans
from vd_plugin.step_layout import PrunedRequest, StepLayout, final_rows, plan_stages, slots_of

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
        # Rows that each request has lost so far at stages 1.., on the host and on the device, by request slot.
        self.drops_np = np.zeros((num_stages, self.max_num_reqs), dtype=np.int32)
        self.drops = torch.zeros(num_stages, self.max_num_reqs, dtype=torch.int32, device=device)
        # Read by captured graphs.
        self.positions = torch.zeros(num_stages, self.max_num_tokens, dtype=torch.int64, device=device)
        self.seq_lens = torch.zeros(num_stages, self.max_num_reqs, dtype=torch.int32, device=device)

        self.pending: dict[str, tuple[ImageSpan, ...]] = {}
        """Request id -> its images that are still to be computed."""
        self.known: set[str] = set()
        """Requests of the runner; a dummy batch has others."""
        self.layout: StepLayout | None = None
        self.layout_batch: InputBatch | None = None
        self.stage_groups: list[list[int]] = []
        """Stage -> its KV-cache groups."""

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
        self._set_drops(req_index, np.array(drops, dtype=np.int32))

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
        pruned = [] if step.is_dummy else self._pruned_requests(input_batch)
        if pruned:
            assert not is_full_graph, "a step that prunes has no graph"
            layout = self._lay_out_pruning(step, pruned)
        else:
            layout = self._lay_out(step)
        for stage in range(1, self.num_stages + 1):
            metadata |= self._build_metadata(step, stage, layout)
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
        input_batch, block_tables, slot_mappings = step.batch, step.block_tables, step.slot_mappings
        num_reqs, num_tokens = input_batch.num_reqs, input_batch.num_tokens
        self.seq_lens[:, num_reqs:] = 0
        self.positions[:, num_tokens : input_batch.num_tokens_after_padding] = 0
        positions = self.positions[:, :num_tokens]
        if step.is_dummy:
            # Its slots are padding, and its requests are none of ours.
            self.seq_lens[:, :num_reqs] = input_batch.seq_lens[:num_reqs]
            positions.copy_(input_batch.positions[:num_tokens].expand_as(positions))
            return StepLayout(list(self.positions[:, : input_batch.num_tokens_after_padding]))
        drops = self.drops[:, input_batch.idx_mapping]
        torch.sub(input_batch.seq_lens[:num_reqs], drops, out=self.seq_lens[:, :num_reqs])
        owner = self._owners(input_batch)
        torch.sub(input_batch.positions[:num_tokens], drops[:, owner], out=positions)
        for stage in range(1, self.num_stages + 1):
            for group in self.stage_groups[stage]:
                block_size = step.kv_cache_config.kv_cache_groups[group].kv_cache_spec.block_size
                slots = slots_of(positions[stage - 1], owner, block_tables[group], block_size)
                slot_mappings[group, :num_tokens] = slots
        return StepLayout(list(self.positions[:, : input_batch.num_tokens_after_padding]))

    def _owners(self, input_batch: InputBatch) -> Tensor:
        """(T,) batch index of each token's request."""
        tokens = torch.arange(input_batch.num_tokens, device=self.device)
        if input_batch.num_tokens == input_batch.num_reqs:
            return tokens
        ends = input_batch.query_start_loc[1 : input_batch.num_reqs + 1]
        return torch.searchsorted(ends, tokens.to(ends.dtype), right=True)

    def _lay_out_pruning(self, step: StepInputs, pruned: list[PrunedRequest]) -> StepLayout:
        input_batch, block_tables, slot_mappings = step.batch, step.block_tables, step.slot_mappings
        num_reqs = input_batch.num_reqs
        lengths = input_batch.num_scheduled_tokens[:num_reqs].astype(np.int32)
        stages = plan_stages(lengths, pruned, self.drops_np, self.num_stages)
        first_rows = input_batch.query_start_loc[:num_reqs].to(torch.int64)
        first_positions = input_batch.positions[first_rows] - self.drops[:, input_batch.idx_mapping]
        layout = StepLayout([], stages)
        for stage, rows in enumerate(stages, start=1):
            owner = async_tensor_h2d(np.repeat(np.arange(num_reqs), rows.lengths), device=self.device)
            starts = async_tensor_h2d(rows.starts[:-1].astype(np.int64), device=self.device)
            first = first_positions[stage - 1]
            positions = torch.arange(rows.num_rows, device=self.device) + (first - starts)[owner]
            self.seq_lens[stage - 1, :num_reqs] = first + async_tensor_h2d(rows.lengths, device=self.device)
            self.seq_lens[stage - 1, num_reqs:] = 0
            layout.positions.append(positions)
            for group in self.stage_groups[stage]:
                kv_group = step.kv_cache_config.kv_cache_groups[group]
                slots = slots_of(positions, owner, block_tables[group], kv_group.kv_cache_spec.block_size)
                slot_mappings[group] = PAD_SLOT_ID
                slot_mappings[group, : rows.num_rows] = slots
                layout.slot_mapping |= dict.fromkeys(kv_group.layer_names, slot_mappings[group, : rows.num_rows])
            layout.block_tables.append(block_tables[self.model.entry_groups[stage - 1]])
        layout.logits_rows = async_tensor_h2d(
            final_rows(lengths, pruned, stages[-1], self.num_stages).astype(np.int64), device=self.device
        )
        return layout

    def _build_metadata(self, step: StepInputs, stage: int, layout: StepLayout) -> dict[str, Any]:
        input_batch, num_reqs, slot_mappings = step.batch, step.num_reqs, step.slot_mappings
        rows = layout.stages[stage - 1] if layout.stages else None
        if rows is None:
            query_starts, starts_np = input_batch.query_start_loc, input_batch.query_start_loc_np
            lengths, num_rows = input_batch.num_scheduled_tokens, step.num_tokens
        else:
            query_starts, starts_np = async_tensor_h2d(rows.starts, device=self.device), rows.starts
            lengths, num_rows = rows.lengths, rows.num_rows
            slot_mappings = slot_mappings[:, :num_rows]
        bound = input_batch.seq_lens_cpu_upper_bound[:num_reqs].clone()
        if not step.is_dummy:
            gone = self.drops_np[stage - 1, input_batch.idx_mapping_np]
            if rows is not None:
                gone = gone + input_batch.num_scheduled_tokens[: input_batch.num_reqs] - rows.lengths
            bound[: input_batch.num_reqs] -= torch.from_numpy(gone).to(bound.dtype)
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
            self._set_drops(request.slot, self.drops_np[:, request.slot] + np.array(gone, dtype=np.int32))
            rest = self.pending.pop(request.req_id)[len(request.spans) :]
            if rest:
                self.pending[request.req_id] = rest

    def _set_drops(self, slot: int, drops: np.ndarray) -> None:
        self.drops_np[:, slot] = drops
        self.drops[:, slot] = async_tensor_h2d(drops, device=self.device)

    def _of_stage(self, attn_groups: list[list[AttentionGroup]], stage: int) -> list[list[AttentionGroup]]:
        mine = set(self.stage_groups[stage])
        return [groups if group_id in mine else [] for group_id, groups in enumerate(attn_groups)]

    def _log_capacity(self, kv_cache_config: KVCacheConfig) -> None:
        from vd_plugin.kv_capacity import KVCapacity, describe_capacity

        logger.info_once(describe_capacity(self.model.geometry, KVCapacity.of_engine(kv_cache_config)))
