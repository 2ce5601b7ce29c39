"""vLLM's Triton attention, which GPUs use in float32, in Triton's interpreter: the CPU's answers, eager and replayed.

Its metadata are plain tensors, so that here a replay is a true one: nothing of it is made for the step.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import engines
import pytest
import torch
from engines import Answer, Engine, draw, request
from graph_replay import MADE_ANEW, replayed
from staged import LAYERS, assert_same, checkpoint, words
from vllm.platforms import current_platform
from vllm.v1.attention import selector
from vllm.v1.attention.backends import triton_attn
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadata,
)

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.cpu]

BATCH = [
    request(f"{words(2, 1)} <image> w3", [draw(90, 90)], visual_token_schedule=[[8, 2], [5, 2], [3, 1], [2, 1]]),
    request(words(4)),
]
"""Small: the interpreter takes a millisecond for each row, head and layer."""
NUM_TOKENS = 3


def start(llava15: Path) -> Engine:
    return engines.start(
        checkpoint("llava15_gqa8", llava15),
        layers=LAYERS,
        block_size=32,
        max_model_len=640,
        num_gpu_blocks_override=81,
    )


@pytest.fixture(scope="module")
def expected(llava15: Path) -> list[Answer]:
    """The CPU back end's."""
    return start(llava15).generate(*BATCH, num_tokens=NUM_TOKENS)


@pytest.fixture(scope="module")
def engine(llava15: Path, expected: list[Answer]) -> Iterator[Engine]:
    module, name = TritonAttentionBackend.full_cls_name()
    engines.stop()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(current_platform), "get_attn_backend_cls", lambda *_, **__: f"{module}.{name}")
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))  # its kernels ask
        patch.setattr(triton_attn, "MIN_LAUNCH_GRID_SIZE_2D", 0)  # as for many requests: no segments of keys
        selector._cached_get_attn_backend.cache_clear()
        yield start(llava15)
        engines.stop()
    selector._cached_get_attn_backend.cache_clear()


def test_stages_prune_as_on_the_cpu(engine: Engine, expected: list[Answer]) -> None:
    """With keys that are read out of its own arrangement of the KV cache."""
    layers = engine.llm.apply_model(lambda model: model.language_model.model.layers)[0]
    assert {type(layer.self_attn.attn.impl) for layer in layers} == {TritonAttentionImpl}
    for one, answer in zip(expected, engine.generate(*BATCH, num_tokens=NUM_TOKENS), strict=True):
        assert_same(one, answer)


def test_metadata_of_the_capture_serves_every_replay(engine: Engine, expected: list[Answer]) -> None:
    engine.forget()
    with replayed(engine, [len(BATCH)]) as replays:
        answers = engine.generate(*BATCH, num_tokens=NUM_TOKENS)
    assert replays.sizes == [(len(BATCH), len(BATCH))] * (NUM_TOKENS - 1)
    for metadata in replays.step.metadata.values():
        assert isinstance(metadata, TritonAttentionMetadata)
        assert getattr(metadata, MADE_ANEW) is None
    for one, answer in zip(expected, answers, strict=True):
        assert_same(one, answer)
