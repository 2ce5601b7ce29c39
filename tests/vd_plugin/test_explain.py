"""`visiondrop explain`: where kept tokens lie in the image, and that the figures are the engine's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engines import draw
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.llava_next.modeling_llava_next import unpad_image

from vd_plugin.schedule import DecoderShape, Geometry, TokenSplit
from vd_plugin.selection import select
from vd_plugin.tools.provenance import Origin, encoder_origins, stage_origins, stock_origins
from vd_plugin.vision import TileFeatures, image_order, prune_tiles

PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
GEOMETRY = Geometry(1, 336, 14, PINPOINTS, (2, 4, 6), DecoderShape(8, 64, 128, 4, 2, 16))


@given(height=st.integers(1, 3000), width=st.integers(1, 3000))
def test_stock_rows_lie_where_unpadding_leaves_them(height: int, width: int) -> None:
    rows, columns = (24 * tiles for tiles in GEOMETRY.tile_grid(height, width))
    cells = torch.arange(rows * columns).view(1, rows, columns)
    left = unpad_image(cells, (height, width))[0]
    origins = stock_origins(GEOMETRY, height, width)
    assert len(origins) == GEOMETRY.full_tokens(height, width)
    assert [
        origin.row * columns + origin.column for origin in origins if origin.view == "tiles"
    ] == left.flatten().tolist()
    assert sum(origin.view is None for origin in origins) == left.shape[0], "one newline a row"


@pytest.mark.parametrize("size", [(672, 672), (300, 900), (500, 200)])
def test_pruned_rows_are_found_where_their_tokens_came_from(size: tuple[int, int]) -> None:
    """Each token carries its own place; the origins must tell the same."""
    tiles, side = GEOMETRY.num_tiles(*size), 24
    patch = torch.arange(side * side)
    places = torch.stack((patch // side, patch % side), dim=-1).float().expand(tiles, -1, -1)
    tokens = torch.cat((torch.full((tiles, 1, 2), -1.0), places), dim=1)
    random = torch.Generator().manual_seed(0)
    features = TileFeatures(
        tokens, torch.rand(tiles, 576, generator=random), torch.rand(tiles, 576, 8, generator=random)
    )
    pruned = prune_tiles(features, TokenSplit(30, 0))
    grid = GEOMETRY.tile_grid(*size)
    order = image_order(pruned.kept, pruned.tokens.shape[1], grid, side)
    rows = pruned.tokens.flatten(0, 1)[order].long().tolist()
    origins = encoder_origins(GEOMETRY, *size, pruned.kept.tolist(), pruned.anchors.tolist(), order.tolist())
    assert [(origin.row % side, origin.column % side) if origin.view else (-1, -1) for origin in origins] == [
        tuple(row) if row != [-1, -1] else (-1, -1) for row in rows
    ]
    tiled = [(origin.row, origin.column) for origin in origins if origin.view == "tiles"]
    assert tiled == sorted(tiled), "reading order over the whole grid"


def test_a_stage_marks_what_it_merges_into() -> None:
    origins = [Origin("base", 0, column) for column in range(10)]
    plan = select(torch.arange(10.0), torch.rand(10, 4), 4, 2)
    rows = stage_origins(origins, plan)
    assert [(row.column, row.contextual) for row in rows] == [
        (6, False), (7, False), (8, False), (9, False), (0, True), (3, True)
    ]  # fmt: skip


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("budget", ["160", "full"])
def test_the_command_writes_a_image_and_the_data(random_model: Path, tmp_path: Path, budget: str) -> None:
    source, out = tmp_path / "in.png", tmp_path / "out.png"
    draw(500, 400).save(source)
    arguments = ["explain", str(source), "--model", str(random_model), "--budget", budget, "--out", str(out)]
    run = subprocess.run(
        [sys.executable, "-m", "server.cli", *arguments], capture_output=True, text=True, timeout=300, env=os.environ
    )
    assert run.returncode == 0, run.stderr[-2000:]
    data = json.loads(out.with_suffix(".json").read_text())
    assert [stage["rows"] for stage in data["stages"]] == data["visual_tokens"]["stages"]
    if budget == "160":
        assert data["visual_tokens"]["stages"] == [240, 175, 130, 95]
    for stage in data["stages"]:
        places = len(stage["dominant"]) + len(stage["contextual"]) + stage["without_place"]
        assert places == stage["rows"]
    assert Image.open(out).size[0] > 336 + 672
    assert f"{data['visual_tokens']['saved']} saved" in run.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["/no/such.png", "--budget", "320"], "cannot read the image"),
        (["PICTURE", "--budget", "31"], "at least 32"),
        (["PICTURE", "--budget", "lots"], "at least 32"),
        (["PICTURE", "--model", "/no/such/model"], "no such model folder"),
    ],
)
def test_bad_input_gets_one_sentence(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    draw(50, 50).save(tmp_path / "in.png")
    arguments = [str(tmp_path / "in.png") if argument == "PICTURE" else argument for argument in arguments]
    model = [] if "--model" in arguments else ["--model", "/no/such/model"]
    command = [sys.executable, "-m", "vd_plugin.tools.explain", *arguments, *model, "--out", str(tmp_path / "out.png")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2
    assert sentence in run.stderr.splitlines()[-1]
    assert "Traceback" not in run.stderr
