"""The random checkpoint: a tiny LLaVA-NeXT with random weights, built here for tests, without any hub.

It has every part of a published checkpoint, under the published names, so that it goes through the same code: a CLIP
tower at the real image and patch size (real token counts), a projector, a Llama decoder with grouped-query attention,
a tokenizer of its own, a chat template, and LLaVA-NeXT's image processor with its five grid pinpoints. What it answers
is noise.

* The same bytes every time: one seed, tensors in the order of `_tensor_shapes`.
* Files are written by hand rather than by transformers, whose fifth version saves the tower under names that neither
  published checkpoints nor vLLM 0.32 use (`vision_tower.embeddings` for `vision_tower.vision_model.embeddings`).
* `build` is atomic (a temporary folder, then a rename) and does nothing where this very version has been built.

    python -m vd_plugin.tools.random_checkpoint PATH
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Generator, Tensor

_MARKER: Final = "visiondrop_random.json"
"""The file by which a folder is known to hold the random checkpoint."""

_SEED: Final = 20251228

_SPECIAL_TOKENS: Final = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
_UNK, _BOS, _EOS, _PAD, _IMAGE = range(len(_SPECIAL_TOKENS))
_VOCAB_SIZE: Final = 512
_CONTEXT: Final = 8192

_GRID_PINPOINTS: Final = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
"""Those of the published LLaVA-NeXT checkpoints."""

_VISION: Final[dict[str, Any]] = {
    "model_type": "clip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 64,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_TEXT: Final[dict[str, Any]] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": _VOCAB_SIZE,
    "max_position_embeddings": _CONTEXT,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "pad_token_id": _PAD,
    "bos_token_id": _BOS,
    "eos_token_id": _EOS,
}

_SHARPNESS: Final = 1.6
"""Gain of query and key projections. Attention logits have about its square as standard deviation, so attention is
neither flat nor a single token, and the choice of what to keep means something."""

_SUCCESSION: Final = 0.6
"""How loudly a token's embedding speaks for its successor (see `_shape_answers`)."""

_BRANCH: Final = 0.5
"""Gain of what attention and MLP add to the residual stream, so that a token stays visible through all layers."""

_POSITION_SCALE: Final = 0.5
"""Standard deviation of the tower's position embeddings: equal patches of a plain background stay apart."""

_CHAT_TEMPLATE: Final = """\
{{- bos_token -}}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}{{- 'USER: ' -}}
  {%- elif message['role'] == 'assistant' -%}{{- 'ASSISTANT: ' -}}
  {%- endif -%}
  {%- if message['content'] is string -%}
    {{- message['content'] -}}
  {%- else -%}
    {%- for item in message['content'] -%}
      {%- if item['type'] in ('image', 'image_url') -%}{{- '<image>\\n' -}}
      {%- elif item['type'] == 'text' -%}{{- item['text'] -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- else -%}{{- ' ' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""

_TOKENIZER_TEXT: Final = """\
A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, and
polite answers to the human's questions. USER: What is shown in this picture? ASSISTANT: The picture shows a red circle,
a blue square and a green triangle on a white background. USER: Describe the image in detail. ASSISTANT: There is a
person standing next to a table in front of a large window, and the light comes from the left. USER: How many objects
are there? ASSISTANT: There are three objects in the image. USER: Which colour has the largest shape? ASSISTANT: The
largest shape is yellow. It is above the small black line, to the right of the word. USER: Read the text in the picture.
ASSISTANT: The text reads: one two three four five six seven eight nine ten. USER: Where is the cat? ASSISTANT: The cat
is sitting on the chair under the window, looking at the bird outside. USER: What would you do with it? ASSISTANT: I
would ask which of them was the first, then compare their size, their position and their colour with each other.
"""


def build(path: str | Path) -> bool:
    """Make the checkpoint at `path`, unless this version of it is there. Returns whether it was built.

    Raises:
        FileExistsError: `path` holds something that this function did not make.
    """
    target = Path(path).absolute()
    if _marker_of(target) == _version():
        return False
    if target.exists() and _marker_of(target) is None and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is no random checkpoint; name another folder or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
        fresh, old = Path(temporary, "new"), Path(temporary, "old")
        fresh.mkdir()
        _write_all(fresh)
        if target.exists():
            target.rename(old)
        fresh.rename(target)
    return True


def _version() -> str:
    """Hash of this file: whatever changes here makes another checkpoint."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def _marker_of(folder: Path) -> str | None:
    try:
        return str(json.loads((folder / _MARKER).read_text())["version"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_all(folder: Path) -> None:
    from safetensors.torch import save_file

    tokenizer = _make_tokenizer()
    for name, content in _make_configs().items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(_CHAT_TEMPLATE)
    tokenizer.save(str(folder / "tokenizer.json"))
    save_file(_make_tensors(tokenizer), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it readable by its owner alone
    # Last, so that a folder with a marker is whole.
    (folder / _MARKER).write_text(json.dumps({"version": _version()}) + "\n")


def _make_tokenizer() -> Tokenizer:
    """Byte-level BPE: any text can be written, and the few merges come from `_TOKENIZER_TEXT`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in _SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TOKENIZER_TEXT], trainer)
    assert tokenizer.get_vocab_size() == _VOCAB_SIZE, "the text is too short for the vocabulary"
    return tokenizer


def _make_configs() -> dict[str, dict[str, Any]]:
    unk, bos, eos, pad, image = _SPECIAL_TOKENS
    special_ids = {"bos_token_id": _BOS, "eos_token_id": _EOS, "pad_token_id": _PAD}
    return {
        "config.json": {
            "architectures": ["LlavaNextForConditionalGeneration"],
            "model_type": "llava_next",
            "image_token_index": _IMAGE,
            "image_seq_length": (_VISION["image_size"] // _VISION["patch_size"]) ** 2,
            "image_grid_pinpoints": _GRID_PINPOINTS,
            "projector_hidden_act": "gelu",
            "multimodal_projector_bias": True,
            "use_image_newline_parameter": True,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            **special_ids,
            "text_config": {**_TEXT, "torch_dtype": "float32"},
            "vision_config": {**_VISION, "torch_dtype": "float32"},
        },
        "generation_config.json": special_ids,
        "preprocessor_config.json": {
            "image_processor_type": "LlavaNextImageProcessor",
            "processor_class": "LlavaNextProcessor",
            "image_grid_pinpoints": _GRID_PINPOINTS,
            "crop_size": {"height": _VISION["image_size"], "width": _VISION["image_size"]},
            "size": {"shortest_edge": _VISION["image_size"]},
            "do_center_crop": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_pad": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "resample": 3,
            "rescale_factor": 1 / 255,
        },
        "processor_config.json": {
            "processor_class": "LlavaNextProcessor",
            "image_token": image,
            "num_additional_image_tokens": 1,
            "patch_size": _VISION["patch_size"],
            "vision_feature_select_strategy": "default",
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": bos,
            "eos_token": eos,
            "pad_token": pad,
            "unk_token": unk,
            "clean_up_tokenization_spaces": False,
            "extra_special_tokens": {"image_token": image},
            "model_max_length": _CONTEXT,
        },
    }


def _tensor_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names as in published checkpoints."""
    hidden, inner = _VISION["hidden_size"], _VISION["intermediate_size"]
    num_patches = (_VISION["image_size"] // _VISION["patch_size"]) ** 2
    tower = "vision_tower.vision_model"
    yield f"{tower}.embeddings.class_embedding", (hidden,)
    yield f"{tower}.embeddings.patch_embedding.weight", (hidden, 3, _VISION["patch_size"], _VISION["patch_size"])
    yield f"{tower}.embeddings.position_embedding.weight", (num_patches + 1, hidden)
    linears = [(f"self_attn.{name}_proj", hidden, hidden) for name in ("q", "k", "v", "out")]
    linears += [("mlp.fc1", inner, hidden), ("mlp.fc2", hidden, inner)]
    for layer in range(_VISION["num_hidden_layers"]):
        prefix = f"{tower}.encoder.layers.{layer}"
        for name, rows, columns in linears:
            yield f"{prefix}.{name}.weight", (rows, columns)
            yield f"{prefix}.{name}.bias", (rows,)
        for name in ("layer_norm1", "layer_norm2"):
            yield f"{prefix}.{name}.weight", (hidden,)
            yield f"{prefix}.{name}.bias", (hidden,)
    for name in ("pre_layrnorm", "post_layernorm"):  # the first is misspelt in every CLIP checkpoint
        yield f"{tower}.{name}.weight", (hidden,)
        yield f"{tower}.{name}.bias", (hidden,)

    width, inner = _TEXT["hidden_size"], _TEXT["intermediate_size"]
    for number, columns in ((1, hidden), (2, width)):
        yield f"multi_modal_projector.linear_{number}.weight", (width, columns)
        yield f"multi_modal_projector.linear_{number}.bias", (width,)
    yield "image_newline", (width,)

    query = _TEXT["num_attention_heads"] * _TEXT["head_dim"]
    key = _TEXT["num_key_value_heads"] * _TEXT["head_dim"]
    yield "language_model.model.embed_tokens.weight", (_VOCAB_SIZE, width)
    for layer in range(_TEXT["num_hidden_layers"]):
        prefix = f"language_model.model.layers.{layer}"
        yield f"{prefix}.self_attn.q_proj.weight", (query, width)
        yield f"{prefix}.self_attn.k_proj.weight", (key, width)
        yield f"{prefix}.self_attn.v_proj.weight", (key, width)
        yield f"{prefix}.self_attn.o_proj.weight", (width, query)
        yield f"{prefix}.mlp.gate_proj.weight", (inner, width)
        yield f"{prefix}.mlp.up_proj.weight", (inner, width)
        yield f"{prefix}.mlp.down_proj.weight", (width, inner)
        yield f"{prefix}.input_layernorm.weight", (width,)
        yield f"{prefix}.post_attention_layernorm.weight", (width,)
    yield "language_model.model.norm.weight", (width,)
    yield "language_model.lm_head.weight", (_VOCAB_SIZE, width)


def _make_tensors(tokenizer: Tokenizer) -> dict[str, Tensor]:
    import torch

    generator = torch.Generator().manual_seed(_SEED)
    tensors: dict[str, Tensor] = {}
    for name, shape in _tensor_shapes():
        if "norm" in name:
            tensors[name] = torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
        elif name.endswith("bias"):
            tensors[name] = torch.zeros(shape)
        else:
            tensors[name] = torch.randn(shape, generator=generator) * _standard_deviation(name, shape)
    _shape_answers(tokenizer, tensors, generator)
    return tensors


def _shape_answers(tokenizer: Tokenizer, tensors: dict[str, Tensor], generator: Generator) -> None:
    """Make greedy answers varied and readable, by the output head alone.

    Random heads soon repeat one token for ever: what attention brings hardly changes from one step to the next. So each
    readable token gets a random successor that its own embedding speaks for, just loudly enough to leave the image
    and the text before it a say. The other tokens get no row: their logit is 0, which is never the largest, so that
    answers are made of printable pieces and go on to their limit.
    """
    import torch

    head, embeddings = tensors["language_model.lm_head.weight"], tensors["language_model.model.embed_tokens.weight"]
    readable = torch.tensor([token for token in range(_VOCAB_SIZE) if _is_readable(tokenizer, token)])
    cycle = readable[torch.randperm(len(readable), generator=generator)]
    head[cycle.roll(-1)] += _SUCCESSION * embeddings[cycle] / math.sqrt(_TEXT["hidden_size"])
    silent = torch.ones(_VOCAB_SIZE, dtype=torch.bool)
    silent[readable] = False
    head[silent] = 0


def _standard_deviation(name: str, shape: tuple[int, ...]) -> float:
    if name.endswith(("class_embedding", "position_embedding.weight")):
        return _POSITION_SCALE
    if name.endswith(("embed_tokens.weight", "image_newline")):
        return 1.0
    gain = 1.0
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        gain = _SHARPNESS
    elif name.endswith(("o_proj.weight", "down_proj.weight")):
        gain = _BRANCH
    return gain / math.sqrt(math.prod(shape[1:]))


def _is_readable(tokenizer: Tokenizer, token: int) -> bool:
    text: str = tokenizer.decode([token])
    return text.isascii() and text.isprintable() and text.strip() != ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vd_plugin.tools.random_checkpoint", description=_summary())
    parser.add_argument("path", type=Path, help="folder to make")
    path: Path = parser.parse_args(arguments).path
    started = time.perf_counter()
    try:
        built = build(path)
    except OSError as error:
        print(f"The random checkpoint could not be built: {error}", file=sys.stderr)
        return 1
    if built:
        num_bytes = sum(file.stat().st_size for file in path.iterdir())
        print(
            f"Built the random checkpoint in {path}: {_num_parameters() / 1e6:.1f} million random weights, "
            f"{num_bytes / 1e6:.1f} MB, {time.perf_counter() - started:.1f} s."
        )
    else:
        print(f"The random checkpoint in {path} is up to date.")
    return 0


def _summary() -> str:
    return (__doc__ or "").partition("\n")[0]


def _num_parameters() -> int:
    return sum(math.prod(shape) for _, shape in _tensor_shapes())


if __name__ == "__main__":
    sys.exit(main())
