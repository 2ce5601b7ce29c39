"""`visiondrop plan`: figures that can be checked by hand, sentences where a plan does not work, and no heavy import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import published_configs
import pytest
from vllm.config.cache import CacheConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vd_plugin.kv_capacity import max_cost
from vd_plugin.model_config import complete
from vd_plugin.plan import BLOCK_SIZE, ELEMENT_BYTES, GIB, GPU_MEMORY_UTILIZATION, Plan, Request, make_plan
from vd_plugin.schedule import resolve
from vd_plugin.tools import plan as tool

ROOT = Path(__file__).resolve().parents[2]
USUAL = Request(None, 60, 256, 640)


@pytest.fixture
def vicuna(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(published_configs.VICUNA_7B))
    return str(tmp_path)


def plan_vicuna(request: Request = USUAL, **settings: Any) -> Plan:
    return make_plan(complete(published_configs.VICUNA_7B), request, **({"gpu_memory_gib": 80} | settings))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        status = tool.main(arguments)
    except SystemExit as end:
        status = int(end.code or 0)
    return status, *capsys.readouterr()


def test_defaults_are_those_of_vllm() -> None:
    assert CacheConfig.__pydantic_fields__["gpu_memory_utilization"].default == GPU_MEMORY_UTILIZATION
    assert CacheConfig.DEFAULT_BLOCK_SIZE == BLOCK_SIZE


def test_a_vicuna_on_80_gib() -> None:
    plan = plan_vicuna()
    assert plan.memory.weights == 2 * 7_050_832_896
    assert plan.memory.kv_cache == -(-80 * GIB * 92 // 100) - plan.memory.weights - 4 * GIB
    # 16 rows x 8 layers x keys and values x 4096 x 2 bytes
    assert plan.block_bytes == 16 * 8 * 2 * 4096 * 2 == 2 * 2**20
    assert plan.capacity.num_blocks == plan.memory.kv_cache // plan.block_bytes == 28911
    assert [image.rows for image in plan.images[:2]] == [(2928,) * 4, (960, 700, 520, 380)]
    assert [image.kv_blocks for image in plan.images] == [
        4 * 183,
        60 + 44 + 33 + 24,
        30 + 22 + 17 + 12,
        15 + 11 + 9 + 6,
    ]
    assert [image.images_at_once for image in plan.images] == [28910 // 732, 28910 // 161, 28910 // 81, 28910 // 41]
    assert [round(image.prefill_flops / 1e12, 1) for image in plan.images] == [41.0, 9.2, 5.0, 2.9]
    assert plan.max_inflight_tokens == (28910 * 16 - 119 * 4 * 271) // 4 == 83391
    assert not plan.problems


@pytest.mark.parametrize("budget", [32, 160, 640, "full"])
@pytest.mark.parametrize("answer", [1, 256, 2000])
def test_as_many_sequences_as_fit_at_the_planned_budget(budget: Any, answer: int) -> None:
    plan = plan_vicuna(Request(None, 60, answer, budget))
    cost = resolve(plan.geometry, 672, 672, budget).kept + 60
    limits = [max_cost(plan.capacity, (8, 8, 8, 8), plan.max_num_seqs + more, answer) for more in (0, 1)]
    assert limits[0] == plan.max_inflight_tokens
    if plan.max_num_seqs == 1024:
        assert budget == 32
    else:
        assert plan.max_num_seqs * cost <= limits[0]
        assert (plan.max_num_seqs + 1) * cost > limits[1]


def test_two_gpus_hold_half_of_the_weights_and_of_every_block() -> None:
    one, two = plan_vicuna(), plan_vicuna(tensor_parallel_size=2)
    assert two.block_bytes * 2 == one.block_bytes
    assert two.memory.weights < 0.51 * one.memory.weights
    assert two.capacity.num_blocks > 2 * one.capacity.num_blocks
    assert two.images[1].kv_blocks == one.images[1].kv_blocks


@pytest.mark.parametrize(
    ("dtype", "of_config", "expected"),
    [
        ("auto", "float16", "float16"),
        ("auto", "float32", "bfloat16"),
        ("auto", None, "bfloat16"),
        ("float32", "float16", "float32"),
    ],
)
def test_dtype_decides_the_bytes(dtype: str, of_config: str | None, expected: str) -> None:
    config = complete({**published_configs.VICUNA_7B, "torch_dtype": of_config, "text_config": {"head_dim": 128}})
    plan = make_plan(config, USUAL, gpu_memory_gib=80, dtype=dtype)
    assert plan.dtype == expected
    assert plan.block_bytes == 16 * 8 * 2 * 4096 * ELEMENT_BYTES[expected]


def test_without_boundaries_all_layers_are_one_group(capsys: pytest.CaptureFixture[str], vicuna: str) -> None:
    status, out, _ = run(capsys, vicuna, "--kv-memory", "10", "--layers", "")
    assert status == 0
    assert "32 decoder layers, pruned at the encoder alone" in out
    assert "10 GiB".replace(" GiB", ".00") in out
    assert "the engine will log" not in out
    assert """--hf-overrides '{"visiondrop": {"layers": []}}'""" in out
    assert f"{10 * GIB // (32 * 16 * 2 * 4096 * 2):,} blocks" in out


def test_the_page_ends_with_settings_that_vllm_takes(capsys: pytest.CaptureFixture[str], vicuna: str) -> None:
    options = ("--dtype", "bfloat16", "--max-model-len", "4000", "--block-size", "32", "--tensor-parallel-size", "2")
    status, out, err = run(capsys, vicuna, "--gpu-memory", "80", "--gpu-memory-utilization", "0.8", *options)
    assert (status, err) == (0, "")
    before, _, engine = out.splitlines()[-1].partition(" -- ")
    limit, *command = before.split()
    assert command == ["visiondrop", "serve", vicuna]
    assert limit.partition("=")[0] == "VISIONDROP_MAX_INFLIGHT_TOKENS"
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    args = parser.parse_args(engine.split())
    assert (args.dtype, args.max_model_len, args.block_size, args.tensor_parallel_size) == ("bfloat16", 4000, 32, 2)
    assert args.gpu_memory_utilization == 0.8
    _, printed, _ = run(capsys, vicuna, "--gpu-memory", "80", "--gpu-memory-utilization", "0.8", *options, "--json")
    data = json.loads(printed)
    assert data["max_inflight_tokens"] == int(limit.partition("=")[2])
    assert data["max_num_seqs"] == args.max_num_seqs
    assert data["settings"] == out.splitlines()[-1]


def test_the_page_says_what_was_assumed(capsys: pytest.CaptureFixture[str], vicuna: str) -> None:
    _, out, _ = run(capsys, vicuna, "--gpu-memory", "80", "--reserve", "7.5", "--image", "500x300")
    assert "  reserve                     7.50  assumed (--reserve)" in out
    assert "23 of the tower's 24 layers are loaded" in out
    assert "an image of 500x300; prefill with 60 tokens of text" in out
    _, given, _ = run(capsys, vicuna, "--kv-memory", "3")
    assert "assumed" not in given
    assert "  KV cache                    3.00  given" in given


def test_a_file_reads_as_its_folder(capsys: pytest.CaptureFixture[str], vicuna: str) -> None:
    folder = run(capsys, vicuna, "--gpu-memory", "80", "--json")
    file = run(capsys, f"{vicuna}/config.json", "--gpu-memory", "80", "--json")
    assert {**json.loads(folder[1]), "model": "", "settings": ""} == {
        **json.loads(file[1]),
        "model": "",
        "settings": "",
    }


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--gpu-memory", "16"], "weights of 13.13 GiB and a reserve of 4.00 GiB leave -2.41 of 14.72 GiB; "),
        (["--kv-memory", "0.0001"], "no memory is left for a KV cache; give each GPU more memory"),
        (["--kv-memory", "1"], "3,244 tokens, is longer than the 2,032 tokens that the KV cache holds; give each GPU"),
        (["--kv-memory", "1"], "4,096 tokens does not fit the KV cache, so the engine would not start; set --"),
        (["--kv-memory", "1.9"], "would not start; set --max-model-len to 3872 or less"),
        (["--kv-memory", "8", "--max-model-len", "3000"], "raise --max-model-len to 3244, or set VISIONDROP_MAX_"),
        (["--kv-memory", "8", "--answer-tokens", "3000"], "plan for shorter answers, or set VISIONDROP_MAX_BUDGET"),
        (["--kv-memory", "8", "--max-num-seqs", "999"], "999 answers of 256 tokens fill the KV cache; lower --max"),
    ],
)  # fmt: skip
def test_a_plan_that_does_not_work_names_the_setting(
    capsys: pytest.CaptureFixture[str], vicuna: str, arguments: list[str], sentence: str
) -> None:
    status, out, err = run(capsys, vicuna, *arguments)
    assert status == 1
    assert err.startswith("visiondrop: error: ")
    assert sentence in err
    assert err.count("\n") == 1
    assert out.startswith(vicuna)
    assert "VISIONDROP_MAX_INFLIGHT_TOKENS" not in out
    _, printed, _ = run(capsys, vicuna, *arguments, "--json")
    assert sentence in "; ".join(json.loads(printed)["problems"])


def test_the_longest_context_that_a_plan_names_works(capsys: pytest.CaptureFixture[str], vicuna: str) -> None:
    assert run(capsys, vicuna, "--kv-memory", "1.9", "--max-model-len", "3872")[0] == 0
    assert run(capsys, vicuna, "--kv-memory", "1.9", "--max-model-len", "3873")[0] == 1


CHANGED: dict[str, dict[str, Any]] = {
    "a window": {"text_config": {"model_type": "mistral"}},
    "quantized": {"quantization_config": {"quant_method": "awq"}},
    "another tower": {"vision_config": {"model_type": "siglip_vision_model"}},
    "other features": {"vision_feature_select_strategy": "full"},
}


@pytest.mark.parametrize(
    ("change", "arguments", "sentence"),
    [
        ({}, [], "--gpu-memory --kv-memory is required"),
        ({}, ["--gpu-memory", "80", "--kv-memory", "1"], "not allowed with"),
        ({}, ["--gpu-memory", "80GB"], "--gpu-memory: must be a number from 0 up; got '80GB'"),
        ({}, ["--gpu-memory", "nan"], "must be a number"),
        ({}, ["--gpu-memory", "80", "--gpu-memory-utilization", "92"], "at most 1"),
        ({}, ["--gpu-memory", "80", "--image", "0x9"], "WIDTHxHEIGHT"),
        ({}, ["--gpu-memory", "80", "--layers", "8,x"], "depths with commas between"),
        ({}, ["--gpu-memory", "80", "--layers", "8,16,32"], "three ascending depths from 1 to 31"),
        ({}, ["--gpu-memory", "80", "--budget", "31"], "at least 32"),
        ({}, ["--gpu-memory", "80", "--answer-tokens", "0"], "positive integer"),
        ({}, ["--gpu-memory", "80", "--tensor-parallel-size", "3"], "does not divide this model's 16 heads"),
        ({}, ["--gpu-memory", "80", "--max-model-len", "5000"], "this model's own is 4096"),
        ({}, ["--gpu-memory", "80", "--dtype", "fp8"], "invalid choice: 'fp8'"),
        (CHANGED["a window"], ["--gpu-memory", "80"], "full attention only"),
        (CHANGED["quantized"], ["--gpu-memory", "80"], "give the KV cache with --kv-memory"),
        (CHANGED["another tower"], ["--gpu-memory", "80"], "tower is 'siglip_vision_model'"),
        (CHANGED["other features"], ["--gpu-memory", "80"], "vision_feature_select_strategy"),
    ],
)
def test_wrong_usage_gets_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, change: dict[str, Any], arguments: list[str], sentence: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**published_configs.VICUNA_7B, **change}))
    status, out, err = run(capsys, str(tmp_path), *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("visiondrop: error: ")
    assert sentence in err
    assert err.count("\n") == 1


def test_a_quantized_checkpoint_is_planned_from_its_kv_cache() -> None:
    config = complete({**published_configs.VICUNA_7B, **CHANGED["quantized"]})
    assert not make_plan(config, USUAL, kv_memory_gib=20).problems


def test_a_folder_that_is_not_there_gets_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "/no/such/model", "--gpu-memory", "80")
    assert (status, err) == (2, "visiondrop: error: no such model folder: /no/such/model\n")


def test_every_option_is_explained() -> None:
    assert all(action.help for action in tool._make_parser()._actions)


BARE = """
import sys
sys.path.insert(0, sys.argv[1])
from vd_plugin.tools.plan import main
before = set(sys.modules)
status = main(sys.argv[2:])
print(*sorted({name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)), file=sys.stderr)
sys.exit(status)
"""


def run_bare(*arguments: str) -> subprocess.CompletedProcess[str]:
    """-I -S: no installed package is within reach."""
    command = [sys.executable, "-I", "-S", "-c", BARE, str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_plan_needs_the_standard_library_alone(vicuna: str) -> None:
    done = run_bare(vicuna, "--gpu-memory", "80")
    assert done.returncode == 0
    assert done.stderr.split() == ["__main__", "vd_plugin"]
    assert done.stdout.splitlines()[-1].startswith("VISIONDROP_MAX_INFLIGHT_TOKENS=83391 ")


def test_a_model_id_without_transformers_gets_a_sentence() -> None:
    done = run_bare("llava-hf/llava-v1.6-vicuna-7b-hf", "--gpu-memory", "80")
    assert done.returncode == 2
    assert "needs transformers: give the path of its config.json" in done.stderr


def test_a_model_id_is_looked_up(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, vicuna: str
) -> None:
    from transformers import AutoConfig

    hf = AutoConfig.from_pretrained(vicuna)
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda model, **_: hf if model == "llava-hf/it" else None)
    status, out, _ = run(capsys, "llava-hf/it", "--gpu-memory", "80")
    assert status == 0
    assert out.splitlines()[1:-1] == run(capsys, vicuna, "--gpu-memory", "80")[1].splitlines()[1:-1]


def test_the_documentation_shows_the_page_as_it_is(capsys: pytest.CaptureFixture[str], vicuna: str) -> None:
    _, out, _ = run(capsys, vicuna, "--gpu-memory", "80")
    shown = out.replace(vicuna, "llava-hf/llava-v1.6-vicuna-7b-hf")
    assert f"```text\n{shown}```" in (ROOT / "docs" / "operations.md").read_text()
