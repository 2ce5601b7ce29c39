"""The engine's encoder stage against the authors' recorded run and against the plain reference.

Everything here runs on the model object of a started engine. Where the golden vectors are absent, the reference alone
judges, on the random checkpoint and on a LLaVA-1.5 made from it.

On log-probabilities: on equal pixels engine and reference differ by float32 rounding alone (measured: at most 4e-5).
So the whole run, image included, is compared on the pixels of the image processor that the engine uses (torchvision's
resizing). On the authors' pixels, which PIL resized, it is the same for LLaVA-1.5, whose recorded images need no
resizing, and up to 3e-4 for LLaVA-NeXT, whose base view does: there the pixels themselves differ by 1.5e-2, one step of
8 bits.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import engines
import golden
import pytest
import torch
from engines import Engine, draw
from golden import Case
from PIL import Image as Pillow
from reference import Image, Reference, encoder_stage
from torch import Tensor
from torch.testing import assert_close

from vd_plugin.schedule import TokenSplit
from vd_plugin.vision import TileFeatures, order_image, prune_tiles, run_tower

pytestmark = [pytest.mark.engine, pytest.mark.slow, engines.float32_only]

CASES = golden.image_cases()
RECORDED = sorted({case.model_dir for case in CASES})
SPLITS = [(40, 6), (1, 5), (100, 0), (500, 76)]
"""(dominant, contextual): usual ones, no patch kept, nothing merged, nearly everything kept."""


@pytest.fixture(
    scope="module",
    params=RECORDED or [pytest.param(None, marks=pytest.mark.skip(f"golden vectors are not at {golden.ROOT}"))],
    ids=lambda folder: folder.parent.name if folder else "absent",
)
def recorded(request: pytest.FixtureRequest) -> tuple[Path, Engine]:
    return request.param, engines.start(request.param)


@pytest.fixture(scope="module", params=["random_model", "llava15"])
def built(request: pytest.FixtureRequest) -> tuple[Path, Engine]:
    folder = request.getfixturevalue(request.param)
    return folder, engines.start(folder)


def test_tower_and_selection_equal_the_release(recorded: tuple[Path, Engine], subtests: pytest.Subtests) -> None:
    folder, engine = recorded
    for case in _cases_of(folder):
        with subtests.test(case.name):
            features = engine.on_model(
                lambda model, case=case: run_tower(model.vision_tower, case["pixel_values"].to(_device(model)))
            )
            assert_close(features.tokens, case["v_hidden"], atol=1e-4, rtol=0)
            assert_close(features.scores, case["v_cls_attn_sum"], atol=1e-4, rtol=0)
            assert_close(features.keys, case["v_metric"][:, 1:], atol=1e-4, rtol=0)
            pruned = prune_tiles(features, TokenSplit(*case.encoder))
            assert torch.equal(1 + pruned.kept, case["v_keep_sorted"][:, 1:])
            assert (case["v_keep_sorted"][:, 0] == 0).all()
            assert_close(pruned.tokens, case["v_tokens"], atol=1e-4, rtol=0)


def test_image_rows_equal_the_release(recorded: tuple[Path, Engine], subtests: pytest.Subtests) -> None:
    folder, engine = recorded
    for case in _cases_of(folder):
        with subtests.test(case.name):
            if case.is_named(golden.BASE_VIEW):
                rows = engine.on_model(lambda model, case=case: _single_view(model, case))
            else:
                images = [
                    Image(pixels, (height, width), case.encoder)
                    for pixels, (width, height) in zip(
                        case["pixel_values"].chunk(len(case["image_size_wh"])),
                        case["image_size_wh"].tolist(),
                        strict=True,
                    )
                ]
                rows = torch.cat(_embed(engine, images))
            assert_close(rows, case["image_seq"], atol=1e-4, rtol=0)


def test_answers_to_recorded_images_equal_the_reference(
    recorded: tuple[Path, Engine], subtests: pytest.Subtests
) -> None:
    """Encoder stage alone, from prompt text and image on; the release has recorded no such run."""
    folder, engine = recorded
    for case in _cases_of(folder):
        if case.is_named(golden.BASE_VIEW):
            continue
        with subtests.test(case.name):
            arrays = [case.arrays[key] for key in sorted(case.arrays) if key.startswith("image_u8")]
            _assert_answer_equals_the_reference(
                folder, engine, case.prompt, [Pillow.fromarray(array) for array in arrays], case.encoder
            )


def test_tower_equals_the_stock_tower_to_the_bit(built: tuple[Path, Engine]) -> None:
    folder, engine = built
    pixels = _pixels(folder, draw(500, 480))

    def run(model: Any) -> tuple[Tensor, Tensor]:
        placed = pixels.to(_device(model))
        return run_tower(model.vision_tower, placed).tokens, model.vision_tower(placed)

    ours, stock = engine.on_model(run)
    assert torch.equal(ours, stock)


def test_recorded_tower_equals_the_stock_tower_to_the_bit(recorded: tuple[Path, Engine]) -> None:
    folder, engine = recorded
    pixels = _cases_of(folder)[0]["pixel_values"]

    def run(model: Any) -> tuple[Tensor, Tensor]:
        placed = pixels.to(_device(model))
        return run_tower(model.vision_tower, placed).tokens, model.vision_tower(placed)

    ours, stock = engine.on_model(run)
    assert torch.equal(ours, stock)


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_every_stage_equals_the_reference(built: tuple[Path, Engine], split: tuple[int, int]) -> None:
    folder, engine = built
    reference = _reference(folder)
    pixels = _pixels(folder, draw(640, 320, seed=1))
    features: TileFeatures = engine.on_model(lambda model: run_tower(model.vision_tower, pixels.to(_device(model))))
    hidden, attention, keys = reference.tower_layer(pixels)
    assert_close(features.tokens, hidden, atol=1e-4, rtol=0)
    assert_close(features.scores, attention.sum(1)[:, 1:], atol=1e-4, rtol=0)
    assert_close(features.keys, keys.mean(1)[:, 1:], atol=1e-4, rtol=0)

    tiles = [encoder_stage(*tile, *split) for tile in zip(hidden, attention, keys, strict=True)]
    pruned = prune_tiles(features, TokenSplit(*split))
    assert pruned.kept.tolist() == [tile.patches for tile in tiles]
    assert_close(pruned.tokens, torch.stack([tile.tokens for tile in tiles]), atol=1e-4, rtol=0)

    image = Image(pixels, (320, 640), split)
    (rows,) = _embed(engine, [image])
    assert_close(rows, reference.image_rows(image), atol=1e-4, rtol=1e-4)


def test_cls_alone_can_be_kept(built: tuple[Path, Engine]) -> None:
    """Each tile's first row, projected; the reference knows no stage without patches."""
    folder, engine = built
    reference = _reference(folder)
    pixels = _pixels(folder, draw(500, 480, seed=1))
    (rows,) = _embed(engine, [Image(pixels, (480, 500), (1, 0))])
    hidden, _, _ = reference.tower_layer(pixels)
    with torch.inference_mode():
        expected = reference.projector(hidden[:, 0])
    assert_close(rows, expected, atol=1e-4, rtol=1e-4)


def test_attention_of_the_random_tower_is_not_flat(built: tuple[Path, Engine]) -> None:
    """Else a selection by anything would pass."""
    folder, engine = built
    pixels = _pixels(folder, draw(640, 320))
    scores = engine.on_model(lambda model: run_tower(model.vision_tower, pixels.to(_device(model)))).scores
    assert (scores.amax(-1) > 3 * scores.mean(-1)).all()


def test_a_mixed_batch_of_images_equals_each_alone(built: tuple[Path, Engine]) -> None:
    """Full and pruned, in one call of the encoder."""
    folder, engine = built
    wanted = [(40, 6), None, (1, 5), None, (100, 0)]
    sizes = [(640, 320), (320, 640), (500, 480), (640, 320), (100, 300)]
    images = [
        Image(_pixels(folder, draw(*size, seed=seed)), size[::-1], split)
        for seed, (size, split) in enumerate(zip(sizes, wanted, strict=True))
    ]
    for rows, image in zip(_embed(engine, images), images, strict=True):
        assert_close(rows, _reference(folder).image_rows(image), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("split", [(40, 6), (1, 5), None], ids=str)
def test_answers_equal_the_reference(built: tuple[Path, Engine], split: tuple[int, int] | None) -> None:
    folder, engine = built
    pictures = [draw(640, 320, seed=2), draw(300, 400, seed=3)] if split else [draw(640, 320, seed=2)]
    prompt = "USER: <image>\nWhat is this, " + "<image>\nand this? ASSISTANT:" * (len(pictures) - 1)
    _assert_answer_equals_the_reference(folder, engine, prompt, pictures, split)


def _assert_answer_equals_the_reference(
    folder: Path, engine: Engine, prompt: str, pictures: list[Pillow.Image], split: tuple[int, int] | None
) -> None:
    reference = _reference(folder)
    asked = {"visual_token_schedule": [list(split)]} if split else {}
    answer = engine.ask(prompt, pictures, **asked)
    images = [Image(_pixels(folder, picture), (picture.height, picture.width), split) for picture in pictures]
    expected = reference.generate(reference.tokenize(prompt), images, num_tokens=engines.NUM_TOKENS)
    assert answer.count(reference.config.image_token_id) == sum(expected.image_rows)
    assert answer.token_ids == expected.token_ids
    assert_close(answer.logprobs, expected.logprobs, atol=1e-4, rtol=0)


def _single_view(model: Any, case: Case) -> Tensor:
    """What the release does with one view of a LLaVA-NeXT; Hugging Face's processor never makes such an image."""
    features = run_tower(model.vision_tower, case["pixel_values"].to(_device(model)))
    tiles = prune_tiles(features, TokenSplit(*case.encoder))
    rows = model.multi_modal_projector(order_image(tiles.tokens, tiles.kept, (0, 0), 24))
    return torch.cat([rows, model.image_newline[None]])


def _embed(engine: Engine, images: list[Image]) -> list[Tensor]:
    """The images through the model's own method, with arguments as the engine makes them."""
    schedules = torch.tensor([[image.encoder or (0, 0)] for image in images], dtype=torch.int32)

    def run(model: Any) -> list[Tensor]:
        arguments: dict[str, Any] = {"visual_token_schedule": schedules}
        if model.geometry.grid_pinpoints:
            arguments["pixel_values"] = [image.pixel_values.to(_device(model)) for image in images]
            arguments["image_sizes"] = torch.tensor([image.size for image in images])
        else:
            arguments["pixel_values"] = torch.cat([image.pixel_values for image in images]).to(_device(model))
        rows: list[Tensor] = model.embed_multimodal(**arguments)
        return rows

    embedded: list[Tensor] = engine.on_model(run)
    return embedded


def _device(model: Any) -> torch.device:
    device: torch.device = next(model.parameters()).device
    return device


def _cases_of(folder: Path) -> list[Case]:
    return [case for case in CASES if case.model_dir == folder]


@cache
def _reference(folder: Path) -> Reference:
    return Reference(folder)


def _pixels(folder: Path, picture: Pillow.Image) -> Tensor:
    """(T, 3, 336, 336), by the image processor that the engine uses."""
    pixels = _image_processor(folder)(picture, return_tensors="pt")["pixel_values"]
    return pixels.reshape(-1, *pixels.shape[-3:])


@cache
def _image_processor(folder: Path) -> Any:
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(folder)
