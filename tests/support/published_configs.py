"""The sizes in config.json of published checkpoints, as they stand there: what a file leaves out is left out here."""

from __future__ import annotations

from typing import Any

_CLIP_L_336: dict[str, Any] = {
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
}
_NEXT: dict[str, Any] = {
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "model_type": "llava_next",
    "projector_hidden_act": "gelu",
    "vision_config": _CLIP_L_336,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}

VICUNA_7B: dict[str, Any] = {
    **_NEXT,
    "torch_dtype": "float16",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "pad_token_id": 0,
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
}
MISTRAL_7B: dict[str, Any] = {
    **_NEXT,
    "torch_dtype": "bfloat16",
    "text_config": {
        "architectures": ["MistralForCausalLM"],
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "vocab_size": 32064,
    },
}
LLAMA_3_8B: dict[str, Any] = {
    **_NEXT,
    "torch_dtype": "float16",
    "text_config": {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 8192,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rope_theta": 500000.0,
        "vocab_size": 128320,
    },
}
QWEN_72B: dict[str, Any] = {
    **_NEXT,
    "torch_dtype": "float16",
    "text_config": {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 8192,
        "intermediate_size": 24576,
        "max_position_embeddings": 32768,
        "max_window_layers": 70,
        "model_type": "qwen2",
        "num_attention_heads": 64,
        "num_hidden_layers": 80,
        "num_key_value_heads": 64,
        "vocab_size": 152064,
    },
}
LLAVA_15_7B: dict[str, Any] = {
    "model_type": "llava",
    "torch_dtype": "float16",
    "text_config": VICUNA_7B["text_config"],
    "vision_config": _CLIP_L_336,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}

ALL = {
    "vicuna": VICUNA_7B,
    "mistral": MISTRAL_7B,
    "llama 3": LLAMA_3_8B,
    "qwen": QWEN_72B,
    "llava 1.5": LLAVA_15_7B,
}
