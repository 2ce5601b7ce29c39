"""The encoder stage's tensor functions against the plain reference, and the bound on what the tower sees at once."""

from __future__ import annotations

from typing import Any

import engines
import pytest
import torch
from engines import Engine, draw, request
from reference import TileRows, encoder_stage, image_sequence, merge_plan
from torch import Tensor
from torch.testing import assert_close

from vd_plugin.schedule import TokenSplit
from vd_plugin.vision import TileFeatures, order_image, prune_tiles

SPLITS = [(1, 1), (2, 0), (1, 4), (5, 2), (16, 1), (17, 0), (2, 15), (1, 16)]
"""Of tiles of 16 patches. CLS alone has a test of its own: the reference knows no stage without patches."""


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("num_tiles", [1, 3, 5])
def test_every_tile_is_pruned_as_the_reference_does(split: tuple[int, int], num_tiles: int) -> None:
    features, hidden, attention, keys = _make_features(num_tiles, 16, seed=num_tiles)
    pruned = prune_tiles(features, TokenSplit(*split))
    expected = [encoder_stage(*tile, *split) for tile in zip(hidden, attention, keys, strict=True)]
    assert pruned.kept.tolist() == [tile.patches for tile in expected]
    assert_close(pruned.tokens, torch.stack([tile.tokens for tile in expected]))


@pytest.mark.parametrize("split", [(577, 0), (29, 4), (1, 7), (570, 7)], ids=str)
def test_tiles_of_the_published_size(split: tuple[int, int]) -> None:
    features, hidden, attention, keys = _make_features(2, 576, seed=7)
    pruned = prune_tiles(features, TokenSplit(*split))
    expected = [encoder_stage(*tile, *split) for tile in zip(hidden, attention, keys, strict=True)]
    assert pruned.kept.tolist() == [tile.patches for tile in expected]
    assert_close(pruned.tokens, torch.stack([tile.tokens for tile in expected]))


def test_cls_alone_and_everything() -> None:
    features, *_ = _make_features(3, 16, seed=1)
    assert torch.equal(prune_tiles(features, TokenSplit(1, 0)).tokens, features.tokens[:, :1])
    everything = prune_tiles(features, TokenSplit(17, 0))
    assert torch.equal(everything.tokens, features.tokens)
    assert everything.kept.tolist() == [list(range(16))] * 3


@pytest.mark.parametrize("num_rows", [0, 17, 18])
def test_a_tile_has_no_room_for_other_counts(num_rows: int) -> None:
    features, *_ = _make_features(1, 16, seed=1)
    with pytest.raises(ValueError, match="cannot keep"):
        prune_tiles(features, TokenSplit(num_rows, 1 if num_rows == 17 else 0))


def test_equal_scores_keep_the_lowest_patches() -> None:
    features, *_ = _make_features(2, 16, seed=1)
    flat = features._replace(scores=torch.ones_like(features.scores))
    assert prune_tiles(flat, TokenSplit(5, 2)).kept.tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize("grid", [(0, 0), (1, 2), (2, 1), (2, 2), (1, 3), (3, 1), (3, 2)], ids=str)
@pytest.mark.parametrize("split", [(1, 0), *SPLITS, "uneven"], ids=str)
@pytest.mark.parametrize("side", [4])
def test_an_image_is_ordered_as_the_reference_does(
    grid: tuple[int, int], split: tuple[int, int] | str, side: int
) -> None:
    """Every row has its own value, so that a wrong order cannot hide. "uneven": tiles keep opposite corners."""
    num_tiles = 1 + grid[0] * grid[1]
    if isinstance(split, str):
        kept = torch.tensor([[0, 1, 2] if tile % 2 else [13, 14, 15] for tile in range(num_tiles)])
        num_contextual = 2
    else:
        generator = torch.Generator().manual_seed(len(grid) + split[0])
        kept = torch.rand(num_tiles, side**2, generator=generator).argsort()[:, : split[0] - 1].sort().values
        num_contextual = split[1]
    rows = 1 + kept.shape[1] + num_contextual
    tokens = torch.arange(num_tiles * rows * 2).reshape(num_tiles, rows, 2).float()
    any_plan = merge_plan(torch.ones(4), torch.ones(4, 1), 1, 0)
    tiles = [TileRows(tile, patches, any_plan) for tile, patches in zip(tokens, kept.tolist(), strict=True)]
    ordered = order_image(tokens, kept, grid, side)
    assert torch.equal(ordered, image_sequence(tiles, list(tokens), grid, side))
    assert torch.equal(ordered.sort(0).values, tokens.flatten(0, 1))


# On the engine


@pytest.fixture(scope="module")
def engine(random_model: Any) -> Engine:
    return engines.start(random_model)


@pytest.mark.engine
@pytest.mark.slow
def test_the_tower_never_sees_more_tiles_than_its_bound(engine: Engine) -> None:
    """Eight images of three tiles fit one step by their placeholders, not by what the tower runs over."""
    seen: list[int] = []
    asked_for: list[int] = []

    def watch(model: Any) -> int:
        model.hooks = [
            model.vision_tower.vision_model.embeddings.register_forward_pre_hook(
                lambda _, arguments: seen.append(arguments[0].shape[0])
            )
        ]
        stock = model.embed_multimodal

        def count(**kwargs: Any) -> list[Tensor]:
            asked_for.append(sum(len(tiles) for tiles in kwargs["pixel_values"]))
            rows: list[Tensor] = stock(**kwargs)
            return rows

        model.embed_multimodal = count
        return int(model.max_tower_tiles)

    def leave(model: Any) -> None:
        model.hooks[0].remove()
        del model.embed_multimodal, model.hooks

    bound = engine.on_model(watch)
    try:
        prompts = [
            request("USER: <image>\nWhat? ASSISTANT:", [draw(640, 320, seed)], visual_token_budget=32)
            for seed in range(8)
        ]
        engine.generate(*prompts, num_tokens=1)
    finally:
        engine.on_model(leave)
    assert bound == max(5, 4096 // 576)
    assert max(asked_for) > bound, "the pictures did not meet in one step: the test shows nothing"
    assert sum(seen) == sum(asked_for) == 24
    assert max(seen) <= bound


@pytest.mark.engine
@pytest.mark.slow
def test_chunks_change_nothing(engine: Engine) -> None:
    generator = torch.Generator().manual_seed(0)
    tiles = [3, 5, 3, 3, 5, 4]
    sizes = torch.tensor([(320, 640), (500, 500), (640, 320), (320, 640), (500, 500), (90, 900)])
    arguments = {
        "pixel_values": [torch.randn(count, 3, 336, 336, generator=generator) for count in tiles],
        "image_sizes": sizes,
        "visual_token_schedule": torch.tensor([[[9, 2]], [[40, 6]], [[0, 0]], [[1, 0]], [[2, 3]], [[577, 0]]]),
    }

    def run(model: Any, bound: int) -> tuple[list[Tensor], list[int]]:
        seen: list[int] = []
        hook = model.vision_tower.vision_model.embeddings.register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0].shape[0])
        )
        usual, model.max_tower_tiles = model.max_tower_tiles, bound
        try:
            return model.embed_multimodal(**arguments), seen
        finally:
            model.max_tower_tiles = usual
            hook.remove()

    whole, at_once = engine.on_model(lambda model: run(model, 1000))
    assert at_once == [3, 20]
    for bound, expected in ((1, [3, 3, 5, 3, 5, 4]), (5, [3, 3, 5, 3, 5, 4]), (8, [3, 8, 8, 4]), (11, [3, 11, 9])):
        chunked, seen = engine.on_model(lambda model, bound=bound: run(model, bound))
        assert seen == expected
        for rows, same in zip(chunked, whole, strict=True):
            assert_close(rows, same, atol=1e-5, rtol=1e-5)


def _make_features(num_tiles: int, num_patches: int, seed: int) -> tuple[TileFeatures, Tensor, Tensor, Tensor]:
    """Random features, and the same as the reference takes them: per head, CLS included."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tiles, 1 + num_patches, 6, generator=generator)
    attention = torch.randn(num_tiles, 2, 1 + num_patches, generator=generator).softmax(-1)
    keys = torch.randn(num_tiles, 2, 1 + num_patches, 4, generator=generator)
    return TileFeatures(hidden, attention.sum(1)[:, 1:], keys.mean(1)[:, 1:]), hidden, attention, keys
