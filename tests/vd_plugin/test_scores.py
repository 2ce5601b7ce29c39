"""Scoring inside the decoder: against the reference, in tiles, and within its memory."""

from __future__ import annotations

import golden
import pytest
import torch
from reference import Reference, decoder_scores
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from vd_plugin import selection
from vd_plugin.selection import attention_received, images_at_once, visual_scores

SHAPES = [(4, 4), (6, 2), (8, 1)]
"""(heads, key heads): all, grouped and a single one."""


def make(heads: int, kv_heads: int, length: int, width: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(heads, length, width, generator=generator) * 2,
        torch.randn(kv_heads, length, width, generator=generator) * 2,
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("start", "count"), [(0, 30), (0, 1), (29, 1), (7, 12), (18, 12)])
def test_scores_equal_the_reference(shape: tuple[int, int], start: int, count: int) -> None:
    queries, keys = make(*shape, length=30)
    expected = decoder_scores(queries, keys, start, count)
    assert_close(visual_scores(queries, keys, start, count), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 7, 40, 1000])
def test_the_tile_does_not_matter(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], rows: int) -> None:
    queries, keys = make(*shape, length=57)
    whole = visual_scores(queries, keys, 9, 40)
    monkeypatch.setattr(selection, "_TILE_ELEMENTS", rows * shape[0] * 49)
    assert_close(visual_scores(queries, keys, 9, 40), whole, atol=1e-6, rtol=1e-5)


def test_what_follows_the_image_plays_no_part() -> None:
    queries, keys = make(4, 2, length=40)
    before = visual_scores(queries, keys, 5, 20)
    queries[:, 25:], keys[:, 25:] = 100, -100
    assert torch.equal(visual_scores(queries, keys, 5, 20), before)


def test_what_precedes_the_image_takes_its_share() -> None:
    """The softmax is over the whole row: scores sum to less than one with text before, to one without."""
    queries, keys = make(4, 2, length=40)
    assert visual_scores(queries, keys, 0, 40).sum() == pytest.approx(1, abs=1e-5)
    assert visual_scores(queries, keys, 10, 30).sum() < 0.95


@pytest.mark.parametrize("shape", [*SHAPES, (8, 8), (32, 8)], ids=str)
@pytest.mark.parametrize(("length", "count"), [(9, 9), (30, 12), (250, 190), (540, 480)])
def test_a_batch_equals_each_alone_to_the_last_bit(shape: tuple[int, int], length: int, count: int) -> None:
    """On a CPU: a request's answer must not depend on what is pruned beside it. Rows come first, as in the decoder."""
    heads, kv_heads = shape
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(3, count, heads, 32, generator=generator).transpose(1, 2)
    keys = torch.randn(3, length, kv_heads, 32, generator=generator).transpose(1, 2)
    together = attention_received(queries, keys)
    for number, received in enumerate(together):
        alone = slice(number, number + 1)
        assert torch.equal(received, attention_received(queries[alone], keys[alone])[0])


@pytest.mark.parametrize(("device", "tile"), [("cuda", 1 << 24), ("cpu", 1 << 21)])
@pytest.mark.parametrize(("heads", "width"), [(32, 128), (6, 8)])
def test_as_many_images_are_scored_at_once_as_fit_a_tile(heads: int, width: int, device: str, tile: int) -> None:
    for num_queries, num_keys in ((480, 540), (12, 4000), (2880, 2940)):
        count = images_at_once(heads, num_queries, num_keys, width, torch.device(device))
        weights, keys = heads * num_queries * num_keys, heads * num_keys * width
        assert count == 1 or count * max(weights, keys) <= tile
        assert (count + 1) * max(weights, keys) > tile


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    queries, keys = (x.to(dtype) for x in make(4, 2, length=200))
    scores = visual_scores(queries, keys, 20, 180)
    assert scores.dtype == torch.float32
    assert_close(scores, visual_scores(queries.float(), keys.float(), 20, 180), atol=1e-7, rtol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # torch's own
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("count", [900, 2880])
def test_no_tensor_is_larger_than_a_tile(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """An eighth of the real tile, to be quick; heads x n x n would be ten times as large and more."""
    tile = 1 << 21
    monkeypatch.setattr(selection, "_TILE_ELEMENTS", tile)
    queries, keys = make(8, 2, length=count + 100)
    with LargestTensor() as largest:
        received = attention_received(queries[:, 100:], keys)
    assert received.sum() > 0
    assert queries.shape[0] * count * count > 3 * tile
    assert largest.elements <= max(tile, queries.numel())


@golden.requires_golden
@pytest.mark.parametrize("case", golden.image_cases(), ids=str)
def test_scores_equal_the_release(case: golden.Case) -> None:
    """From the recorded residual stream on, through the next layer of the checkpoint."""
    reference = Reference(case.model_dir)
    for stage in (1, 2, 3):
        hidden, positions = case[f"s{stage}_hidden_in"], case[f"s{stage}_pos_in"]
        layer = reference.language_model.layers[int(case[f"s{stage}_layer"])]
        with torch.inference_mode():
            queries, keys, _ = reference._project(layer, hidden, positions)
            start, count = int(case["image_pos"][0]), len(case[f"s{stage}_score"])
            scores = visual_scores(queries, keys, start, count)
        assert_close(scores, case[f"s{stage}_score"], atol=1e-6, rtol=1e-3)
        assert_close(keys.mean(0)[start : start + count], case[f"s{stage}_metric"], atol=1e-4, rtol=1e-3)
        plan = selection.select(scores, keys.mean(0)[start : start + count], *case.decoder[stage - 1])
        assert plan.kept.tolist() == case[f"s{stage}_keep_sorted"].tolist()
        assert plan.owners.tolist() == case[f"s{stage}_assign"].tolist()
