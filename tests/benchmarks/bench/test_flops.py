"""The FLOPs that are reported, counted again by torch on models that transformers builds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaModel

from benchmarks.bench.engine import IMAGE_SIZE
from benchmarks.bench.flops import TEXT_TOKENS, counts, marks, tower_flops
from benchmarks.seven_b import SEVEN_B
from vd_plugin.schedule import resolve


def counted(model: Any, **inputs: torch.Tensor) -> tuple[int, int]:
    """Of the linear layers, and of the products of attention; on no device, so that sizes are real and nothing is
    computed."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    numbers = {str(name): number for name, number in counter.get_flop_counts()["Global"].items()}
    attention = numbers.pop("aten.bmm", 0)
    return sum(numbers.values()), attention


def decoder_flops(num_layers: int, tokens: int) -> float:
    """Attention is counted as a whole matrix there, and half of it is the future: ours is causal."""
    shape = SEVEN_B.decoder
    config = LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        vocab_size=64,
    )
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model = LlamaModel(config)
        # A mask of four dimensions is taken as it is; making one would look at its values.
        mask = torch.empty(1, 1, tokens, tokens)
        embeds = torch.empty(1, tokens, shape.hidden_size)
        linear, attention = counted(model, inputs_embeds=embeds, attention_mask=mask)
    return linear + attention * (tokens + 1) / (2 * tokens)


@pytest.mark.parametrize("budget", ["full", 640, 320, 160])
def test_the_decoder_costs_what_torch_counts(budget: Any) -> None:
    rows = resolve(SEVEN_B, *IMAGE_SIZE, budget).rows
    layers = SEVEN_B.layers_per_stage
    again = sum(count * decoder_flops(1, TEXT_TOKENS + kept) for count, kept in zip(layers, rows, strict=True))
    # The rotary embedding's frequencies are a product, too: one for each pass of a model.
    assert counts()["decoder"][str(budget)] == pytest.approx(again, rel=1e-5)


def test_the_tower_costs_what_torch_counts() -> None:
    sizes = {"num_layers": 3, "hidden": 1024, "inner": 4096, "patch": 14}
    config = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=3, num_attention_heads=16, image_size=336,
        patch_size=14,
    )  # fmt: skip
    config._attn_implementation = "eager"
    with torch.device("meta"):
        linear, attention = counted(CLIPVisionModel(config), pixel_values=torch.empty(5, 3, 336, 336))
    assert tower_flops(5, 577, **sizes) == pytest.approx(linear + attention, rel=1e-9)


def test_320_tokens_save_more_than_five_sixths_of_the_decoder() -> None:
    (mark,) = marks(counts())
    assert mark.is_met
    assert mark.value == pytest.approx(8.27, abs=0.01)
