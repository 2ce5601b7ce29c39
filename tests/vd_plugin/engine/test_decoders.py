"""The other decoders of published LLaVA-NeXT checkpoints, tiny and random, against the plain reference.

Llama with grouped-query attention is the random checkpoint itself (`test_stage_parity.py`). The others have its
weights.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import engines
import pytest
import torch
from decoder_checkpoint import with_decoder
from engines import Engine, draw
from reference import Image, Reference
from staged import LAYERS, observed, rows_of
from vllm.distributed import cleanup_dist_env_and_memory

pytestmark = [pytest.mark.engine, pytest.mark.slow, engines.float32_only]

TOLERANCE = 1e-3
BACKBONES: dict[str, dict[str, Any]] = {
    "mistral": {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": None,
        "rope_theta": 1e6,
    },
    "qwen2": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "rope_theta": 1e6,
        "num_key_value_heads": 3,
    },
}
SPLITS = [(30, 5), (70, 10), (50, 8), (30, 4)]
PROMPTS = {
    "one image": ("USER: Look. <image>\nWhat is it? ASSISTANT:", [draw(640, 320)]),
    "two images": ("USER: <image>\nWhat? ASSISTANT: It. USER: And <image>", [draw(320, 640), draw(300, 400, seed=1)]),
    "text": ("USER: What is it? ASSISTANT:", []),
}


@pytest.fixture(scope="module", params=BACKBONES)
def backbone(request: pytest.FixtureRequest, random_model: Path) -> tuple[Engine, Reference]:
    folder = with_decoder(random_model, random_model.parent / request.param, BACKBONES[request.param])
    engine = engines.start(folder, layers=LAYERS)
    names = engine.on_model(lambda model: [type(model.language_model).__name__])
    assert names == BACKBONES[request.param]["architectures"]
    return engine, Reference(folder)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_plans_and_answers_equal_the_reference(backbone: tuple[Engine, Reference], prompt: str) -> None:
    engine, reference = backbone
    text, pictures = PROMPTS[prompt]
    asked = {"visual_token_schedule": [list(split) for split in SPLITS]} if pictures else {}
    with observed(engine) as plans:
        answer = engine.ask(text, pictures, **asked)
    images = [_prepare(reference, picture) for picture in pictures]
    expected = reference.generate(reference.tokenize(text), images, LAYERS, num_tokens=engines.NUM_TOKENS)
    assert len(plans) == len(expected.stages) == 3 * len(pictures)
    offsets = sorted({seen.span.offset for seen in plans})
    for seen in plans:
        record = expected.stages[seen.stage, offsets.index(seen.span.offset)]
        assert rows_of(seen.plan) == record.plan._asdict()
    assert answer.token_ids == expected.token_ids
    assert float((answer.logprobs - expected.logprobs).abs().max()) < TOLERANCE


def test_the_decoders_differ(backbone: tuple[Engine, Reference], random_model: Path) -> None:
    """Else a derived checkpoint would prove nothing that the random one has not."""
    _, reference = backbone
    ids = reference.tokenize(PROMPTS["text"][0])
    one, other = (model.generate(ids, num_tokens=1).logprobs for model in (reference, Reference(random_model)))
    assert float((one - other).abs().max()) > 10 * TOLERANCE


def test_a_sliding_window_is_refused(random_model: Path) -> None:
    folder = with_decoder(random_model, random_model.parent / "sliding", {**BACKBONES["mistral"], "sliding_window": 64})
    engines.stop()
    try:
        with pytest.raises(NotImplementedError, match="VisionDrop prunes inside decoders of full attention only"):
            engines.start(folder, layers=LAYERS)
    finally:
        # What is left of half an engine stands in the way of the next one.
        cleanup_dist_env_and_memory()
        os.environ.pop("VLLM_DIST_IDENT", None)
        torch.set_num_threads = engines._SET_NUM_THREADS


def _prepare(reference: Reference, picture: Any) -> Image:
    """By the image processor that the engine uses."""
    from transformers import AutoImageProcessor

    pixels = AutoImageProcessor.from_pretrained(reference.folder)(picture, return_tensors="pt")["pixel_values"]
    tiles = pixels.reshape(-1, *pixels.shape[-3:])
    return Image(tiles, (picture.height, picture.width), SPLITS[0], SPLITS[1:])
