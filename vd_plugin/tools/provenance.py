"""Where each visual token comes from: a view of the image and a patch in it, followed through the stages.

Indices only; `explain` turns them into an image. A contextual token is placed at the patch that it grew from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from vd_plugin.schedule import Geometry


@dataclass(frozen=True, slots=True)
class Origin:
    """A row of an image: `view` is "base" or "tiles", or None for a token of no place (CLS, a newline)."""

    view: str | None
    row: int = -1
    column: int = -1
    contextual: bool = False


def stock_origins(geometry: Geometry, height: int, width: int) -> list[Origin]:
    """Rows of an image that the encoder does not prune: the base view, then the unpadded grid with its newlines."""
    side = geometry.tile_size // geometry.patch_size
    origins = [Origin("base", patch // side, patch % side) for patch in range(side * side)]
    tile_rows, tile_columns = geometry.tile_grid(height, width)
    if not tile_rows:
        return origins
    grid_height, grid_width = side * tile_rows, side * tile_columns
    kept = geometry.full_tokens(height, width) - len(origins)
    # Unpadding trims one direction only; which one follows from what is left.
    is_wide = width / height > grid_width / grid_height
    rows = kept // (grid_width + 1) if is_wide else grid_height
    columns = grid_width if is_wide else kept // grid_height - 1
    top, left = (grid_height - rows) // 2, (grid_width - columns) // 2
    for row in range(top, top + rows):
        origins += [Origin("tiles", row, column) for column in range(left, left + columns)]
        origins.append(Origin(None))
    return origins


def encoder_origins(
    geometry: Geometry,
    height: int,
    width: int,
    kept: Sequence[Sequence[int]],
    anchors: Sequence[Sequence[int]],
    order: Sequence[int],
) -> list[Origin]:
    """Rows of an image that the encoder prunes.

    Args:
        kept, anchors: for each tile, patches that stay and patches that contextual tokens grow from.
        order: for each row of the image its place among the tiles' rows laid end to end (`vision.image_order`).
    """
    side = geometry.tile_size // geometry.patch_size
    _, tile_columns = geometry.tile_grid(height, width)
    rows: list[Origin] = []
    for tile, (kept_patches, anchor_patches) in enumerate(zip(kept, anchors, strict=True)):
        down, right = divmod(tile - 1, tile_columns) if tile else (0, 0)

        def place(patch: int, view: str, down: int = down, right: int = right) -> Origin:
            return Origin(view, down * side + patch // side, right * side + patch % side)

        view = "tiles" if tile else "base"
        rows.append(Origin(None))
        rows += [place(patch, view) for patch in kept_patches]
        rows += [replace(place(patch, view), contextual=True) for patch in anchor_patches]
    return [rows[place] for place in order]


def stage_origins(origins: Sequence[Origin], plan: Any) -> list[Origin]:
    """Rows of an image behind a stage of the decoder, from those before it and the stage's plan."""
    kept = [replace(origins[index], contextual=False) for index in plan.kept.tolist()]
    return kept + [replace(origins[index], contextual=True) for index in plan.anchors.tolist()]
