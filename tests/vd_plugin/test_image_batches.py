"""Images that are pruned together: each finds its rows and keys, and its result is the one that it has alone.

A decoder of one layer that projects rows by plain matrices, so that what precedes an image can be known by its values.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("vllm")

from vd_plugin import decoder, selection, tensor_parallel
from vd_plugin.decoder import StagedDecoder
from vd_plugin.image_batches import batch_images, portions
from vd_plugin.schedule import TokenSplit
from vd_plugin.selection import Plan, apply, select, visual_scores
from vd_plugin.spans import ImageSpan
from vd_plugin.step_layout import PrunedRequest, StepLayout, plan_stages

pytestmark = pytest.mark.engine

HEADS, KV_HEADS, WIDTH, BLOCK_SIZE, NUM_BLOCKS = 4, 2, 8, 4, 64
HIDDEN = HEADS * WIDTH
SHAPES = [(12, TokenSplit(5, 2)), (12, TokenSplit(5, 2)), (12, TokenSplit(4, 3)), (9, TokenSplit(4, 3))]
"""Rows of an image, and what stays: the first is the most frequent."""


@st.composite
def requests(draw: st.DrawFn) -> tuple[int, list[int]]:
    """Tokens computed before the step, and the step's parts: text of so many tokens, or minus an image's shape."""
    computed = draw(st.sampled_from([0, 0, 1, 3, 4, 5, 9]))
    parts: list[int] = []
    for _ in range(draw(st.integers(0, 3))):
        parts += [draw(st.sampled_from([0, 3, 3, 7])), -draw(st.integers(1, len(SHAPES)))]
    return computed, [*parts, draw(st.integers(1, 4))]


def attention(generator: torch.Generator, device: str = "cpu") -> Any:
    """A layer: projections without norm, keys rotated by a scale of their position."""
    weight = torch.randn((HEADS + 2 * KV_HEADS) * WIDTH, HIDDEN, generator=generator).to(device)

    def rotate(positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        scale = (1 + positions / 50).unsqueeze(-1)
        return query * scale, key / scale

    attention = SimpleNamespace(
        q_size=HEADS * WIDTH,
        kv_size=KV_HEADS * WIDTH,
        head_dim=WIDTH,
        qkv_proj=lambda rows: (rows @ weight.T, None),
        rotary_emb=rotate,
        attn=SimpleNamespace(
            kv_cache=torch.randn(NUM_BLOCKS, BLOCK_SIZE * KV_HEADS * WIDTH, generator=generator).to(device)
        ),
    )
    return SimpleNamespace(input_layernorm=lambda rows: rows, self_attn=attention)


def reader() -> Any:
    """Of a cache whose blocks hold keys alone, in order."""

    def read(cache: Tensor, blocks: Tensor) -> Tensor:
        return cache[blocks].view(-1, KV_HEADS, WIDTH)

    return SimpleNamespace(read=read, block_shape=(BLOCK_SIZE, KV_HEADS, WIDTH))


class Step:
    """A step of one stage, with the block tables and the stream of some requests."""

    def __init__(self, batch: list[tuple[int, list[int]]], stream: list[Tensor], tables: list[Tensor]) -> None:
        self.pruned, self.lengths = [], []
        for index, (computed, parts) in enumerate(batch):
            offset, spans = computed, []
            for part in parts:
                if part < 0:
                    rows, split = SHAPES[-part - 1]
                    spans.append(ImageSpan(offset, (rows, split.rows), (split,)))
                offset += part if part >= 0 else SHAPES[-part - 1][0]
            self.lengths.append(offset - computed)
            if spans:
                self.pruned.append(PrunedRequest(str(index), index, index, computed, tuple(spans)))
        lengths, drops = np.array(self.lengths, dtype=np.int32), np.zeros((1, len(batch)), dtype=np.int32)
        self.stages = plan_stages(lengths, self.pruned, drops, 1)
        self.layout = StepLayout([], self.stages, block_tables=[torch.stack(tables)])
        self.stream = torch.cat(stream)

    def prune(self, layer: Any) -> tuple[list[Tensor], list[tuple[str, ImageSpan, Tensor, Plan]]]:
        """Rows of every request at the stage, and what the observer has seen."""
        staged = StagedDecoder(SimpleNamespace(layers=[None, layer]), (0, 1, 2), segments=())
        staged.key_reader = reader()
        seen: list[tuple[str, ImageSpan, Tensor, Plan]] = []
        staged.observer = lambda stage, req_id, span, scores, plan: seen.append((req_id, span, scores, plan))
        rows, qkv = staged._prune(1, self.stream, StagedDecoder._project(layer, self.stream), self.layout)
        torch.testing.assert_close(qkv, StagedDecoder._project(layer, rows), atol=1e-4, rtol=1e-4)
        return list(rows.split(self.stages[0].lengths.tolist())), seen


def draw_inputs(batch: list[tuple[int, list[int]]], generator: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
    lengths = [sum(part if part >= 0 else SHAPES[-part - 1][0] for part in parts) for _, parts in batch]
    streams = [torch.randn(length, HIDDEN, generator=generator) for length in lengths]
    tables = torch.randperm(NUM_BLOCKS, generator=generator)[: 4 * len(batch)].view(len(batch), 4).to(torch.int32)
    return streams, list(tables)


def prune_by_hand(layer: Any, request: tuple[int, list[int]], stream: Tensor, table: Tensor) -> Tensor:
    """A request's rows at the stage, an image after the other, each in the sequence that ends with it."""
    computed, parts = request
    cached = reader().read(layer.self_attn.attn.kv_cache, table.long())[:computed]
    before = stream[:0]
    for part in parts:
        rows, split = (part, None) if part >= 0 else SHAPES[-part - 1]
        now, stream = stream[:rows], stream[rows:]
        if split is not None:
            sequence = torch.cat((before, now))
            positions = torch.arange(computed, computed + len(sequence))
            queries, keys = StagedDecoder._rotate(layer, StagedDecoder._project(layer, sequence), positions)
            keys = torch.cat((cached, keys)).transpose(0, 1)
            queries = torch.cat((torch.zeros(computed, HEADS, WIDTH), queries)).transpose(0, 1)
            scores = visual_scores(queries, keys, computed + len(before), rows)
            now = apply(select(scores, keys[:, -rows:].mean(dim=0), *split), now)
        before = torch.cat((before, now))
    return before


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_parallel, "get_tensor_model_parallel_world_size", lambda: 1)


@settings(max_examples=100)
@given(st.lists(requests(), min_size=1, max_size=6), st.integers(0, 2**32))
def test_every_image_is_pruned_in_the_sequence_that_ends_with_it(batch: list[tuple[int, list[int]]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layer = attention(generator)
    streams, tables = draw_inputs(batch, generator)
    rows, _ = Step(batch, streams, tables).prune(layer)
    for request, stream, table, found in zip(batch, streams, tables, rows, strict=True):
        expected = prune_by_hand(layer, request, stream, table)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@settings(max_examples=100)
@example([(0, [0, -4, 1])] * 2, 0)
@given(st.lists(requests(), min_size=2, max_size=6), st.integers(0, 2**32))
def test_an_image_is_pruned_as_alone_to_the_last_bit(batch: list[tuple[int, list[int]]], seed: int) -> None:
    """On a CPU in float32. A GPU's libraries choose their kernels by the size of a batch."""
    generator = torch.Generator().manual_seed(seed)
    layer = attention(generator)
    streams, tables = draw_inputs(batch, generator)
    rows, seen = Step(batch, streams, tables).prune(layer)
    places = [(int(req_id), span.offset) for req_id, span, _, _ in seen]
    assert places == sorted(places), "the observer is notified in the order of the step"
    for index, request in enumerate(batch):
        (alone,), one = Step([request], [streams[index]], [tables[index]]).prune(layer)
        assert torch.equal(alone, rows[index])
        mine = [each for each in seen if each[0] == str(index)]
        assert len(mine) == len(one)
        for (_, span, scores, plan), (_, other, expected, same) in zip(mine, one, strict=True):
            assert span == other
            assert torch.equal(scores, expected)
            assert all(torch.equal(*pair) for pair in zip(plan, same, strict=True))


def test_equal_images_share_a_batch_and_equal_contexts_their_keys() -> None:
    """Whether what precedes an image comes from the cache or from this step does not matter."""
    batch = [(0, [5, -1, 1]), (9, [-1, 4]), (5, [-1, 1]), (2, [3, -1, 1]), (0, [5, -3, -1, 2]), (0, [5, 1])]
    step = Step(batch, *draw_inputs(batch, torch.Generator()))
    images = batch_images(1, step.stages[0].requests, BLOCK_SIZE)
    shapes = [
        [(batch.num_rows, batch.split, [array.shape for array in batch.key_arrays()]) for batch in wave.batches]
        for wave in images.waves
    ]
    assert shapes == [
        [(12, TokenSplit(4, 3), [(1, 17)]), (12, TokenSplit(5, 2), [(3, 17), (1, 21)])],
        [(12, TokenSplit(5, 2), [(1, 24)])],
    ]
    assert len(images.block_owners) == 2 + 1 + 3
    assert [wave.followed for wave in images.waves] == [((0, 0),), ()]


def test_ranks_exchange_what_a_wave_needs_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks with the same heads: the means are what each has, and every wave gathers once."""
    gathered: list[int] = []

    def gather(tensor: Tensor, dim: int) -> Tensor:
        gathered.append(tensor.numel())
        return torch.cat((tensor, tensor), dim=dim)

    batch = [(0, [5, -1, 1]), (3, [2, -1, 1]), (0, [4, -2, 3, -4, 2])]
    generator = torch.Generator().manual_seed(0)
    layer = attention(generator)
    step = Step(batch, *draw_inputs(batch, generator))
    one, seen = step.prune(layer)
    monkeypatch.setattr(tensor_parallel, "get_tensor_model_parallel_world_size", lambda: 2)
    monkeypatch.setattr(tensor_parallel, "tensor_model_parallel_all_gather", gather)
    two, same = step.prune(layer)
    assert all(torch.equal(*pair) for pair in zip(one, two, strict=True))
    assert all(torch.equal(ours[2], theirs[2]) for ours, theirs in zip(seen, same, strict=True))
    assert gathered == [3 * 12 * (1 + WIDTH), 9 * (1 + WIDTH)]


def test_requests_whose_keys_would_take_too_much_memory_are_pruned_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Keys of the cache count, too: contexts of 9, 1, 3 and 12 tokens, and 17 or 12 rows of this step each."""
    batch = [(9, [5, -1, 1]), (1, [5, -1, 1]), (3, [-1, 1]), (12, [-1, 1])]
    generator = torch.Generator().manual_seed(2)
    layer = attention(generator)
    step = Step(batch, *draw_inputs(batch, generator))
    whole, _ = step.prune(layer)
    monkeypatch.setattr(decoder, "_POOL_ELEMENTS", 44 * KV_HEADS * WIDTH)
    found = [[r.request.req_id for r in portion] for portion in portions(step.stages[0].requests, 44)]
    assert found == [["0", "1"], ["2", "3"]]
    assert [len(portion) for portion in portions(step.stages[0].requests, 1)] == [1, 1, 1, 1]
    parts, _ = step.prune(layer)
    assert all(torch.equal(*pair) for pair in zip(whole, parts, strict=True))


def test_many_images_do_not_need_more_memory_for_weights_than_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four images at once fit no tile: they are scored by twos, with equal results."""
    batch = [(0, [5, -1, 1])] * 4
    generator = torch.Generator().manual_seed(1)
    layer = attention(generator)
    step = Step(batch, *draw_inputs(batch, generator))
    whole, _ = step.prune(layer)
    taken: list[int] = []
    received = decoder.attention_received

    def watch(queries: Tensor, keys: Tensor) -> Tensor:
        taken.append(len(queries))
        return received(queries, keys)

    monkeypatch.setattr(decoder, "attention_received", watch)
    monkeypatch.setattr(selection, "_TILE_ELEMENTS", 2 * HEADS * 17 * 12)
    parts, _ = step.prune(layer)
    assert taken == [2, 2]
    assert all(torch.equal(*pair) for pair in zip(whole, parts, strict=True))
