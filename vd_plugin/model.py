"""LLaVA-NeXT and LLaVA-1.5 with visual token budgets, as vLLM models.

Published checkpoints load unchanged (`hf_overrides={"architectures": [...]}` chooses the class). Images served in full
go through the stock encoder; pruned ones leave the tower with the rows of their schedule, before the projector. With
boundaries, the decoder's layers run stage by stage (`decoder.py`), each stage with KV-cache groups of its own.

Upstream: `vllm/model_executor/models/llava_next.py` and `llava.py` (vLLM 0.32).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder, LlavaForConditionalGeneration
from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from vd_plugin.decoder import StagedDecoder
from vd_plugin.key_reader import KeyReader
from vd_plugin.kv_cache import StagedAttentionSpec
from vd_plugin.options import read_geometry
from vd_plugin.processor import LlavaBudgetInfo, LlavaBudgetProcessor, LlavaNextBudgetInfo, LlavaNextBudgetProcessor
from vd_plugin.schedule import TokenSplit
from vd_plugin.segments import cut
from vd_plugin.step_layout import StepLayout
from vd_plugin.validation import check_decoder
from vd_plugin.vision import PrunedTiles, TileFeatures, order_image, prune_tiles, run_tower


class _StagedPruning:
    """Mixin for a LLaVA model: stage 0 at the encoder, stages 1.. in the decoder."""

    vision_tower: Any
    multi_modal_projector: Any
    language_model: Any
    encoder_observer: Callable[[PrunedTiles], None] | None = None
    """Notified of what stage 0 keeps of every image (for `explain`)."""
    entry_groups: list[int]
    """For stages 1.., the KV-cache group of the stage's first layer."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.geometry = read_geometry(vllm_config.model_config.hf_config)
        decoder = self.language_model.model
        check_decoder(decoder, self.geometry)
        edges = (0, *self.geometry.boundaries, len(decoder.layers))
        self.decoder = StagedDecoder(decoder, edges, cut(decoder, edges, vllm_config))
        # vLLM asks every attention layer for the kind of KV cache it needs; the kind of ours depends on its stage.
        for stage, num_layers in enumerate(self.geometry.layers_per_stage if self.geometry.boundaries else ()):
            first = edges[stage]
            for layer in decoder.layers[first : first + num_layers]:
                attention = layer.self_attn.attn
                attention.get_kv_cache_spec = partial(_staged_kv_cache_spec, attention.get_kv_cache_spec, stage)
        # vLLM bounds the encoder's batch by placeholders, but the tower runs every patch of every tile: with small
        # budgets many more tiles fit a step than memory was profiled for (vLLM issue 38888). Bound the tiles instead.
        encoder_tokens = vllm_config.scheduler_config.max_num_encoder_input_tokens
        self.max_tower_tiles = max(self.geometry.max_num_tiles(), encoder_tokens // self.geometry.tile_patches)

    def get_model_state_cls(self) -> type[Any]:
        from vd_plugin.model_state import StagedModelState

        state: type[Any] = StagedModelState if self.geometry.boundaries else DefaultModelState
        return state

    def bind_kv_cache(self, kv_cache_config: KVCacheConfig) -> None:
        """Called when KV memory is in place (twice: the first time for profiling, and nothing of that is kept)."""
        entries = [layer.self_attn.attn for layer in self.decoder.entry_layers]
        groups = kv_cache_config.kv_cache_groups
        self.entry_groups = [
            next(i for i, group in enumerate(groups) if entry.layer_name in group.layer_names) for entry in entries
        ]
        self.decoder.key_reader = KeyReader(entries[0], groups[self.entry_groups[0]].kv_cache_spec.block_size)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        layout: StepLayout | None = None,
        **kwargs: Any,
    ) -> Any:
        if layout is None:
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)  # type: ignore[misc]
        if inputs_embeds is None:
            inputs_embeds = self.language_model.model.embed_input_ids(input_ids)
        return self.decoder.run(inputs_embeds, positions, layout)

    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        """Encode a batch of images: for each (rows, D), as many rows as its placeholders."""
        schedules = kwargs.pop("visual_token_schedule", None)
        if schedules is None:
            return list(super().embed_multimodal(**kwargs))  # type: ignore[misc]
        splits = [TokenSplit(*schedule[0]) for schedule in torch.as_tensor(schedules).tolist()]
        full = [index for index, split in enumerate(splits) if split.rows == 0]
        outputs: dict[int, Tensor] = {}
        if full:
            stock = {name: _take(value, full) for name, value in kwargs.items()}
            outputs.update(zip(full, super().embed_multimodal(**stock), strict=True))  # type: ignore[misc]
        pruned = [index for index in range(len(splits)) if index not in outputs]
        images = [self._tiles(kwargs["pixel_values"][index]) for index in pruned]
        sizes = kwargs.get("image_sizes")
        for chunk in self._chunks(images):
            features = run_tower(self.vision_tower, torch.cat([images[number] for number in chunk]))
            tiles = [images[number].shape[0] for number in chunk]
            rows = []
            for number, tokens, scores, keys in zip(chunk, *(tensor.split(tiles) for tensor in features), strict=True):
                index = pruned[number]
                rows.append(self._prune(TileFeatures(tokens, scores, keys), splits[index], sizes, index))
            # One projector call for the chunk: only the rows that stay are projected.
            projected = self.multi_modal_projector(torch.cat(rows)).split([len(row) for row in rows])
            outputs.update(zip([pruned[number] for number in chunk], projected, strict=True))
        return [outputs[index] for index in range(len(splits))]

    def _prune(self, features: TileFeatures, split: TokenSplit, sizes: Any, index: int) -> Tensor:
        height, width = sizes[index].tolist() if sizes is not None else (self.geometry.tile_size,) * 2
        tiles = prune_tiles(features, split)
        if self.encoder_observer is not None:
            self.encoder_observer(tiles)
        side = self.geometry.tile_size // self.geometry.patch_size
        return order_image(tiles.tokens, tiles.kept, self.geometry.tile_grid(height, width), side)

    @staticmethod
    def _tiles(pixel_values: Tensor) -> Tensor:
        """(T, 3, height, width) of one image; LLaVA-1.5 has one view and no dimension for it."""
        return pixel_values if pixel_values.ndim == 4 else pixel_values.unsqueeze(0)

    def _chunks(self, images: Sequence[Tensor]) -> Iterator[list[int]]:
        """Consecutive images whose tiles together stay within the tower's bound."""
        chunk: list[int] = []
        num_tiles = 0
        for number, tiles in enumerate(images):
            if chunk and num_tiles + tiles.shape[0] > self.max_tower_tiles:
                yield chunk
                chunk, num_tiles = [], 0
            chunk.append(number)
            num_tiles += tiles.shape[0]
        if chunk:
            yield chunk


@MULTIMODAL_REGISTRY.register_processor(
    LlavaNextBudgetProcessor, info=LlavaNextBudgetInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class VisionDropLlavaNextForConditionalGeneration(_StagedPruning, LlavaNextForConditionalGeneration):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    LlavaBudgetProcessor, info=LlavaBudgetInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class VisionDropLlavaForConditionalGeneration(_StagedPruning, LlavaForConditionalGeneration):
    pass


def _take(batch: Any, indices: Sequence[int]) -> Any:
    """Some images of a batched field, which is a tensor or a list of tensors."""
    return batch[list(indices)] if isinstance(batch, Tensor) else [batch[index] for index in indices]


def _staged_kv_cache_spec(
    stock: Callable[[VllmConfig], KVCacheSpec | None], stage: int, vllm_config: VllmConfig
) -> StagedAttentionSpec | None:
    spec = stock(vllm_config)
    return None if spec is None else StagedAttentionSpec.of(spec, stage)
