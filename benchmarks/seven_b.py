"""The shape of LLaVA-NeXT-7B (llava-v1.6-vicuna-7b), as schedules and counts of operations see it."""

from __future__ import annotations

from typing import Final

from vd_plugin.schedule import RULE_VERSION, DecoderShape, Geometry

SEVEN_B: Final = Geometry(
    rule_version=RULE_VERSION,
    tile_size=336,
    patch_size=14,
    grid_pinpoints=((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)),
    boundaries=(8, 16, 24),
    decoder=DecoderShape(32, 4096, 11008, 32, 32, 128),
)
