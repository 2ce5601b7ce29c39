"""The demo checkpoint: a small LLaVA-NeXT like any published one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import checkpoint_laws as laws
import pytest
from safetensors import safe_open

from vd_plugin import demo
from vd_plugin.demo import MODEL_NAME, MODEL_PATH, find_model
from vd_plugin.demo.questions import vocabulary
from vd_plugin.demo.words import HELD_OUT_WORDS

CONFIG = json.loads((MODEL_PATH / "config.json").read_text())
WEIGHTS = MODEL_PATH / "model.safetensors"


def test_folder_holds_what_a_checkpoint_needs_and_no_more() -> None:
    assert {path.name for path in MODEL_PATH.iterdir()} == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_is_found() -> None:
    assert find_model() == MODEL_PATH
    assert MODEL_NAME == "visiondrop-demo"


def test_missing_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "MODEL_PATH", tmp_path)
    with pytest.raises(FileNotFoundError, match="the weights of the demo model are not installed here"):
        find_model()


def test_weights_are_small_and_in_half_precision() -> None:
    assert WEIGHTS.stat().st_size < 16e6
    with safe_open(WEIGHTS, "pt") as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118  # it is no dict
        assert {part.get_dtype() for part in slices.values()} == {"F16"}
        assert 7e6 < sum(math.prod(part.get_shape()) for part in slices.values()) < 8e6


def test_weights_are_finite() -> None:
    with safe_open(WEIGHTS, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  # it is no dict
            assert tensors.get_tensor(name).isfinite().all(), name


def test_decoder_has_layers_for_every_stage() -> None:
    assert CONFIG["architectures"] == ["LlavaNextForConditionalGeneration"]
    assert CONFIG["text_config"]["num_hidden_layers"] == 8


def test_transformers_finds_every_tensor() -> None:
    laws.assert_transformers_finds_every_tensor(MODEL_PATH)


def test_tensors_have_published_names() -> None:
    laws.assert_tensors_have_published_names(MODEL_PATH)


def test_image_costs_twice_the_largest_preset() -> None:
    laws.assert_image_costs(MODEL_PATH, 448, tokens=256 + 32 * 33)


@pytest.mark.parametrize(
    "text", ["What is in the photo?", "naïve 日本 😀\n\ttabs", "<image> USER:", *HELD_OUT_WORDS[:3]]
)
def test_tokenizer_loses_nothing(text: str) -> None:
    laws.assert_tokenizer_loses_nothing(MODEL_PATH, text)


def test_tokenizer_loses_nothing_of_questions_and_answers() -> None:
    laws.assert_tokenizer_loses_nothing(MODEL_PATH, "\n".join(vocabulary()))


@pytest.mark.parametrize("kind", ["image", "image_url"])
def test_template_renders_images_first(kind: str) -> None:
    content = [{"type": "text", "text": "First:"}, {"type": kind}, {"type": "text", "text": "then:"}, {"type": kind}]
    assert laws.render(MODEL_PATH, [{"role": "user", "content": content}]) == (
        "<s>USER: <image>\n<image>\nFirst: then:\nASSISTANT:\n"
    )


def test_template_takes_plain_text_and_a_conversation() -> None:
    messages: list[dict[str, object]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What is it?"}, {"type": "image"}]},
        {"role": "assistant", "content": "a red star"},
        {"role": "user", "content": "Sure?"},
    ]
    assert laws.render(MODEL_PATH, messages) == (
        "<s>Be brief.\nUSER: <image>\nWhat is it?\nASSISTANT:\na red star</s>USER: Sure?\nASSISTANT:\n"
    )
