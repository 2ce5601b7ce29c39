"""A config.json completed without transformers is what transformers makes of it."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import published_configs
import pytest
from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig, LlavaConfig, MistralConfig, Qwen2Config
from vllm.config.model import _get_and_verify_max_len
from vllm.transformers_utils.config import patch_rope_parameters
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

from vd_plugin.model_config import complete, read_model_config
from vd_plugin.options import read_geometry

BARE: dict[str, dict[str, Any]] = {
    "nothing": {"model_type": "llava_next"},
    "types alone": {"model_type": "llava", "vision_config": {}, "text_config": {"model_type": "qwen2"}},
    "mistral": {"model_type": "llava_next", "text_config": {"model_type": "mistral"}},
    "nulls": {
        "model_type": "llava_next",
        "image_grid_pinpoints": None,
        "vision_config": None,
        "text_config": {"model_type": "llama", "num_key_value_heads": None, "head_dim": None},
    },
    "a window": {"model_type": "llava", "text_config": {"model_type": "qwen2", "use_sliding_window": True}},
}


def theirs(config: dict[str, Any], tmp_path: Path) -> Any:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "config", [*published_configs.ALL.values(), *BARE.values()], ids=[*published_configs.ALL, *BARE]
)
def test_every_attribute_is_that_of_transformers(config: dict[str, Any], tmp_path: Path) -> None:
    expected, made = theirs(config, tmp_path), complete(config)
    absent = object()
    for ours, hf in (
        (made, expected),
        (made.vision_config, expected.vision_config),
        (made.text_config, expected.text_config),
    ):
        for name, value in vars(ours).items():
            other = getattr(hf, name, absent)
            if name in ("vision_config", "text_config", "dtype", "quantization_config", "max_model_len"):
                continue
            if other is absent:  # not every decoder has every attribute
                assert name in ("head_dim", "attention_bias", "mlp_bias", "sliding_window")
            else:
                assert value == other, name
    assert read_geometry(made) == read_geometry(expected)
    assert made.dtype == (str(expected.dtype).removeprefix("torch.") if expected.dtype else None)
    assert read_model_config(tmp_path) == read_model_config(tmp_path / "config.json") == made


def test_what_transformers_writes_reads_the_same() -> None:
    """A model id is looked up with transformers, which fills everything in."""
    for config in published_configs.ALL.values():
        written = AutoConfig.for_model(**deepcopy(config)).to_dict()
        assert complete(written) == complete(config)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("llama", LlamaConfig), ("mistral", MistralConfig), ("qwen2", Qwen2Config), ("clip", CLIPVisionConfig)],
)
def test_defaults_are_those_of_the_classes(ours: str, theirs: type[Any]) -> None:
    config = {"model_type": "llava", "vision_config": {}, "text_config": {"model_type": ours}}
    made = complete(config).text_config if ours != "clip" else complete({"model_type": "llava", "vision_config": {}})
    part = made if ours != "clip" else made.vision_config
    default = theirs()
    assert {name: getattr(default, name, value) for name, value in vars(part).items()} == vars(part)


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (None, 4096),
        ({"type": "linear", "factor": 2.0}, 8192),
        ({"rope_type": "dynamic", "factor": 3.0}, 12288),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}, 4096),
    ],
)  # fmt: skip
def test_the_longest_context_is_the_one_that_vllm_derives(rope: dict[str, Any] | None, expected: int) -> None:
    text = {"model_type": "llama", "max_position_embeddings": 4096, "rope_scaling": rope}
    hf = LlavaConfig(text_config=deepcopy(text)).text_config
    patch_rope_parameters(hf)
    architecture = ModelArchConfigConvertorBase(hf, hf).convert()
    assert _get_and_verify_max_len(hf, architecture, None, None, False, None) == expected
    assert complete({"model_type": "llava", "text_config": text}).max_model_len == expected


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model_type": "gpt2"}, "serves llava_next and llava"),
        ({}, "serves llava_next and llava"),
        ({"model_type": "llava", "text_config": {"model_type": "gemma"}}, "decoder is 'gemma'"),
        ({"model_type": "llava", "text_config": []}, None),
        ({"model_type": "llava", "text_config": [1]}, "JSON objects"),
        ({"model_type": "llava", "text_config": {"hidden_size": "4096"}}, "hidden_size must be a positive integer"),
        ({"model_type": "llava", "text_config": {"num_hidden_layers": None}}, "num_hidden_layers must be"),
        ({"model_type": "llava", "vision_config": {"image_size": [336, 336]}}, "image_size must be"),
    ],
)
def test_a_file_that_cannot_be_used_gets_a_sentence(config: dict[str, Any], sentence: str | None) -> None:
    if sentence is None:
        complete(config)
        return
    with pytest.raises(ValueError, match=sentence):
        complete(config)


@pytest.mark.parametrize(
    ("content", "sentence"), [("[]", "no JSON object"), ("{", "cannot read"), (None, "no config.json")]
)
def test_a_folder_that_holds_no_configuration_gets_a_sentence(
    tmp_path: Path, content: str | None, sentence: str
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=sentence):
        read_model_config(tmp_path)
