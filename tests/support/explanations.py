"""Explanations of made-up scores: what `visiondrop explain` draws, without an engine."""

from __future__ import annotations

import torch

from vd_plugin.schedule import Budget, Geometry, resolve
from vd_plugin.selection import select
from vd_plugin.tools.explain import Explanation
from vd_plugin.tools.provenance import Origin, encoder_origins, stage_origins, stock_origins
from vd_plugin.vision import TileFeatures, image_order, prune_tiles


def explanation(geometry: Geometry, height: int, width: int, budget: Budget) -> Explanation:
    """As of an engine that scores at random."""
    random = torch.Generator().manual_seed(0)
    schedule = resolve(geometry, height, width, budget)
    stages = [_first_stage(geometry, height, width, budget, random)]
    for split in schedule.decoder:
        rows = stages[-1]
        if split is not None:
            scores, keys = torch.rand(len(rows), generator=random), torch.rand(len(rows), 4, generator=random)
            rows = stage_origins(rows, select(scores, keys, *split))
        stages.append(rows)
    return Explanation(geometry, schedule, (height, width), stages)


def _first_stage(geometry: Geometry, height: int, width: int, budget: Budget, random: torch.Generator) -> list[Origin]:
    split = resolve(geometry, height, width, budget).encoder
    if split is None:
        return stock_origins(geometry, height, width)
    tiles, side = geometry.num_tiles(height, width), geometry.tile_size // geometry.patch_size
    patches = side * side
    features = TileFeatures(
        torch.rand(tiles, patches + 1, 2, generator=random),
        torch.rand(tiles, patches, generator=random),
        torch.rand(tiles, patches, 8, generator=random),
    )
    pruned = prune_tiles(features, split)
    order = image_order(pruned.kept, pruned.tokens.shape[1], geometry.tile_grid(height, width), side)
    return encoder_origins(geometry, height, width, pruned.kept.tolist(), pruned.anchors.tolist(), order.tolist())
