"""`visiondrop explain`: where kept tokens lie in the image, and that the figures are the engine's own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from engines import draw
from explanations import explanation
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from transformers.models.llava_next.modeling_llava_next import unpad_image

from vd_plugin.demo import MODEL_PATH
from vd_plugin.schedule import FULL, Budget, DecoderShape, Geometry, TokenSplit
from vd_plugin.selection import select
from vd_plugin.tools import explain
from vd_plugin.tools.explain import Explanation
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


@pytest.mark.parametrize(
    ("pinpoints", "size", "budget"),
    [(PINPOINTS, (672, 672), 320), (PINPOINTS, (200, 900), 96), ((), (50, 80), 40), (PINPOINTS, (500, 500), FULL)],
)
def test_drawing_has_a_legend_and_names_and_all_of_it_can_be_read(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    pinpoints: tuple[tuple[int, int], ...],
    size: tuple[int, int],
    budget: Budget,
) -> None:
    geometry = replace(GEOMETRY, grid_pinpoints=pinpoints)
    boxes: dict[str, list[tuple[int, ...]]] = {}
    write = ImageDraw.ImageDraw.text

    def record(pen: ImageDraw.ImageDraw, place: tuple[int, int], text: str, *others: Any) -> None:
        boxes.setdefault(text, []).append(tuple(map(int, pen.textbbox(place, text, others[1]))))
        write(pen, place, text, *others)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    source = draw(size[1], size[0])
    told = explanation(geometry, *size, budget)
    explain.draw(told, source).save(tmp_path / "kept.png")
    with Image.open(tmp_path / "kept.png") as sheet:
        width, height = sheet.size

    words = " ".join(boxes)
    assert all(word in words for word in ("dominant:", "contextual:", "dark:", f"{told.schedule.saved:,} saved"))
    for stage, rows in enumerate(told.stages):
        where = "from the encoder" if stage == 0 else f"after layer {geometry.boundaries[stage - 1]}"
        assert f"{where}: {len(rows):,} tokens" in words
    panels = {"the whole image": 4, **({"its tiles": 4} if pinpoints else {})}
    assert {name: sum(len(boxes[text]) for text in boxes if text.startswith(name)) for name in panels} == panels
    written = [box for all_boxes in boxes.values() for box in all_boxes]
    assert all(min(box) >= 0 and box[2] <= width and box[3] <= height for box in written)
    for one, other in combinations(written, 2):
        assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1], "one hides another"


def test_caption_counts_every_token() -> None:
    for budget in (320, FULL):
        told = explanation(GEOMETRY, 672, 672, budget)
        for stage, rows in enumerate(told.stages):
            total, *parts = map(int, re.findall(r"(\d+)(?= )", explain._caption(told, stage).replace(",", "")
                                                .partition(": ")[2]))  # fmt: skip
            assert total == sum(parts) == len(rows)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments of those that would have been started."""
    started: list[tuple[Any, ...]] = []

    def start(model: str, image: Image.Image, budget: Budget, options: Sequence[str]) -> Explanation:
        started.append((model, budget, *options))
        return explanation(GEOMETRY, image.height, image.width, budget)

    monkeypatch.setattr(explain, "explain", start)
    return started


@pytest.mark.parametrize(
    ("out", "sentence"),
    [
        (".", "ends in .png; got"),
        ("kept", "ends in .png; got"),
        ("kept.jpg", "ends in .png; got"),
        ("in.png/kept.png", "cannot be written"),
        ("folder.png", "cannot be written"),
        ("data.png", "cannot be written"),
        ("/proc/kept.png", "cannot be written"),
    ],
)
def test_results_that_cannot_be_written_are_refused_before_an_engine_starts(
    engines: list[tuple[Any, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str, sentence: str
) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "data.json").mkdir()
    draw(50, 50).save(tmp_path / "in.png")
    assert explain.main([str(tmp_path / "in.png"), "--model", "m", "--out", str(tmp_path / out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("visiondrop: error: --out ")
    assert sentence in error
    assert not engines


def test_folder_of_the_results_is_made_and_engine_options_go_to_the_engine(
    engines: list[tuple[Any, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(672, 672).save(tmp_path / "in.png")
    out = tmp_path / "a" / "b" / "kept.png"
    arguments = [str(tmp_path / "in.png"), "--model", "m", "--budget", "320", "--out", str(out)]
    options = ["--gpu-memory-utilization", "0.5", "--dtype=float32"]
    assert explain.main([*arguments, "--", *options]) == 0
    assert engines == [("m", 320, *options)]
    with Image.open(out) as sheet:
        assert sheet.width > 3 * 336
    assert json.loads(out.with_suffix(".json").read_text())["visual_tokens"]["stages"] == [480, 350, 260, 190]
    assert "480 > 350 > 260 > 190" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        explain.main([*arguments, "--", "--model=another"])
    assert "before the --" in capsys.readouterr().err


@pytest.mark.cpu
def test_engine_is_as_modest_as_the_server_and_obeys_engine_options(monkeypatch: pytest.MonkeyPatch) -> None:
    model = str(MODEL_PATH)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    given = explain._read_options(model, ["--gpu-memory-utilization", "0.3", "--max_model_len=2048"])
    assert "VLLM_CPU_KVCACHE_SPACE" not in os.environ, "the user has chosen"
    assert (given["gpu_memory_utilization"], given["max_model_len"], given["max_num_seqs"]) == (0.3, 2048, 1)
    assert given["hf_overrides"]["architectures"] == ["VisionDropLlavaNextForConditionalGeneration"]
    assert explain._read_options(model, [])["max_model_len"] == 4096
    assert 1 <= int(os.environ["VLLM_CPU_KVCACHE_SPACE"]) <= psutil.virtual_memory().total / 2**30 / 2
    with pytest.raises(ValueError, match=r"engine options: .*--no-such-option"):
        explain._read_options(model, ["--no-such-option"])


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
