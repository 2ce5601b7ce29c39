"""How many weights vLLM loads on each GPU for a LLaVA checkpoint, from its configuration alone.

Upstream: vLLM's modules `clip.py`, `llava.py`, `llava_next.py`, `llama.py` and `qwen2.py` (vLLM 0.32). Two things
differ from the checkpoint's own count: layers of the vision tower behind the one whose features are used, and its last
norm, are never built; and the vocabulary is padded to a multiple of 64. Standard library only.

Tensor parallelism shards the heads and the inner widths. Norms, positions, the newline and the biases of projections
that are summed over the GPUs are on every GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

_VOCABULARY_PADDING: Final = 64
"""vLLM's `DEFAULT_VOCAB_PADDING_SIZE`."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Elements on one GPU."""

    tower: int
    projector: int
    decoder: int
    """Layers and the last norm."""
    vocabulary: int
    """Embeddings and the output head; one matrix if they are tied."""

    @property
    def total(self) -> int:
        return self.tower + self.projector + self.decoder + self.vocabulary


def count_weights(config: Any, tensor_parallel_size: int = 1) -> Weights:
    """Weights on each of `tensor_parallel_size` GPUs.

    Args:
        config: as `model_config.complete` makes it.

    Raises:
        ValueError: `tensor_parallel_size` does not divide what it shards.
    """
    share = _Share(tensor_parallel_size)
    return Weights(
        tower=_tower(config.vision_config, loaded_tower_layers(config), share),
        projector=_projector(config, share),
        decoder=_decoder(config.text_config, share),
        vocabulary=_vocabulary(config.text_config, share),
    )


def loaded_tower_layers(config: Any) -> int:
    """Layers up to the one whose output is used: -2 is the output of the last but one, -1 of the last."""
    layer: int = config.vision_feature_layer
    num_layers: int = config.vision_config.num_hidden_layers
    return num_layers + layer + 1 if layer < 0 else layer


class _Share:
    """One GPU's part of a width."""

    def __init__(self, tensor_parallel_size: int) -> None:
        self._size = tensor_parallel_size

    def of(self, width: int, name: str) -> int:
        if width % self._size:
            raise ValueError(f"a tensor parallel size of {self._size} does not divide this model's {width} {name}")
        return width // self._size

    def of_kv_heads(self, heads: int) -> int:
        """Fewer heads than GPUs are replicated."""
        if heads % self._size and self._size % heads:
            raise ValueError(f"a tensor parallel size of {self._size} does not fit this model's {heads} KV heads")
        return max(1, heads // self._size)


def _tower(vision: Any, num_layers: int, share: _Share) -> int:
    hidden: int = vision.hidden_size
    patch: int = vision.patch_size
    share.of(vision.num_attention_heads, "heads of the vision tower")
    width, inner = share.of(hidden, "hidden units of the vision tower"), share.of(vision.intermediate_size, "MLP units")
    positions = 1 + (vision.image_size // patch) ** 2
    embeddings = hidden * (1 + vision.num_channels * patch * patch + positions)
    attention = 3 * width * (hidden + 1) + width * hidden + hidden
    mlp = inner * (hidden + 1) + inner * hidden + hidden
    norm = 2 * hidden
    total: int = embeddings + norm + num_layers * (attention + mlp + 2 * norm)
    return total


def _projector(config: Any, share: _Share) -> int:
    source: int = config.vision_config.hidden_size
    hidden: int = config.text_config.hidden_size
    width = share.of(hidden, "hidden units")
    bias = width + hidden if config.multimodal_projector_bias else 0
    newline = hidden if config.model_type == "llava_next" else 0
    return width * source + width * hidden + bias + newline


def _decoder(text: Any, share: _Share) -> int:
    hidden: int = text.hidden_size
    num_layers: int = text.num_hidden_layers
    queries = share.of(text.num_attention_heads, "attention heads") * text.head_dim
    keys = share.of_kv_heads(text.num_key_value_heads) * text.head_dim
    inner = share.of(text.intermediate_size, "MLP units")
    attention = hidden * (queries + 2 * keys) + queries * hidden
    if text.model_type == "qwen2":
        attention += queries + 2 * keys
    elif text.attention_bias:
        attention += queries + 2 * keys + hidden
    mlp = 3 * hidden * inner
    if text.mlp_bias and text.model_type == "llama":
        mlp += 2 * inner + hidden
    total: int = num_layers * (attention + mlp + 2 * hidden) + hidden
    return total


def _vocabulary(text: Any, share: _Share) -> int:
    padded = -(-text.vocab_size // _VOCABULARY_PADDING) * _VOCABULARY_PADDING
    matrix: int = share.of(padded, "entries of the padded vocabulary") * text.hidden_size
    return matrix if text.tie_word_embeddings else 2 * matrix
