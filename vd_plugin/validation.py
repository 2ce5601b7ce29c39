"""Every refusal of the engine side, each with the setting to change. What is not known to work is refused.

Called when vLLM has put its configuration together, before any weight is read.
"""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vd_plugin.options import read_geometry, read_options
from vd_plugin.schedule import Geometry

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(f"vllm.{__name__}")
"""vLLM shows the log lines of its own name space only."""

SCHEDULER = "vd_plugin.scheduler.VisionDropScheduler"

CONNECTORS = (
    "KV and encoder-cache connectors: leave kv_transfer_config, ec_transfer_config and kv_offloading_size unset"
)
TOKEN_ROUTES = "images that were processed elsewhere: leave --enable-scale-out and --tokens-only out"
"""Routes of vLLM's server on which clients send token ids and tensors, past our processor."""


def check_engine(vllm_config: VllmConfig) -> None:
    """Refuse engine settings that pruning does not support.

    Raises:
        NotImplementedError: an unsupported combination; names the setting to change.
        ValueError: a wrong option of ours.
    """
    check_model(vllm_config.model_config.hf_config)
    for reason in _unsupported_settings(vllm_config):
        raise NotImplementedError(f"VisionDrop does not support {reason}")


def check_final(vllm_config: VllmConfig) -> None:
    """The same refusals for an engine with decoder stages, once nothing can change its settings any more.

    vLLM derives settings from others after our first check: offloading of KV blocks becomes a connector.

    Raises:
        NotImplementedError: an unsupported combination; names the setting to change.
    """
    for reason in (*_unsupported_settings(vllm_config), *_unsupported_in_stages(vllm_config)):
        raise NotImplementedError(f"VisionDrop does not support {reason}")


def check_server(args: Namespace) -> None:
    """Refuse options of vLLM's server that are not part of its engine configuration.

    Raises:
        NotImplementedError: routes that take images past our processor.
    """
    if args.enable_scale_out or args.tokens_only:
        raise NotImplementedError(f"VisionDrop does not support {TOKEN_ROUTES}")


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
    read_geometry(hf_config)


def check_decoder(decoder: Any, geometry: Geometry) -> None:
    """Refuse decoders that `decoder.py` does not know how to run stage by stage.

    Raises:
        NotImplementedError: not a stack of Llama-shaped layers.
    """
    if not geometry.boundaries:
        return
    from vllm.model_executor.models.llama import LlamaModel
    from vllm.model_executor.models.qwen2 import Qwen2Model

    attention = decoder.layers[0].self_attn
    has_more = any(getattr(attention, name, False) for name in ("qk_norm", "do_llama_4_scaling"))
    if not isinstance(decoder, LlamaModel | Qwen2Model) or has_more:
        raise NotImplementedError(
            f"VisionDrop prunes inside Llama, Mistral and Qwen2 decoders, not {type(decoder).__name__}: "
            "set visiondrop.layers to [] to prune at the encoder alone"
        )


def prepare_engine(vllm_config: VllmConfig) -> None:
    """Set the engine flags that budgets need.

    vLLM's front end remembers which processed images the engine core has, and sends those by name. It is wrong about an
    image whose first request was refused or dropped after processing, or has been overtaken by another one with the
    same image: that one fails. Here the front end keeps the processed images itself, and always sends them.
    """
    multimodal = vllm_config.model_config.multimodal_config
    if multimodal is not None:
        multimodal.mm_processor_cache_type = "processor_only"


def prepare_staged_engine(vllm_config: VllmConfig) -> None:
    """Set the engine flags that pruning inside the decoder needs, unless they are set already.

    Raises:
        NotImplementedError: a flag has another value; names the setting to change.
    """
    from vllm.config.compilation import CompilationMode, CUDAGraphMode
    from vllm.config.vllm import OptimizationLevel

    geometry = read_geometry(vllm_config.model_config.hf_config)
    if not geometry.boundaries:
        return
    scheduler, compilation = vllm_config.scheduler_config, vllm_config.compilation_config
    if not _compiles(vllm_config):
        # Stages run layer by layer; decode steps are captured as full graphs.
        if compilation.mode is None:
            compilation.mode = CompilationMode.NONE
        if compilation.cudagraph_mode is None:
            without = vllm_config.optimization_level == OptimizationLevel.O0
            compilation.cudagraph_mode = CUDAGraphMode.NONE if without else CUDAGraphMode.FULL_DECODE_ONLY
    for reason in _unsupported_in_stages(vllm_config):
        raise NotImplementedError(f"VisionDrop does not support {reason}, or visiondrop.layers to []")
    scheduler.scheduler_cls = SCHEDULER
    # An image is computed whole, beside every request that decodes.
    needed = geometry.max_full_tokens() + scheduler.max_num_seqs
    if scheduler.max_num_batched_tokens < needed:
        logger.warning(
            "max_num_batched_tokens raised from %d to %d: one image of %d tokens beside max_num_seqs=%d decodes",
            scheduler.max_num_batched_tokens, needed, geometry.max_full_tokens(), scheduler.max_num_seqs,
        )  # fmt: skip
        scheduler.max_num_batched_tokens = needed
        scheduler.max_num_encoder_input_tokens = max(scheduler.max_num_encoder_input_tokens, needed)
        scheduler.encoder_cache_size = max(scheduler.encoder_cache_size, needed)


def _compiles(vllm_config: VllmConfig) -> bool:
    """Whether vLLM may compile the stages of the decoder.

    Not by default on a machine without a GPU: it takes a C++ compiler and some minutes, and gains little there. Nor
    where vLLM records whole steps with breaks instead, as it does for batch invariance: a replay would not prune.
    """
    from vllm import envs
    from vllm.platforms import current_platform

    asked = read_options(vllm_config.model_config.hf_config).compile
    if asked is not None:
        return asked
    return not (current_platform.is_cpu() or envs.VLLM_BATCH_INVARIANT or envs.VLLM_USE_BREAKABLE_CUDAGRAPH)


def _unsupported_in_stages(vllm_config: VllmConfig) -> Iterator[str]:
    from vllm import envs
    from vllm.config.compilation import CompilationMode, CUDAGraphMode

    scheduler, compilation = vllm_config.scheduler_config, vllm_config.compilation_config
    mode, graphs = compilation.mode, compilation.cudagraph_mode
    # What is still unset here becomes vLLM's default: compiled, with full graphs for decode and pieces for the rest.
    if not _compiles(vllm_config):
        if mode != CompilationMode.NONE:
            yield f"compilation mode {mode and mode.name} without compiled stages: set visiondrop.compile to true"
        if graphs is not None and graphs.has_piecewise_cudagraphs():
            yield f"a cudagraph_mode of {graphs.name} without compiled stages: set visiondrop.compile to true"
    if mode == CompilationMode.STOCK_TORCH_COMPILE:
        yield "compiling the model as one piece: leave compilation_config.mode unset"
    if graphs == CUDAGraphMode.FULL:
        yield "CUDA graphs of whole steps that prune: leave cudagraph_mode unset"
    if graphs is not None and graphs.has_piecewise_cudagraphs() and envs.VLLM_USE_BREAKABLE_CUDAGRAPH:
        yield "breakable CUDA graphs, which batch invariance turns on: set visiondrop.compile to false"
    if compilation.use_inductor_graph_partition:
        yield "partitions made by Inductor: leave use_inductor_graph_partition unset"
    if scheduler.scheduler_cls not in (None, SCHEDULER):
        yield "another scheduler: leave scheduler_cls unset"
    if scheduler.disable_hybrid_kv_cache_manager:
        yield "one KV-cache group for all layers: leave disable_hybrid_kv_cache_manager unset"
    if scheduler.long_prefill_token_threshold > 0:
        yield "cutting long prompts short of an image: leave long_prefill_token_threshold unset"
    if vllm_config.cache_config.cache_dtype != "auto":
        yield f"a KV cache of {vllm_config.cache_config.cache_dtype}: set kv_cache_dtype to auto"
    if not scheduler.enable_chunked_prefill:
        yield "prompts without chunks: leave enable_chunked_prefill unset"


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
    if (
        vllm_config.kv_transfer_config is not None
        or vllm_config.ec_transfer_config is not None
        or vllm_config.cache_config.kv_offloading_size is not None  # becomes a connector after our check
    ):
        yield CONNECTORS
    if multimodal is not None and multimodal.enable_mm_embeds:
        yield "precomputed image embeddings: leave enable_mm_embeds unset"
    if multimodal is not None and multimodal.mm_processor_cache_type == "shm":
        yield "the shared-memory processor cache: set mm_processor_cache_type to 'lru'"
