"""Every refusal of the engine side, each with the setting to change. What is not known to work is refused.

Called when vLLM has put its configuration together, before any weight is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vd_plugin.options import read_geometry

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def check_engine(vllm_config: VllmConfig) -> None:
    """Refuse engine settings that pruning does not support.

    Raises:
        NotImplementedError: an unsupported combination; names the setting to change.
        ValueError: a wrong option of ours.
    """
    check_model(vllm_config.model_config.hf_config)
    for reason in _unsupported_settings(vllm_config):
        raise NotImplementedError(f"VisionDrop does not support {reason}")


def check_model(hf_config: Any) -> None:
    """Refuse checkpoints whose vision side the method is not defined for.

    Raises:
        NotImplementedError: no CLIP tower, several feature layers, or a selection strategy other than "default".
        ValueError: a wrong option of ours.
    """
    tower = hf_config.vision_config.model_type
    if tower != "clip_vision_model":
        raise NotImplementedError(
            f"VisionDrop scores patches by the attention of CLIP's CLS token; this checkpoint's tower is {tower!r}"
        )
    if not isinstance(hf_config.vision_feature_layer, int):
        raise NotImplementedError("VisionDrop needs one vision_feature_layer; this checkpoint concatenates several")
    if hf_config.vision_feature_select_strategy != "default":
        raise NotImplementedError(
            "VisionDrop needs vision_feature_select_strategy 'default', which leaves CLS out of the stock features; "
            f"this checkpoint has {hf_config.vision_feature_select_strategy!r}"
        )
    geometry = read_geometry(hf_config)
    if geometry.boundaries:
        raise NotImplementedError(
            "VisionDrop does not prune inside the decoder in this version: set visiondrop.layers to []"
        )


def _unsupported_settings(vllm_config: VllmConfig) -> Iterator[str]:
    parallel = vllm_config.parallel_config
    multimodal = vllm_config.model_config.multimodal_config
    if not vllm_config.use_v2_model_runner:
        yield "vLLM's first model runner: set VLLM_USE_V2_MODEL_RUNNER=1"
    if parallel.pipeline_parallel_size > 1:
        yield "pipeline parallelism: set pipeline_parallel_size to 1"
    if parallel.prefill_context_parallel_size > 1 or parallel.decode_context_parallel_size > 1:
        yield "context parallelism: set prefill_context_parallel_size and decode_context_parallel_size to 1"
    if parallel.use_ubatching:
        yield "micro-batching: leave enable_dbo and ubatch_size unset"
    if vllm_config.speculative_config is not None:
        yield "speculative decoding: leave speculative_config unset"
    if vllm_config.lora_config is not None:
        yield "LoRA: leave enable_lora unset"
    if vllm_config.kv_transfer_config is not None or vllm_config.ec_transfer_config is not None:
        yield "KV and encoder-cache connectors: leave kv_transfer_config and ec_transfer_config unset"
    if multimodal is not None and multimodal.enable_mm_embeds:
        yield "precomputed image embeddings: leave enable_mm_embeds unset"
    if multimodal is not None and multimodal.mm_processor_cache_type == "shm":
        yield "the shared-memory processor cache: set mm_processor_cache_type to 'lru'"
