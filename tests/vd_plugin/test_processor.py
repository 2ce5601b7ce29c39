"""From a request's keywords to placeholders, without an engine: vLLM's own processor of the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import draw
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.cache.base import MultiModalProcessorOnlyCache

import vd_plugin
from vd_plugin.options import read_geometry
from vd_plugin.request_checks import check_pixels
from vd_plugin.schedule import BudgetError, Geometry, Schedule, resolve, resolve_explicit
from vd_plugin.vision import TileFeatures, order_image, prune_tiles

PROMPT = "USER: <image>\nWhat is it? ASSISTANT:"
TWO = "<image> and <image>"
WIDE, TALL, SQUARE = draw(640, 320, seed=1), draw(320, 640, seed=2), draw(500, 480, seed=3)


class Processor:
    """vLLM's processor for a checkpoint, and the arithmetic that it must agree with."""

    def __init__(self, folder: Path, *, ours: bool = True, allowed: Sequence[str] = (), **arguments: Any) -> None:
        given = {"model": str(folder), "dtype": "float32", "max_model_len": 4096, **arguments}
        if ours:
            given = vd_plugin.engine_args(**given, visiondrop={"layers": [], "allow_processor_kwargs": list(allowed)})
        self.config = EngineArgs(**given).create_model_config()
        self.vllm = MULTIMODAL_REGISTRY.create_processor(self.config)
        self.image_token: int = self.config.hf_config.image_token_index

    @property
    def geometry(self) -> Geometry:
        return read_geometry(self.config.hf_config)

    def new_cache(self) -> MultiModalProcessorOnlyCache:
        return MultiModalProcessorOnlyCache(self.config)

    def __call__(
        self, prompt: str, images: list[Image.Image], asked: dict[str, Any] | None = None, cache: Any = None
    ) -> Any:
        items = self.vllm.info.parse_mm_data({"image": images} if images else {})
        return self.vllm(prompt, items, hf_processor_mm_kwargs=asked or {}, cache=cache)

    def counts(self, *arguments: Any, **keywords: Any) -> list[int]:
        """Placeholders of each image."""
        inputs = self(*arguments, **keywords)
        ranges = inputs["mm_placeholders"]["image"]
        for span in ranges:
            ids = inputs["prompt_token_ids"][span.offset : span.offset + span.length]
            assert ids == [self.image_token] * span.length
        assert inputs["prompt_token_ids"].count(self.image_token) == sum(span.length for span in ranges)
        return [span.length for span in ranges]

    def resolve(self, image: Image.Image, budget: Any) -> Schedule:
        return resolve(self.geometry, image.height, image.width, budget)


@cache
def _processor(folder: Path) -> Processor:
    return Processor(folder)


@pytest.fixture
def next_(random_model: Path) -> Processor:
    return _processor(random_model)


@pytest.fixture(params=["random_model", "llava15"])
def processor(request: pytest.FixtureRequest) -> Processor:
    return _processor(request.getfixturevalue(request.param))


# Placeholders are the encoder's rows


SIZES = st.tuples(st.integers(1, 1400), st.integers(1, 1400)).filter(lambda size: max(size) <= 60 * min(size))
BUDGETS = st.one_of(st.integers(32, 3200), st.sampled_from([32, 159, 160, 320, 640, 2927, 2928]))
PLENTY = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture], "derandomize": True}


@settings(max_examples=40, **PLENTY)
@given(size=SIZES, budget=BUDGETS)
def test_placeholders_are_the_rows_that_the_encoder_returns(
    processor: Processor, size: tuple[int, int], budget: int
) -> None:
    image = Image.new("RGB", size)
    schedule = processor.resolve(image, budget)
    inputs = processor(PROMPT, [image], {"visual_token_budget": budget})
    (span,) = inputs["mm_placeholders"]["image"]
    assert span.length == schedule.num_placeholders
    data = inputs["mm_kwargs"]["image"][0].get_data()
    assert data["visual_token_schedule"].tolist() == [list(schedule.encoder or (0, 0))]
    if schedule.encoder is not None:
        assert _count_rows(processor, data, schedule) == schedule.num_placeholders


@settings(max_examples=40, **PLENTY)
@given(size=SIZES, dominant=st.integers(1, 577), contextual=st.integers(0, 577))
def test_placeholders_of_explicit_rows_are_the_rows_that_the_encoder_returns(
    processor: Processor, size: tuple[int, int], dominant: int, contextual: int
) -> None:
    image = Image.new("RGB", size)
    splits = [[dominant, contextual]]
    try:
        schedule = resolve_explicit(processor.geometry, image.height, image.width, splits)
    except BudgetError:
        with pytest.raises(VLLMValidationError, match="does not prune"):
            processor(PROMPT, [image], {"visual_token_schedule": splits})
        return
    inputs = processor(PROMPT, [image], {"visual_token_schedule": splits})
    (span,) = inputs["mm_placeholders"]["image"]
    data = inputs["mm_kwargs"]["image"][0].get_data()
    assert span.length == schedule.num_placeholders == _count_rows(processor, data, schedule)


@settings(max_examples=40, **PLENTY)
@given(size=SIZES)
def test_in_full_the_placeholders_are_the_stock_count(processor: Processor, size: tuple[int, int]) -> None:
    image = Image.new("RGB", size)
    stock = processor.vllm.info.get_num_image_tokens(image_width=size[0], image_height=size[1])
    assert processor.resolve(image, "full").full == stock
    assert processor.counts(PROMPT, [image]) == [stock]


def test_every_image_has_its_own_budget(processor: Processor) -> None:
    images = [WIDE, SQUARE, TALL]
    budgets = [160, "full", "high"]
    expected = [
        processor.resolve(image, budget).num_placeholders
        for image, budget in zip(images, (160, "full", 640), strict=True)
    ]
    assert processor.counts("<image>" * 3, images, {"visual_token_budget": budgets}) == expected
    assert processor.counts("<image>" * 3, images, {"visual_token_budget": tuple(budgets)}) == expected


def test_every_image_has_its_own_rows(processor: Processor) -> None:
    tiles = [processor.resolve(image, 160).num_tiles for image in (WIDE, SQUARE)]
    asked = {"visual_token_schedule": [[[40, 6]], [[7, 0]]]}
    assert processor.counts(TWO, [WIDE, SQUARE], asked) == [46 * tiles[0], 7 * tiles[1]]
    asked = {"visual_token_schedule": [[40, 6]]}
    assert processor.counts(TWO, [WIDE, SQUARE], asked) == [46 * tiles[0], 46 * tiles[1]]


@pytest.mark.parametrize(("preset", "budget"), [("low", 160), ("medium", 320), ("high", 640)])
def test_presets(processor: Processor, preset: str, budget: int) -> None:
    assert processor.counts(PROMPT, [WIDE], {"visual_token_budget": preset}) == processor.counts(
        PROMPT, [WIDE], {"visual_token_budget": budget}
    )


def test_text_alone_is_left_alone(processor: Processor) -> None:
    plain = processor("Only text", [])["prompt_token_ids"]
    assert processor("Only text", [], {"visual_token_budget": 160})["prompt_token_ids"] == plain


# Bad values


BAD_BUDGETS = [0, 31, -1, 1.5, 320.0, True, False, "lots", "320", "", "FULL", {"image": 320}, [0], [True], [[320]]]
BAD_SCHEDULES: list[tuple[Any, str]] = [
    ("lots", "must be a list"),
    (46, "must be a list"),
    ({"a": 1}, "must be a list"),
    ([], "1 pair"),
    ([40, 6], "must be a list"),
    ([[40, 6], [30, 5]], "1 pair"),
    ([[40, 6], [30, 5], [22, 4], [16, 3]], "1 pair"),
    ([[40]], "pair"),
    ([[40, 6, 1]], "pair"),
    ([[]], "pair"),
    ([[0, 6]], "CLS"),
    ([[0, 0]], "CLS"),
    ([[-1, 6]], "pair"),
    ([[40, -6]], "pair"),
    ([[40.0, 6]], "pair"),
    ([[True, 6]], "pair"),
    ([["40", 6]], "pair"),
    ([[None, 6]], "pair"),
    ([[578, 0]], "does not prune"),
    ([[1, 577]], "does not prune"),
    ([[10**9, 0]], "does not prune"),
    ([[[40, 6]], [[40, 6]]], "2 entries for 1 image"),
    ([[[40, 6], [30, 5]]], "1 pair"),
    ([[40, 6], None], "must be a list"),
    ([[[40, 6]], None], "entries"),
    ([[[[40, 6]]]], "pair"),
]


@pytest.mark.parametrize("budget", BAD_BUDGETS, ids=repr)
def test_a_bad_budget_is_refused_with_a_sentence(processor: Processor, budget: object) -> None:
    error = _refuse(processor, [WIDE], {"visual_token_budget": budget})
    assert "a visual token budget must be an integer of at least 32, or one of 'low' (160)" in str(error)
    assert error.parameter == "visual_token_budget"


@pytest.mark.parametrize(("schedule", "says"), BAD_SCHEDULES, ids=repr)
def test_a_bad_schedule_is_refused_with_a_sentence(processor: Processor, schedule: object, says: str) -> None:
    error = _refuse(processor, [WIDE], {"visual_token_schedule": schedule})
    assert says in str(error)
    assert error.parameter == "visual_token_schedule"


@pytest.mark.parametrize("budgets", [[], [320], [320, 160, 640]], ids=str)
def test_a_list_of_another_length_is_refused(processor: Processor, budgets: list[int]) -> None:
    error = _refuse(processor, [WIDE, TALL], {"visual_token_budget": budgets})
    assert f"visual_token_budget has {len(budgets)} entries for 2 image(s)" in str(error)
    assert error.parameter == "visual_token_budget"


@pytest.mark.parametrize("number", [0, 1])
def test_one_bad_entry_of_a_list_is_refused(processor: Processor, number: int) -> None:
    budgets: list[Any] = [320, 320]
    budgets[number] = 31
    _refuse(processor, [WIDE, TALL], {"visual_token_budget": budgets})
    schedules: list[Any] = [[[40, 6]], [[40, 6]]]
    schedules[number] = [[0, 6]]
    _refuse(processor, [WIDE, TALL], {"visual_token_schedule": schedules})


def test_both_keys_are_refused(processor: Processor) -> None:
    asked = {"visual_token_budget": 320, "visual_token_schedule": [[40, 6]]}
    assert "not both" in str(_refuse(processor, [WIDE], asked))


def test_a_bad_value_is_refused_without_an_image_too(processor: Processor) -> None:
    with pytest.raises(VLLMValidationError, match="1 entries for 0 image"):
        processor("Only text", [], {"visual_token_budget": [320]})
    with pytest.raises(VLLMValidationError, match="a visual token budget must be"):
        processor("Only text", [], {"visual_token_budget": "much"})
    with pytest.raises(VLLMValidationError, match="must be a list of"):
        processor("Only text", [], {"visual_token_schedule": 7})


@pytest.mark.parametrize(
    "asked",
    [
        {"visual_token_schedule": [["x" * 300_000, 6]]},
        {"visual_token_schedule": [[7, 6]] * 100_000},
        {"visual_token_schedule": ["x" * 100] * 100_000},
        {"visual_token_budget": "x" * 800_000},
        {"visual_token_budget": ["x" * 800_000]},
        {"visual_token_budget": {"x" * 800_000: 1}},
        {"x" * 800_000: 1},
    ],
    ids=lambda asked: f"{asked!s:.40}",
)
def test_an_error_quotes_little(processor: Processor, asked: dict[str, Any]) -> None:
    assert len(str(_refuse(processor, [WIDE], asked))) < 1000


def test_images_without_a_place_are_refused(processor: Processor) -> None:
    with pytest.raises(VLLMValidationError, match=r"0 image token\(s\) for 1 image"):
        processor("Only text", [WIDE], {"visual_token_budget": 160})
    with pytest.raises(VLLMValidationError, match=r"1 image token\(s\) for 2 image"):
        processor(PROMPT, [WIDE, TALL])


@pytest.mark.parametrize("content", ["http://127.0.0.1:9/a.png", "/etc/hostname", 3, {}, b"bytes"], ids=repr)
@pytest.mark.parametrize("asked", [{}, {"visual_token_budget": 160}], ids=str)
def test_what_is_no_image_is_neither_fetched_nor_opened(
    processor: Processor, content: Any, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM passes on what a chat's `image_pil` part holds, and Hugging Face's processor would look for it."""
    monkeypatch.setattr(processor.vllm, "_apply_hf_processor_main", lambda *_, **__: pytest.fail("processed"))
    with pytest.raises((VLLMValidationError, TypeError)) as caught:
        processor(PROMPT, [content], asked)
    assert isinstance(caught.value, VLLMValidationError) or content == {}


# What comes out of the image processor


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"rescale_factor": 1e38}, "pixels between"),
        ({"rescale_factor": 1e30}, "pixels between"),
        ({"image_std": [1e-30, 1e-30, 1e-30]}, "pixels between"),
        ({"image_mean": [float("nan"), 0.5, 0.5]}, "pixels between nan"),
        ({"image_mean": [float("inf"), 0.5, 0.5]}, "pixels between"),
    ],
    ids=str,
)
@pytest.mark.parametrize("budget", ["full", 160])
def test_pixels_that_are_no_numbers_are_refused(
    request: pytest.FixtureRequest, random_model: Path, kwargs: dict[str, Any], says: str, budget: Any
) -> None:
    processor = Processor(random_model, allowed=list(kwargs))
    kept = processor.new_cache()
    for _ in range(2):
        with pytest.raises(VLLMValidationError, match=says):
            processor(PROMPT, [WIDE], {"visual_token_budget": budget, **kwargs}, cache=kept)


def test_pixels_that_nobody_has_rescaled_are_accepted(random_model: Path) -> None:
    processor = Processor(random_model, allowed=["do_rescale", "do_normalize"])
    processor(PROMPT, [WIDE], {"visual_token_budget": 160, "do_rescale": False})
    processor(PROMPT, [WIDE], {"visual_token_budget": 160, "do_normalize": False})


@pytest.mark.parametrize(
    ("pixels", "num_tiles", "says"),
    [
        (np.zeros((3, 336, 336), dtype=np.float32), None, "processed to ndarray"),
        ([[0.0]], None, "processed to list"),
        (torch.zeros(3, 336, 336, dtype=torch.uint8), None, "processed to torch.uint8"),
        (torch.zeros(3, 10, 10), None, r"shape \(3, 10, 10\); needed is \(3, 336, 336\)"),
        (torch.zeros(1, 336, 336), None, "shape"),
        (torch.zeros(2, 3, 336, 336), None, "shape"),
        (torch.zeros(3, 336, 336), 1, "shape"),
        (torch.zeros(2, 3, 336, 336), 3, r"needed is \(3, 3, 336, 336\)"),
        (torch.zeros(0, 3, 336, 336), 0, "shape"),
        (torch.full((3, 336, 336), torch.nan), None, "pixels"),
        (torch.full((3, 336, 336), -torch.inf), None, "pixels"),
        (torch.full((3, 336, 336), 1001.0), None, "pixels"),
    ],
)
def test_pixels_that_the_tower_cannot_take_are_refused(pixels: Any, num_tiles: int | None, says: str) -> None:
    with pytest.raises(VLLMValidationError, match=says):
        check_pixels(pixels, num_tiles, 336)


def test_pixels_that_the_tower_can_take_are_accepted() -> None:
    check_pixels(torch.full((3, 336, 336), -999.0), None, 336)
    check_pixels(torch.zeros(5, 3, 336, 336, dtype=torch.bfloat16), 3, 336)  # padded to the most tiles of a call


def test_a_refusal_leaves_nothing_in_the_cache(processor: Processor) -> None:
    kept = processor.new_cache()
    with pytest.raises(VLLMValidationError):
        processor(PROMPT, [WIDE], {"visual_token_schedule": [[578, 0]]}, cache=kept)
    right = processor.counts(PROMPT, [WIDE], {"visual_token_budget": 320})
    assert processor.counts(PROMPT, [WIDE], {"visual_token_budget": 320}, cache=kept) == right


def _refuse(processor: Processor, images: list[Image.Image], asked: dict[str, Any]) -> VLLMValidationError:
    """With and without a cache."""
    for kept in (None, processor.new_cache()):
        with pytest.raises(VLLMValidationError) as caught:
            processor("<image>" * len(images), images, asked, cache=kept)
    return caught.value


# The processor's cache


def test_padding_tiles_are_removed(next_: Processor) -> None:
    """Hugging Face pads the images of one call to the most tiles among them."""
    for asked in ({}, {"visual_token_budget": 160}):
        both = _items(next_(TWO, [WIDE, SQUARE], asked))
        assert [len(item["pixel_values"]) for item in both] == [3, 5]
        for item, image in zip(both, (WIDE, SQUARE), strict=True):
            (alone,) = _items(next_(PROMPT, [image], asked))
            _assert_same_item(item, alone)


@pytest.mark.parametrize("warm", [[0], [1], [0, 1]], ids=str)
def test_cached_entries_do_not_depend_on_neighbours(processor: Processor, warm: list[int]) -> None:
    images, budgets = [WIDE, SQUARE], [640, 320]
    kept = processor.new_cache()
    for number in warm:
        processor(PROMPT, [images[number]], {"visual_token_budget": [budgets[number]]}, cache=kept)
    asked = {"visual_token_budget": budgets}
    cached, plain = processor(TWO, images, asked, cache=kept), processor(TWO, images, asked)
    assert cached["mm_hashes"] == plain["mm_hashes"]
    assert cached["prompt_token_ids"] == plain["prompt_token_ids"]
    for item, same in zip(_items(cached), _items(plain), strict=True):
        _assert_same_item(item, same)


def test_hashes_differ_by_schedule_alone(processor: Processor) -> None:
    asked = [
        {},
        {"visual_token_budget": 160},
        {"visual_token_budget": 320},
        {"visual_token_schedule": [[40, 6]]},
        {"visual_token_schedule": [[6, 40]]},
        {"visual_token_schedule": [[46, 0]]},
    ]
    hashes = [_hashes(processor, [image], one)[0] for image in (WIDE, TALL) for one in asked]
    assert len(set(hashes)) == len(hashes)
    assert _hashes(processor, [WIDE], {"visual_token_budget": "low"}) == hashes[1:2]
    assert _hashes(processor, [WIDE], {"visual_token_budget": "full"}) == hashes[:1]
    assert _hashes(processor, [TALL, WIDE], {"visual_token_budget": [320, 160]}) == [hashes[8], hashes[1]]
    one_image = _hashes(processor, [WIDE, WIDE], {"visual_token_budget": [160, 320]})
    assert one_image == hashes[1:3]


@pytest.mark.parametrize("name", ["random_model", "llava15"])
def test_without_our_key_a_image_has_the_stock_hash(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    stock = Processor(folder, ours=False)
    ours = _processor(folder)
    assert type(stock.vllm) is not type(ours.vllm)
    for images in ([WIDE], [WIDE, SQUARE]):
        assert _hashes(stock, images) == _hashes(ours, images)
        assert _hashes(stock, images) == _hashes(ours, images, {"visual_token_budget": "full"})
    kept = {"do_convert_rgb": True}
    ours = Processor(folder, allowed=["do_convert_rgb"])
    assert _hashes(stock, [WIDE], kept) == _hashes(ours, [WIDE], kept)
    assert _hashes(ours, [WIDE], kept) != _hashes(ours, [WIDE])
    assert _hashes(ours, [WIDE], {**kept, "visual_token_budget": 160}) != _hashes(
        ours, [WIDE], {"visual_token_budget": 160}
    )


# The engine's default


def test_the_engines_default_budget_and_a_requests_own(random_model: Path, next_: Processor) -> None:
    default = Processor(random_model, mm_processor_kwargs={"visual_token_budget": 320})
    expected = {budget: next_.resolve(WIDE, budget).num_placeholders for budget in (320, 640, "full")}
    assert len(set(expected.values())) == 3
    kept = default.new_cache()
    for _ in range(2):
        assert default.counts(PROMPT, [WIDE], cache=kept) == [expected[320]]
        for budget in (640, "full", 320):
            assert default.counts(PROMPT, [WIDE], {"visual_token_budget": budget}, cache=kept) == [expected[budget]]
        assert default.counts(TWO, [WIDE, TALL], cache=kept) == [expected[320]] * 2
        mixed = {"visual_token_budget": ["full", 640]}
        assert default.counts(TWO, [WIDE, TALL], mixed, cache=kept) == [expected["full"], expected[640]]
    assert default("Only text", [])["prompt_token_ids"] == next_("Only text", [])["prompt_token_ids"]


def test_a_requests_schedule_overrides_the_engines_default_budget(random_model: Path) -> None:
    default = Processor(random_model, mm_processor_kwargs={"visual_token_budget": 320})
    assert default.counts(PROMPT, [WIDE], {"visual_token_schedule": [[40, 6]]}) == [46 * 3]


def test_the_ceiling_for_one_image_is_the_stock_one(processor: Processor) -> None:
    info = processor.vllm.info
    largest = info.get_image_size_with_most_features()
    most = info.get_num_image_tokens(image_width=largest.width, image_height=largest.height)
    assert info.get_mm_max_tokens_per_item(4096, {"image": 1}) == {"image": most}


def _count_rows(processor: Processor, data: dict[str, Any], schedule: Schedule) -> int:
    """Rows of random features of this image, pruned and ordered."""
    geometry = processor.geometry
    pixels = data["pixel_values"]
    num_tiles = len(pixels) if pixels.ndim == 4 else 1
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(num_tiles, *shape, generator=generator)

    assert schedule.encoder is not None
    patches = geometry.tile_patches
    tiles = prune_tiles(TileFeatures(random(1 + patches, 2), random(patches), random(patches, 2)), schedule.encoder)
    height, width = data["image_sizes"].tolist() if "image_sizes" in data else (1, 1)
    side = geometry.tile_size // geometry.patch_size
    return len(order_image(tiles.tokens, tiles.kept, geometry.tile_grid(height, width), side))


def _items(inputs: Any) -> list[dict[str, Any]]:
    return [item.get_data() for item in inputs["mm_kwargs"]["image"]]


def _hashes(processor: Processor, images: list[Image.Image], asked: dict[str, Any] | None = None) -> list[str]:
    hashes: list[str] = processor("<image>" * len(images), images, asked)["mm_hashes"]["image"]
    return hashes


def _assert_same_item(item: dict[str, Any], same: dict[str, Any]) -> None:
    assert item.keys() == same.keys()
    for key, value in item.items():
        assert torch.equal(value, same[key]), key
