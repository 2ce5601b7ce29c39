"""The checkpoints that are measured: LLaVA-NeXT-7B whole, or a slice of its depth, as configuration files alone.

All widths are those of llava-v1.6-vicuna-7b: Vicuna-7B behind CLIP-L/14-336. A slice has an eighth of every part that
a prompt goes through: 4 of 32 decoder layers, 3 of the tower's 24, an eighth of the output head's rows. Two things
cannot be cut, and weigh eight times as much as they should: the projector (2 % of a stock prefill), and pruning, which
happens three times in a decoder of any depth. `prefill.py` reports ratios with and without that. Weights are vLLM's own
dummy ones; the tokenizer is the random checkpoint's.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.seven_b import SEVEN_B
from vd_plugin.schedule import default_boundaries
from vd_plugin.tools.random_checkpoint import build as build_random

CONTEXT: Final = 8192
"""Twice the published context, so that several images fit in full; no weight depends on it."""

_TOWER_LAYERS: Final = 24
_VOCAB_SIZE: Final = 32064


@dataclass(frozen=True, slots=True)
class Shape:
    """How much of LLaVA-NeXT-7B there is."""

    title: str
    fraction: int
    """The whole is so many times as deep."""

    @property
    def decoder_layers(self) -> int:
        return SEVEN_B.decoder.num_layers // self.fraction

    @property
    def tower_layers(self) -> int:
        """In the configuration; the last one is not loaded, because LLaVA takes the output of the one before it.

        Slices have one more for that, so that what they load is their share of all.
        """
        return _TOWER_LAYERS // self.fraction + (self.fraction > 1)

    @property
    def vocab_size(self) -> int:
        return _VOCAB_SIZE // self.fraction

    @property
    def boundaries(self) -> tuple[int, ...]:
        return default_boundaries(self.decoder_layers)

    def config(self, image_token: int, special_ids: dict[str, int]) -> dict[str, Any]:
        """config.json, sizes spelled out."""
        return {
            "architectures": ["LlavaNextForConditionalGeneration"],
            "model_type": "llava_next",
            "image_token_index": image_token,
            "image_seq_length": 576,
            "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
            "projector_hidden_act": "gelu",
            "multimodal_projector_bias": True,
            "use_image_newline_parameter": True,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            **special_ids,
            "text_config": {
                "model_type": "llama",
                "architectures": ["LlamaForCausalLM"],
                "hidden_size": 4096,
                "intermediate_size": 11008,
                "num_hidden_layers": self.decoder_layers,
                "num_attention_heads": 32,
                "num_key_value_heads": 32,
                "head_dim": 128,
                "vocab_size": self.vocab_size,
                "max_position_embeddings": CONTEXT,
                "rms_norm_eps": 1e-5,
                "rope_theta": 10000.0,
                "hidden_act": "silu",
                "tie_word_embeddings": False,
                **special_ids,
            },
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": self.tower_layers,
                "num_attention_heads": 16,
                "image_size": 336,
                "patch_size": 14,
                "projection_dim": 768,
                "hidden_act": "quick_gelu",
            },
        }


SHAPES: Final = {
    "slice": Shape("An eighth of the depth of LLaVA-NeXT-7B", fraction=8),
    "quarter": Shape("A quarter of the depth of LLaVA-NeXT-7B", fraction=4),
    "7b": Shape("LLaVA-NeXT-7B", fraction=1),
}


def write(folder: Path, shape: Shape) -> None:
    """Make a checkpoint without weights: configuration, tokenizer and processor.

    Raises:
        FileExistsError: `folder` holds files.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        random = Path(temporary, "random")
        build_random(random)
        for file in random.iterdir():
            if file.suffix != ".safetensors":
                (folder / file.name).write_bytes(file.read_bytes())
    theirs = json.loads((folder / "config.json").read_text())
    special_ids = {name: theirs[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = shape.config(theirs["image_token_index"], special_ids)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
