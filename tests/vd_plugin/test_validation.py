"""What is not known to work is refused, each with a sentence that names the setting to change."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engines import FAST
from vllm import envs
from vllm.config.compilation import CompilationMode, CUDAGraphMode
from vllm.config.vllm import OptimizationLevel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models.llama import LlamaModel
from vllm.multimodal.cache import engine_receiver_cache_from_config, processor_cache_from_config
from vllm.multimodal.cache.base import MultiModalProcessorOnlyCache
from vllm.platforms import current_platform

import vd_plugin
from vd_plugin.cpu.bootstrap import ENVIRONMENT
from vd_plugin.options import parse_options, read_geometry
from vd_plugin.validation import (
    check_decoder,
    check_engine,
    check_final,
    check_model,
    check_server,
    prepare_staged_engine,
)


@pytest.fixture(scope="module")
def real(random_model: Path) -> Any:
    """What vLLM makes of our arguments; made without a complaint."""
    return EngineArgs(
        **vd_plugin.engine_args(str(random_model), visiondrop={"layers": []}, **FAST)
    ).create_engine_config()


@pytest.fixture
def config(real: Any) -> Any:
    """A copy to change: whatever the checks read is copied, the rest shared."""
    changed = copy.copy(real)
    for part in ("cache_config", "compilation_config", "parallel_config", "scheduler_config"):
        setattr(changed, part, copy.copy(getattr(real, part)))
    changed.model_config = copy.copy(real.model_config)
    changed.model_config.multimodal_config = copy.copy(real.model_config.multimodal_config)
    changed.model_config.hf_config = copy.deepcopy(real.model_config.hf_config)
    return changed


def test_the_usual_settings_are_accepted(config: Any) -> None:
    check_engine(config)


FAKE = SimpleNamespace(fake=True)
"""Stands for any configuration object whose presence alone matters."""

REFUSED: list[tuple[str, Callable[[Any], object], str]] = [
    ("pipeline", lambda c: setattr(c.parallel_config, "pipeline_parallel_size", 2), "pipeline_parallel_size to 1"),
    ("pcp", lambda c: setattr(c.parallel_config, "prefill_context_parallel_size", 2), "prefill_context_parallel_size"),
    ("dcp", lambda c: setattr(c.parallel_config, "decode_context_parallel_size", 2), "decode_context_parallel_size"),
    ("dbo", lambda c: setattr(c.parallel_config, "enable_dbo", True), "enable_dbo and ubatch_size"),
    ("ubatch", lambda c: setattr(c.parallel_config, "ubatch_size", 2), "enable_dbo and ubatch_size"),
    ("speculative", lambda c: setattr(c, "speculative_config", FAKE), "speculative_config"),
    ("lora", lambda c: setattr(c, "lora_config", FAKE), "enable_lora"),
    ("kv connector", lambda c: setattr(c, "kv_transfer_config", FAKE), "kv_transfer_config"),
    ("offloading", lambda c: setattr(c.cache_config, "kv_offloading_size", 1.0), "kv_offloading_size"),
    ("ec connector", lambda c: setattr(c, "ec_transfer_config", FAKE), "ec_transfer_config"),
    ("embeds", lambda c: setattr(c.model_config.multimodal_config, "enable_mm_embeds", True), "enable_mm_embeds"),
    (
        "shm",
        lambda c: setattr(c.model_config.multimodal_config, "mm_processor_cache_type", "shm"),
        "mm_processor_cache_type to 'lru'",
    ),
]


@pytest.mark.parametrize(("change", "says"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_an_engine_setting_is_refused(config: Any, change: Callable[[Any], object], says: str) -> None:
    change(config)
    with pytest.raises(NotImplementedError, match=f"VisionDrop does not support .*{says}"):
        check_engine(config)


def test_the_first_model_runner_is_refused(config: Any, random_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    envs.disable_envs_cache()  # which a running engine switches on
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    with pytest.raises(NotImplementedError, match="set VLLM_USE_V2_MODEL_RUNNER=1"):
        check_engine(config)
    with pytest.raises(Exception, match="set VLLM_USE_V2_MODEL_RUNNER=1"):
        EngineArgs(**vd_plugin.engine_args(str(random_model), **FAST)).create_engine_config()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"enable_lora": True}, "enable_lora"),
        ({"enable_mm_embeds": True}, "enable_mm_embeds"),
        ({"kv_offloading_size": 1.0}, "kv_offloading_size"),
        ({"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}, "pipeline_parallel_size"),
    ],
    ids=repr,
)
def test_vllm_asks_before_it_starts(random_model: Path, arguments: dict[str, Any], says: str) -> None:
    """The check is reached on vLLM's own way to a configuration."""
    with pytest.raises(Exception, match=f"VisionDrop does not support .*{says}"):
        EngineArgs(**vd_plugin.engine_args(str(random_model), **{**FAST, **arguments})).create_engine_config()


MODELS: list[tuple[Callable[[Any], object], str]] = [
    (lambda c: setattr(c.vision_config, "model_type", "siglip_vision_model"), "tower is 'siglip_vision_model'"),
    (lambda c: setattr(c, "vision_feature_layer", [-2, -5]), "one vision_feature_layer"),
    (lambda c: setattr(c, "vision_feature_select_strategy", "full"), "has 'full'"),
]


@pytest.mark.parametrize(("change", "says"), MODELS, ids=[says for _, says in MODELS])
def test_a_model_is_refused(config: Any, change: Callable[[Any], object], says: str) -> None:
    check_model(config.model_config.hf_config)
    change(config.model_config.hf_config)
    with pytest.raises(NotImplementedError, match=says):
        check_model(config.model_config.hf_config)
    with pytest.raises(NotImplementedError, match=says):
        check_engine(config)


def test_wrong_options_in_a_configuration_are_refused(config: Any) -> None:
    config.model_config.hf_config.visiondrop = {"depth": 3}
    with pytest.raises(ValueError, match="options of 'visiondrop'"):
        check_engine(config)


# Refusals of decoder stages alone


@pytest.fixture
def staged(config: Any) -> Any:
    config.model_config.hf_config.visiondrop = {"layers": [2, 4, 6]}
    return config


def compile_stages(config: Any, mode: Any = None, graphs: Any = None) -> None:
    config.model_config.hf_config.visiondrop = {"layers": [2, 4, 6], "compile": True}
    config.compilation_config.mode, config.compilation_config.cudagraph_mode = mode, graphs


STAGED: list[tuple[str, Callable[[Any], object], str]] = [
    ("compiled", lambda c: setattr(c.compilation_config, "mode", CompilationMode.VLLM_COMPILE), "compilation mode"),
    (
        "one graph",
        lambda c: compile_stages(c, mode=CompilationMode.STOCK_TORCH_COMPILE),
        "one piece: leave compilation_config.mode",
    ),
    ("graphs", lambda c: setattr(c.compilation_config, "cudagraph_mode", CUDAGraphMode.FULL), "cudagraph_mode"),
    ("pieces", lambda c: setattr(c.compilation_config, "cudagraph_mode", CUDAGraphMode.PIECEWISE), "compile to true"),
    (
        "partitions",
        lambda c: setattr(c.compilation_config, "use_inductor_graph_partition", True),
        "use_inductor_graph_partition",
    ),
    ("scheduler", lambda c: setattr(c.scheduler_config, "scheduler_cls", "a.fake.Scheduler"), "scheduler_cls"),
    (
        "one group",
        lambda c: setattr(c.scheduler_config, "disable_hybrid_kv_cache_manager", True),
        "disable_hybrid_kv_cache_manager",
    ),
    (
        "cut prompts",
        lambda c: setattr(c.scheduler_config, "long_prefill_token_threshold", 99),
        "long_prefill_token_threshold",
    ),
    ("cache type", lambda c: setattr(c.cache_config, "cache_dtype", "fp8"), "kv_cache_dtype"),
    ("no chunks", lambda c: setattr(c.scheduler_config, "enable_chunked_prefill", False), "enable_chunked_prefill"),
]


@pytest.mark.parametrize(("change", "says"), [row[1:] for row in STAGED], ids=[row[0] for row in STAGED])
def test_a_setting_is_refused_with_decoder_stages_alone(
    staged: Any, change: Callable[[Any], object], says: str
) -> None:
    change(staged)
    with pytest.raises(NotImplementedError, match=f"VisionDrop does not support .*{says}.*, or visiondrop.layers to"):
        prepare_staged_engine(staged)
    staged.model_config.hf_config.visiondrop = {"layers": []}
    prepare_staged_engine(staged)


@pytest.mark.parametrize(
    ("level", "graphs"), [(0, CUDAGraphMode.NONE), *((level, CUDAGraphMode.FULL_DECODE_ONLY) for level in (1, 2, 3))]
)
def test_decode_steps_are_captured_except_at_the_lowest_level(staged: Any, level: int, graphs: CUDAGraphMode) -> None:
    """-O0 is vLLM's way to say "no CUDA graphs", and vLLM applies its levels after it has asked us."""
    staged.optimization_level = OptimizationLevel(level)
    staged.compilation_config.cudagraph_mode = None
    prepare_staged_engine(staged)
    assert staged.compilation_config.cudagraph_mode == graphs


@pytest.mark.parametrize("mode", [CUDAGraphMode.NONE, CUDAGraphMode.FULL_DECODE_ONLY])
def test_a_mode_of_graphs_that_is_set_stays(staged: Any, mode: CUDAGraphMode) -> None:
    staged.optimization_level = OptimizationLevel.O0
    staged.compilation_config.cudagraph_mode = mode
    prepare_staged_engine(staged)
    assert staged.compilation_config.cudagraph_mode == mode


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_modes_are_left_to_vllm_where_stages_are_compiled(staged: Any, level: int) -> None:
    staged.optimization_level = OptimizationLevel(level)
    compile_stages(staged)
    prepare_staged_engine(staged)
    assert (staged.compilation_config.mode, staged.compilation_config.cudagraph_mode) == (None, None)


@pytest.mark.parametrize(
    "mode", [CompilationMode.NONE, CompilationMode.DYNAMO_TRACE_ONCE, CompilationMode.VLLM_COMPILE]
)
@pytest.mark.parametrize("graphs", [mode for mode in CUDAGraphMode if mode != CUDAGraphMode.FULL])
def test_modes_that_are_set_stay_where_stages_are_compiled(
    staged: Any, mode: CompilationMode, graphs: CUDAGraphMode
) -> None:
    compile_stages(staged, mode, graphs)
    prepare_staged_engine(staged)
    assert (staged.compilation_config.mode, staged.compilation_config.cudagraph_mode) == (mode, graphs)


@pytest.mark.parametrize(
    ("variable", "graphs"),
    [
        (None, None),
        ("VLLM_BATCH_INVARIANT", CUDAGraphMode.FULL_DECODE_ONLY),
        ("VLLM_USE_BREAKABLE_CUDAGRAPH", CUDAGraphMode.FULL_DECODE_ONLY),
    ],
)
def test_stages_are_compiled_on_a_gpu_unless_whole_steps_are_recorded_with_breaks(
    staged: Any, variable: str | None, graphs: CUDAGraphMode | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    if variable:
        monkeypatch.setenv(variable, "1")
    staged.compilation_config.mode = staged.compilation_config.cudagraph_mode = None
    prepare_staged_engine(staged)
    assert staged.compilation_config.cudagraph_mode == graphs


def test_graphs_that_would_skip_pruning_are_refused(staged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    compile_stages(staged, CompilationMode.NONE, CUDAGraphMode.FULL_AND_PIECEWISE)
    with pytest.raises(NotImplementedError, match=r"breakable CUDA graphs, .*: set visiondrop\.compile to false"):
        prepare_staged_engine(staged)


def test_the_usual_settings_are_accepted_with_decoder_stages(staged: Any) -> None:
    prepare_staged_engine(staged)
    assert staged.scheduler_config.scheduler_cls == "vd_plugin.scheduler.VisionDropScheduler"


@pytest.mark.parametrize(("change", "says"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_settings_are_looked_at_again_when_they_are_final(
    staged: Any, change: Callable[[Any], object], says: str
) -> None:
    """vLLM derives some from others after it has asked us: the scheduler, which comes last, asks again."""
    prepare_staged_engine(staged)
    check_final(staged)
    change(staged)
    with pytest.raises(NotImplementedError, match=f"VisionDrop does not support .*{says}"):
        check_final(staged)


def test_the_front_end_always_sends_images(random_model: Path) -> None:
    """vLLM's caches by name, one on each side, drift apart: see `prepare_engine`."""
    config = EngineArgs(**vd_plugin.engine_args(str(random_model), **FAST)).create_engine_config()
    assert type(processor_cache_from_config(config)) is MultiModalProcessorOnlyCache
    assert engine_receiver_cache_from_config(config) is None


@pytest.mark.parametrize("flag", ["enable_scale_out", "tokens_only"])
def test_routes_past_our_processor_are_refused(flag: str) -> None:
    args = SimpleNamespace(enable_scale_out=False, tokens_only=False)
    check_server(args)
    setattr(args, flag, True)
    with pytest.raises(NotImplementedError, match="--enable-scale-out and --tokens-only"):
        check_server(args)


def test_an_unknown_decoder_is_refused_with_decoder_stages_alone(staged: Any) -> None:
    fake = SimpleNamespace(layers=[SimpleNamespace(self_attn=FAKE)])
    with pytest.raises(NotImplementedError, match="inside Llama, Mistral and Qwen2 decoders, not SimpleNamespace"):
        check_decoder(fake, read_geometry(staged.model_config.hf_config))
    staged.model_config.hf_config.visiondrop = {"layers": []}
    check_decoder(fake, read_geometry(staged.model_config.hf_config))


@pytest.mark.parametrize("what", ["qk_norm", "do_llama_4_scaling"])
def test_attention_that_does_more_is_refused(staged: Any, what: str) -> None:
    """`segments.py` and `decoder.py` apply projections and rotary embedding by themselves."""
    geometry = read_geometry(staged.model_config.hf_config)
    known: Any = object.__new__(LlamaModel)
    object.__setattr__(known, "layers", [SimpleNamespace(self_attn=SimpleNamespace())])
    check_decoder(known, geometry)
    setattr(known.layers[0].self_attn, what, True)
    with pytest.raises(NotImplementedError, match="inside Llama, Mistral and Qwen2 decoders"):
        check_decoder(known, geometry)


# engine_args


def test_engine_args_add_to_what_they_are_given(random_model: Path) -> None:
    arguments = vd_plugin.engine_args(
        str(random_model), visiondrop={"layers": []}, max_model_len=99, hf_overrides={"vision_feature_layer": -1}
    )
    assert arguments == {
        "model": str(random_model),
        "max_model_len": 99,
        "hf_overrides": {
            "vision_feature_layer": -1,
            "architectures": ["VisionDropLlavaNextForConditionalGeneration"],
            "visiondrop": {"layers": []},
        },
    }


def test_engine_args_know_both_models(llava15: Path) -> None:
    assert vd_plugin.engine_args(str(llava15))["hf_overrides"]["architectures"] == [
        "VisionDropLlavaForConditionalGeneration"
    ]


@pytest.mark.parametrize("path", ["/no/such/folder", "./no-such-folder", "../no-such-folder"])
def test_a_missing_folder_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match=f"no such model folder: {re.escape(path)}"):
        vd_plugin.engine_args(path)


def test_an_unknown_name_is_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match="neither as a folder nor as a model id") as caught:
        vd_plugin.engine_args("no-such-name")
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        vd_plugin.engine_args(str(tmp_path))


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model_type": "no-such-type"}'])
def test_a_configuration_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="cannot read a model configuration"):
        vd_plugin.engine_args(str(tmp_path))


def test_another_kind_of_checkpoint_is_refused(tmp_path: Path, random_model: Path) -> None:
    decoder = json.loads((random_model / "config.json").read_text())["text_config"]
    (tmp_path / "config.json").write_text(json.dumps(decoder))
    with pytest.raises(ValueError, match="is a 'llama' checkpoint; VisionDrop serves llava_next and llava"):
        vd_plugin.engine_args(str(tmp_path))


@pytest.mark.parametrize(
    "options",
    [
        {"layer": [1]},
        {"layers": [], "budget": 3},
        {"layers": "2,4,6"},
        {"layers": 4},
        {"compile": 1},
        {"compile": "no"},
        {"allow_processor_kwargs": "all"},
        {"allow_processor_kwargs": [1]},
        {"allow_processor_kwargs": ["size"]},
    ],
    ids=repr,
)
def test_unknown_options_are_refused(random_model: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="visiondrop"):
        vd_plugin.engine_args(str(random_model), visiondrop=options)


@pytest.mark.parametrize("layers", [[1.0, 2, 3], [True, 2, 3], ["2", 4, 6], [None], {2, 4, 6}], ids=repr)
def test_depths_that_are_no_integers_are_refused(layers: Any) -> None:
    with pytest.raises(ValueError, match="must be a list of decoder depths"):
        parse_options({"layers": layers})


def test_overrides_by_a_function_are_refused(random_model: Path) -> None:
    with pytest.raises(ValueError, match="hf_overrides must be a mapping"):
        vd_plugin.engine_args(str(random_model), hf_overrides=lambda config: config)


def test_engine_args_may_come_before_vllm_is_imported(random_model: Path) -> None:
    """transformers imports Triton on its way, which reads only then whether it is to interpret.

    Without vLLM's variables at that point the first request fails: "Cannot call @triton.jit'd outside of a kernel".
    """
    code = (
        "import sys, vd_plugin; vd_plugin.engine_args(sys.argv[1]); import vllm, triton, triton.language as tl;"
        "print(type(tl.cdiv).__name__, triton.knobs.runtime.interpret)"
    )
    import torch

    if torch.version.cuda is not None:
        pytest.skip("Triton's interpreter is for machines without a GPU")
    fresh = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    ran = subprocess.run(
        [sys.executable, "-c", code, str(random_model)], env=fresh, capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == ["InterpretedFunction", "True"]


def test_options_within_hf_overrides_are_kept(random_model: Path) -> None:
    """They are all that vLLM's own command line can say."""
    given = {"hf_overrides": {"visiondrop": {"layers": [1, 2, 3]}, "other": 1}}
    merged = vd_plugin.engine_args(str(random_model), **given)["hf_overrides"]
    assert (merged["visiondrop"], merged["other"]) == ({"layers": [1, 2, 3]}, 1)
    argued = vd_plugin.engine_args(str(random_model), visiondrop={"layers": []}, **given)["hf_overrides"]
    assert argued["visiondrop"] == {"layers": []}
