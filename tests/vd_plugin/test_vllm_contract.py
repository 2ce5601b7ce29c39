"""Everything of vLLM that `vd_plugin/` leans on, by name and signature: an upgrade fails here first, with a name."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

import vd_plugin
from server.admission.context_length import ContextLength
from server.errors import InvalidRequestError
from server.schemas.completions import CompletionRequest

CLIP = "vllm.model_executor.models.clip"
LLAVA = "vllm.model_executor.models.llava"
NEXT = "vllm.model_executor.models.llava_next"
PROCESSING = "vllm.multimodal.processing"

SIGNATURES = {
    # processor.py: overridden, called, or called back
    f"{PROCESSING}.processor:BaseMultiModalProcessor.apply": ["self", "inputs", "timing_ctx"],
    f"{PROCESSING}.processor:BaseMultiModalProcessor._get_mm_hashes": ["self", "inputs"],
    f"{PROCESSING}.processor:BaseMultiModalProcessor._get_cache_missing_processor_kwargs": [
        "self",
        "inputs",
        "mm_is_cached",
    ],
    f"{PROCESSING}.processor:BaseMultiModalProcessor._apply_hf_processor_main": ["self", "mm_items", "hf_kwargs"],
    f"{NEXT}:LlavaNextMultiModalProcessor._get_mm_fields_config": ["self", "hf_inputs", "hf_processor_mm_kwargs"],
    f"{LLAVA}:LlavaMultiModalProcessor._get_mm_fields_config": ["self", "hf_inputs", "hf_processor_mm_kwargs"],
    f"{PROCESSING}.processor:BaseMultiModalProcessor._get_prompt_updates": [
        "self",
        "mm_items",
        "hf_processor_mm_kwargs",
        "out_mm_kwargs",
    ],
    f"{PROCESSING}:InputProcessingContext": ["model_config", "tokenizer"],
    f"{PROCESSING}:InputProcessingContext.get_merged_mm_kwargs": ["self", "kwargs", "supported_mm_processor_kwargs"],
    f"{PROCESSING}:InputProcessingContext.get_mm_config": ["self"],
    f"{PROCESSING}:BaseProcessingInfo.get_mm_max_tokens_per_item": ["self", "seq_len", "mm_counts"],
    f"{PROCESSING}:PromptReplacement": ["modality", "target", "replacement"],
    f"{NEXT}:LlavaNextProcessingInfo": ["ctx"],
    f"{LLAVA}:LlavaProcessingInfo": ["ctx"],
    "vllm.config.multimodal:MultiModalConfig.merge_mm_processor_kwargs": ["self", "inference_kwargs"],
    "vllm.multimodal.inputs:MultiModalFieldConfig.batched": ["modality", "keep_on_cpu"],
    "vllm.multimodal.parse:MultiModalDataItems.get_items": ["self", "modality", "typ"],
    "vllm.multimodal.parse:MultiModalDataItems.get_all_counts": ["self"],
    "vllm.multimodal.parse:ImageProcessorItems.get": ["self", "index"],
    "vllm.multimodal.parse:ImageProcessorItems.get_image_size": ["self", "item_idx"],
    "vllm.exceptions:VLLMValidationError": ["message", "parameter", "value"],
    # model.py
    f"{NEXT}:LlavaNextForConditionalGeneration": ["vllm_config", "prefix"],
    f"{LLAVA}:LlavaForConditionalGeneration": ["vllm_config", "prefix"],
    f"{NEXT}:LlavaNextForConditionalGeneration.embed_multimodal": ["self", "kwargs"],
    f"{LLAVA}:LlavaForConditionalGeneration.embed_multimodal": ["self", "kwargs"],
    "vllm.multimodal.registry:MultiModalRegistry.register_processor": ["self", "processor", "info", "dummy_inputs"],
    # vision.py
    f"{CLIP}:CLIPVisionEmbeddings.forward": ["self", "pixel_values"],
    f"{CLIP}:CLIPEncoderLayer.forward": ["self", "hidden_states"],
    f"{CLIP}:CLIPMLP.forward": ["self", "hidden_states"],
    f"{CLIP}:CLIPAttention.forward": ["self", "hidden_states"],
    "vllm.distributed:tensor_model_parallel_all_gather": ["input_", "dim"],
    # request_checks.py, which wraps these
    "vllm.v1.engine.input_processor:InputProcessor.process_inputs": [
        "self",
        "request_id",
        "prompt",
        "params",
        "supported_tasks",
    ],
    "vllm.renderers.base:BaseRenderer._process_tokens": ["self", "prompt", "skip_mm_cache"],
    "vllm.renderers.base:BaseRenderer._process_tokens_async": ["self", "prompt", "skip_mm_cache"],
    "vllm.renderers.base:BaseRenderer.get_mm_processor": ["self"],
    # scheduler.py, kv_cache.py
    "vllm.v1.core.sched.scheduler:Scheduler.schedule": ["self", "throttle_prefills"],
    "vllm.v1.core.sched.scheduler:Scheduler._get_local_prefix_cache_hit": ["self", "request"],
    "vllm.v1.core.sched.scheduler:Scheduler._try_schedule_encoder_inputs": [
        "self",
        "request",
        "num_computed_tokens",
        "num_new_tokens",
        "encoder_compute_budget",
        "shift_computed_tokens",
    ],
    "vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots": ["self", "request", "num_new_tokens"],
    "vllm.v1.core.kv_cache_manager:KVCacheManager.cache_blocks": ["self", "request", "num_computed_tokens"],
    "vllm.v1.core.kv_cache_manager:KVCacheManager.free": ["self", "request"],
    "vllm.v1.core.kv_cache_manager:KVCacheManager.pop_blocks_for_free": ["self", "request"],
    "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.cache_blocks": [
        "self",
        "request",
        "num_tokens",
        "retention_interval",
        "replay_boundaries",
    ],
    "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.allocate_new_blocks": [
        "self",
        "request_id",
        "num_tokens",
        "num_tokens_main_model",
    ],
    # model_state.py
    "vllm.v1.worker.gpu.buffer_utils:UvaBackedTensor": ["size", "dtype", "max_concurrency"],
    "vllm.v1.worker.gpu.buffer_utils:UvaBackedTensor.copy_to_uva": ["self", "n"],
    # register.py, validation.py, geometry_route.py
    "vllm.model_executor.models.config:VerifyAndUpdateConfig.verify_and_update_config": ["vllm_config"],
    "vllm.model_executor.models.registry:_ModelRegistry.register_model": ["self", "model_arch", "model_cls"],
    "vllm.model_executor.models.registry:_ModelRegistry.get_supported_archs": ["self"],
    # engine.py
    "vllm.entrypoints.launchers.api_server.entry:run_server": ["args"],
    "vllm.entrypoints.launchers.cli_args:make_arg_parser": ["parser"],
    "vllm.entrypoints.launchers.cli_args:validate_parsed_serve_args": ["args"],
    "vllm.entrypoints.serve.utils.api_utils:cli_env_setup": [],
    "vllm.entrypoints.cli.serve:run_headless": ["args"],
    "vllm.logger:configure_logging_from_args": ["args"],
    # tool_parsers.py
    "vllm.renderers.chat_utils:load_chat_template": ["chat_template"],
    "vllm.tokenizers:get_tokenizer": ["tokenizer_name"],
    "vllm.tool_parsers:ToolParserManager.get_tool_parser": ["name"],
    "vllm.tool_parsers:ToolParser": ["tokenizer", "tools"],
    "vllm.tool_parsers:ToolParser.extract_tool_calls": ["self", "model_output", "request"],
}

FIELDS = {
    "vllm.config:VllmConfig": [
        "ec_transfer_config",
        "kv_transfer_config",
        "lora_config",
        "model_config",
        "optimization_level",
        "parallel_config",
        "scheduler_config",
        "speculative_config",
    ],
    "vllm.config:ModelConfig": ["max_model_len", "multimodal_config"],
    "vllm.config:ParallelConfig": [
        "data_parallel_size",
        "decode_context_parallel_size",
        "enable_dbo",
        "pipeline_parallel_size",
        "prefill_context_parallel_size",
        "ubatch_size",
    ],
    "vllm.config.multimodal:MultiModalConfig": ["enable_mm_embeds", "mm_hasher_algorithm", "mm_processor_cache_type"],
    "vllm.config:SchedulerConfig": ["max_num_encoder_input_tokens", "max_num_seqs"],
    f"{PROCESSING}:ProcessorInputs": ["hf_processor_mm_kwargs", "mm_data_items", "mm_uuid_items", "prompt"],
    "vllm.config:CacheConfig": ["cache_dtype", "kv_offloading_size", "num_gpu_blocks"],
}
"""Dataclass -> the fields that we read, or replace."""

NAMES = [
    "vllm:ModelRegistry",
    "vllm.config:ParallelConfig.use_ubatching",
    "vllm.config:VllmConfig.use_v2_model_runner",
    "vllm.engine.protocol:EngineClient",
    "vllm.inputs:MultiModalHashes",
    "vllm.inputs:MultiModalInput",
    f"{LLAVA}:LlavaDummyInputsBuilder",
    "vllm.model_executor.models.config:MODELS_CONFIG_MAP",
    "vllm.multimodal:MULTIMODAL_REGISTRY",
    "vllm.multimodal.inputs:MultiModalKwargsItems",
    f"{PROCESSING}:PromptUpdate",
    f"{PROCESSING}.context:TimingContext",
    "vllm.tokenizers:TokenizerLike.max_chars_per_token",
    "vllm.utils.argparse_utils:FlexibleArgumentParser",
]

FLAGS = [
    "chat_template",
    "enable_auto_tool_choice",
    "enable_prompt_tokens_details",
    "enable_scale_out",
    "headless",
    "hf_overrides",
    "host",
    "model",
    "revision",
    "shutdown_timeout",
    "skip_tokenizer_init",
    "tokenizer",
    "tokenizer_mode",
    "tokenizer_revision",
    "tokens_only",
    "tool_call_parser",
    "trust_remote_code",
    "trust_request_mm_kwargs",
    "uds",
]
"""Of vLLM's server, which engine.py, tool_parsers.py and drain.py read or set."""


@pytest.mark.parametrize("name", NAMES)
def test_a_name_exists(name: str) -> None:
    assert _find(name) is not None


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_signature_is_the_known_one(name: str) -> None:
    """Further parameters may come, if they have defaults."""
    known = SIGNATURES[name]
    parameters = inspect.signature(_find(name)).parameters
    assert list(parameters)[: len(known)] == known
    for parameter in list(parameters.values())[len(known) :]:
        assert parameter.default is not parameter.empty or parameter.kind in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        )


@pytest.mark.parametrize("name", FIELDS)
def test_a_dataclass_has_the_fields(name: str) -> None:
    missing = set(FIELDS[name]) - set(_find(name).__dataclass_fields__)
    assert not missing


def test_the_server_has_the_flags() -> None:
    parser = _find("vllm.utils.argparse_utils:FlexibleArgumentParser")(prog="test")
    parser = _find("vllm.entrypoints.launchers.cli_args:make_arg_parser")(parser)
    arguments = parser.parse_args(["--model", "any"])
    assert not [flag for flag in FLAGS if not hasattr(arguments, flag)]


@pytest.mark.parametrize(
    ("fields", "check"),
    [
        (
            {"prompt": "x" * 401},
            lambda params: params._text_len_check(SimpleNamespace(max_chars_per_token=4), "x" * 401),
        ),
        ({"prompt": [7] * 150}, lambda params: params._token_len_check(None, [7] * 150)),
        ({"prompt": "x", "max_tokens": 101}, lambda params: replace(params, max_output_tokens=101)),
    ],
)
def test_the_gateway_refuses_what_is_too_long_in_the_servers_words(fields: dict[str, Any], check: Any) -> None:
    """server/admission/context_length.py repeats the sentences and the bound."""
    params = _find("vllm.renderers.params:TokenizeParams")(
        max_total_tokens=100, max_total_tokens_param="max_model_len", max_output_tokens_param="max_tokens"
    )
    with pytest.raises(_find("vllm.exceptions:VLLMValidationError")) as theirs:
        check(params)
    with pytest.raises(InvalidRequestError) as ours:
        ContextLength(100, 4).check(CompletionRequest.parse(json.dumps(fields).encode()))
    assert ours.value.message == theirs.value.args[0]


def test_signals_are_taken_and_the_server_is_known_when_the_app_starts() -> None:
    """drain.py takes the signals over in the app's start-up, and ends the server that it finds there."""
    build = inspect.getsource(_find("vllm.entrypoints.launchers.app:build_app"))
    assert "app.state.args = args" in build
    source = inspect.getsource(_find("vllm.entrypoints.launchers.launcher:serve_http"))
    known, begins = source.index("app.state.server = server"), source.index("loop.create_task(server.serve(")
    taken = source.index("loop.add_signal_handler(signal.SIGTERM")
    assert known < begins < taken
    assert "await" not in source[begins:taken], "the server's task does not run before that"


def test_the_number_of_blocks_is_known_when_the_real_cache_is_laid_out_and_not_before() -> None:
    """model_state.py tells by it the cache that vLLM throws away once it has measured CUDA graphs."""
    real = inspect.getsource(_find("vllm.v1.worker.gpu_worker:Worker.initialize_from_config"))
    assert real.index("cache_config.num_gpu_blocks = ") < real.index("model_runner.initialize_kv_cache(")
    module = "vllm.v1.worker.gpu.cudagraph_utils"
    thrown_away = inspect.getsource(_find(f"{module}:_init_minimal_kv_cache_for_profiling"))
    assert thrown_away.index("runner.initialize_kv_cache(") < thrown_away.index("cache_config.num_gpu_blocks = ")
    assert "cache_config.num_gpu_blocks = None" in inspect.getsource(_find(f"{module}:_teardown_profiling_state"))
    assert "initialize_from_config" not in vars(_find("vllm.v1.worker.cpu_worker:CPUWorker"))


@pytest.mark.engine
@pytest.mark.slow
def test_the_tower_is_built_of_the_parts_that_we_run(random_model: Any) -> None:
    """`run_tower` writes the last layer out by the names of its parts."""
    import engines

    def look(model: Any) -> None:
        vision = model.vision_tower.vision_model
        assert isinstance(vision.pre_layrnorm, nn.LayerNorm)
        assert vision.post_layernorm is None or isinstance(vision.post_layernorm, nn.LayerNorm)
        layer = vision.encoder.layers[-1]
        assert len(vision.encoder.layers) == model.config.vision_config.num_hidden_layers - 1, "feature layer -2"
        for name in ("layer_norm1", "layer_norm2", "mlp"):
            assert isinstance(getattr(layer, name), nn.Module)
        attention = layer.self_attn
        for name in ("qkv_proj", "out_proj", "attn"):
            assert isinstance(getattr(attention, name), nn.Module)
        assert attention.num_heads == attention.num_heads_per_partition * attention.tp_size
        assert attention.scale == attention.head_dim**-0.5
        assert isinstance(model.multi_modal_projector, nn.Module)

    engines.start(random_model).on_model(look)


def test_our_processors_override_what_exists() -> None:
    """A renamed hook of vLLM's would leave ours uncalled, in silence."""
    ours = _find("vd_plugin.processor:_BudgetProcessor")
    for stock in (f"{NEXT}:LlavaNextMultiModalProcessor", f"{LLAVA}:LlavaMultiModalProcessor"):
        own = {"_check_images", "_check_places", "_check_processed", "_resolve", "_resolve_image"}
        hooks = {name for name, value in vars(ours).items() if callable(value)} - own
        assert len(hooks) == 6
        assert not {name for name in hooks if not hasattr(_find(stock), name)}


def _imported() -> set[str]:
    """All that the plugin's files import from vLLM, wherever in the file."""
    found = set()
    for path in Path(vd_plugin.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                found |= {f"{node.module}:{alias.name}" for alias in node.names}
    return found


def test_everything_that_the_plugin_imports_exists() -> None:
    assert len(_imported()) > 20
    missing = []
    for name in sorted(_imported()):
        try:
            _find(name)
        except (ImportError, AttributeError) as error:
            missing.append(f"{name}: {error}")
    assert not missing


def _find(name: str) -> Any:
    module, _, path = name.partition(":")
    found = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found
