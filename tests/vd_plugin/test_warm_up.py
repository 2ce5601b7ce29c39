"""Before the first request, pruning has run once at every stage: on GPUs, and when the KV cache is the real one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("vllm")

from vd_plugin import decoder, model_state
from vd_plugin.decoder import StagedDecoder
from vd_plugin.model_state import StagedModelState
from vd_plugin.selection import Plan
from vd_plugin.spans import ImageSpan

pytestmark = pytest.mark.engine

HEADS, KV_HEADS, WIDTH, BLOCK_SIZE = 4, 2, 8, 16


class Projection(nn.Linear):
    def forward(self, rows: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]  # a stand-in
        return super().forward(rows), None


def layer() -> Any:
    attention = SimpleNamespace(
        q_size=HEADS * WIDTH,
        kv_size=KV_HEADS * WIDTH,
        head_dim=WIDTH,
        qkv_proj=Projection(HEADS * WIDTH, (HEADS + 2 * KV_HEADS) * WIDTH),
        rotary_emb=lambda positions, query, key: (query, key),
        attn=SimpleNamespace(kv_cache=torch.zeros(1)),
    )
    return SimpleNamespace(input_layernorm=nn.LayerNorm(HEADS * WIDTH), self_attn=attention)


@pytest.mark.parametrize("boundaries", [(1,), (1, 2), (1, 2, 3)], ids=str)
def test_every_stage_scores_and_prunes(boundaries: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "mean_over_ranks", lambda *partials: partials)
    model = SimpleNamespace(layers=[layer() for _ in range(4)])
    staged = StagedDecoder(model, (0, *boundaries, len(model.layers)), segments=())
    read: list[list[int]] = []

    def read_keys(cache: Tensor, blocks: Tensor) -> Tensor:
        read.append(blocks.tolist())
        return torch.zeros(BLOCK_SIZE, KV_HEADS, WIDTH)

    shape = (BLOCK_SIZE, KV_HEADS, WIDTH)
    staged.key_reader = SimpleNamespace(read=read_keys, block_shape=shape)  # type: ignore[assignment]  # a stand-in
    plans: list[tuple[int, Plan]] = []

    def observe(stage: int, req_id: str, span: ImageSpan, scores: Tensor, plan: Plan) -> None:
        plans.append((stage, plan))

    staged.observer = observe
    staged.warm_up()
    assert [stage for stage, _ in plans] == list(range(1, len(boundaries) + 1))
    assert read == [[0]] * len(boundaries), "the block that vLLM keeps for itself"
    for _, plan in plans:
        assert min(len(part) for part in plan) > 0, "tokens are kept, merged, and merged into"


class Decoder:
    def __init__(self) -> None:
        self.calls = 0

    def warm_up(self) -> None:
        self.calls += 1


@pytest.mark.parametrize(
    ("num_gpu_blocks", "is_cuda", "warmed", "logged"),
    [(None, True, 0, 0), (None, False, 0, 0), (732, True, 1, 1), (732, False, 0, 1)],
)
def test_only_the_real_cache_is_announced_and_only_gpus_are_warmed_up(
    num_gpu_blocks: int | None, is_cuda: bool, warmed: int, logged: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's runner lays a small cache out first, to measure what CUDA graphs take, and throws it away."""
    sentences: list[Any] = []
    state = object.__new__(StagedModelState)
    state.vllm_config = SimpleNamespace(cache_config=SimpleNamespace(num_gpu_blocks=num_gpu_blocks))
    bound: list[Any] = []
    staged = Decoder()
    state.model = SimpleNamespace(bind_kv_cache=bound.append, decoder=staged)
    state.num_stages, state.device = 0, torch.device("cpu")
    monkeypatch.setattr(StagedModelState, "_log_capacity", lambda self, kv_cache_config: sentences.append(1))
    platform = SimpleNamespace(is_cuda=lambda: is_cuda, is_cpu=lambda: not is_cuda)
    monkeypatch.setattr(model_state, "current_platform", platform)
    monkeypatch.setattr(model_state.DefaultModelState, "initialize_kv_cache", lambda *args: None)
    state.initialize_kv_cache(SimpleNamespace(kv_cache_groups=[]), None)
    assert (len(bound), staged.calls, len(sentences)) == (1, warmed, logged)
