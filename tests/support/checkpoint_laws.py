"""What every LLaVA-NeXT checkpoint that we write keeps to."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from tokenizers import Tokenizer


def assert_transformers_finds_every_tensor(model: Path) -> None:
    from transformers import LlavaNextForConditionalGeneration

    _, report = LlavaNextForConditionalGeneration.from_pretrained(model, output_loading_info=True)
    assert not any(report.values()), report


def assert_tensors_have_published_names(model: Path) -> None:
    with safe_open(model / "model.safetensors", "pt") as tensors:
        names = set(tensors.keys())
    assert "vision_tower.vision_model.embeddings.class_embedding" in names
    assert {name.split(".")[0] for name in names} == {
        "image_newline",
        "language_model",
        "multi_modal_projector",
        "vision_tower",
    }


def assert_image_costs(model: Path, side: int, tokens: int) -> None:
    """A square of two by two tiles costs `tokens` in full."""
    from PIL import Image
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(model)
    inputs = processor(images=Image.new("RGB", (side, side)), text="<image>", return_tensors="pt")
    image_token = json.loads((model / "config.json").read_text())["image_token_index"]
    assert tuple(inputs["pixel_values"].shape) == (1, 5, 3, side // 2, side // 2)
    assert int((inputs["input_ids"] == image_token).sum()) == tokens


def assert_tokenizer_loses_nothing(model: Path, text: str) -> None:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def render(model: Path, messages: list[dict[str, object]]) -> str:
    """The prompt that the checkpoint's chat template makes."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    text: str = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return text
