"""A checkpoint's config.json, completed: what it leaves out stands in the configuration classes of transformers.

Published files are short (the text part of llava-v1.6-vicuna-7b-hf has no sizes at all). Standard library only, so that
a plan can be made where there is no engine; `tests/vd_plugin/test_model_config.py` compares with transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

from vd_plugin.options import ARCHITECTURES
from vd_plugin.schedule import quote

_CLIP: Final[Mapping[str, Any]] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
}
_CLIP_OF_LLAVA: Final[Mapping[str, Any]] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
"""The tower of a checkpoint whose configuration has no `vision_config`."""

_LLAMA: Final[Mapping[str, Any]] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
}
_TEXT: Final[Mapping[str, Mapping[str, Any]]] = {
    "llama": _LLAMA,
    "mistral": {
        **_LLAMA,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": {
        **_LLAMA,
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": 4096,
    },
}
_OPTIONAL: Final = frozenset(("num_key_value_heads", "head_dim", "sliding_window"))
"""Sizes that may be null."""
_PINPOINTS: Final = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]

_LLAVA: Final[Mapping[str, Any]] = {
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "multimodal_projector_bias": True,
}

_SCALED_ALREADY: Final = frozenset(
    ("su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling", "default")
)
"""Kinds of RoPE whose factor leaves the model's length as it is (vllm/config/model.py, `_get_and_verify_max_len`)."""


def read_model_config(path: Path) -> SimpleNamespace:
    """The configuration in a checkpoint's folder, or in a file.

    Raises:
        ValueError: there is none, or it is not that of a LLaVA checkpoint that VisionDrop serves.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path} is not a checkpoint: it holds no config.json") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {file}: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds no JSON object")
    return complete(config)


def complete(config: Mapping[str, Any]) -> SimpleNamespace:
    """Attributes as a configuration object of transformers has them, as far as sizes depend on them.

    Raises:
        ValueError: not a LLaVA checkpoint with a decoder that VisionDrop knows, or a size that is no number.
    """
    model_type = config.get("model_type")
    if model_type not in ARCHITECTURES:
        raise ValueError(f"this is a {quote(model_type)} checkpoint; VisionDrop serves {' and '.join(ARCHITECTURES)}")
    vision, text = config.get("vision_config"), config.get("text_config") or {}
    if not isinstance(vision, dict | None) or not isinstance(text, dict):
        raise ValueError("text_config and vision_config must be JSON objects")
    text_type = text.get("model_type") or "llama"
    if text_type not in _TEXT:
        raise ValueError(
            f"this checkpoint's decoder is {quote(text_type)}; sizes are known of {', '.join(_TEXT)} decoders"
        )
    completed = SimpleNamespace(**_filled(config, _LLAVA), model_type=model_type)
    completed.vision_config = SimpleNamespace(
        **_filled({**_CLIP_OF_LLAVA} if vision is None else vision, _CLIP),
        model_type=(vision or {}).get("model_type") or "clip_vision_model",
    )
    completed.text_config = _complete_text(SimpleNamespace(**_filled(text, _TEXT[text_type]), model_type=text_type))
    if model_type == "llava_next":
        completed.image_grid_pinpoints = config.get("image_grid_pinpoints") or _PINPOINTS
    completed.dtype = _dtype(config) or _dtype(text) or _dtype(vision or {})
    completed.quantization_config = config.get("quantization_config") or text.get("quantization_config")
    completed.max_model_len = int(completed.text_config.max_position_embeddings * _rope_factor(text))
    return completed


def _filled(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The values of some keys.

    Raises:
        ValueError: not a size where the default is one.
    """
    values = {key: given.get(key, default) for key, default in defaults.items()}
    for key, value in values.items():
        is_size = key in _OPTIONAL or (type(defaults[key]) is int and defaults[key] > 0)
        is_given = not (value is None and key in _OPTIONAL)
        if is_size and is_given and not (type(value) is int and value > 0):
            raise ValueError(f"{key} must be a positive integer; this configuration has {quote(value)}")
    return values


def _complete_text(text: SimpleNamespace) -> SimpleNamespace:
    text.num_key_value_heads = text.num_key_value_heads or text.num_attention_heads
    text.head_dim = text.head_dim or text.hidden_size // text.num_attention_heads
    if text.model_type == "llama" or not getattr(text, "use_sliding_window", True):
        text.sliding_window = None
    return text


def _dtype(config: Mapping[str, Any]) -> str | None:
    name = config.get("dtype") or config.get("torch_dtype")
    return name.removeprefix("torch.") if isinstance(name, str) else None


def _rope_factor(text: Mapping[str, Any]) -> float:
    """By how much positional scaling lengthens the model's context."""
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    return 1.0 if kind in _SCALED_ALREADY else float(rope.get("factor") or 1.0)
