"""Laws of the token arithmetic: what a budget means, and that no count differs from what the models really make."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from vd_plugin.schedule import (
    FULL,
    MIN_BUDGET,
    PRESETS,
    RULE_VERSION,
    BudgetError,
    DecoderShape,
    Geometry,
    Schedule,
    TokenSplit,
    default_boundaries,
    parse_budget,
    prefill_flops,
    resolve,
    resolve_explicit,
)

LAWS = settings(deadline=None, max_examples=200)

VICUNA_7B = DecoderShape(
    num_layers=32, hidden_size=4096, intermediate_size=11008, num_heads=32, num_kv_heads=32, head_dim=128
)
MISTRAL_7B = DecoderShape(
    num_layers=32, hidden_size=4096, intermediate_size=14336, num_heads=32, num_kv_heads=8, head_dim=128
)
PUBLISHED = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
MANY = tuple((384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7))


def _make_geometry(
    pinpoints: tuple[tuple[int, int], ...] = PUBLISHED,
    tile_size: int = 336,
    patch_size: int = 14,
    boundaries: tuple[int, ...] = (8, 16, 24),
    decoder: DecoderShape = VICUNA_7B,
) -> Geometry:
    return Geometry(
        rule_version=RULE_VERSION,
        tile_size=tile_size,
        patch_size=patch_size,
        grid_pinpoints=pinpoints,
        boundaries=boundaries,
        decoder=decoder,
    )


def _make_decoder(num_layers: int) -> DecoderShape:
    return DecoderShape(
        num_layers=num_layers, hidden_size=6, intermediate_size=10, num_heads=4, num_kv_heads=2, head_dim=3
    )


NEXT = _make_geometry()
NEXT_WITHOUT_STAGES = _make_geometry(boundaries=())
LLAVA_15 = _make_geometry(pinpoints=())
GEOMETRIES = {
    "published pinpoints": NEXT,
    "no decoder stages": NEXT_WITHOUT_STAGES,
    "uneven boundaries": _make_geometry(boundaries=(1, 5, 30), decoder=MISTRAL_7B),
    "single view": LLAVA_15,
    "1x1 to 6x6 tiles, patches that do not divide the tile": _make_geometry(MANY, tile_size=384),
    "tiny tiles": _make_geometry(((28, 56), (56, 28), (56, 56), (84, 28), (28, 84)), tile_size=28, patch_size=7),
    "one pinpoint": _make_geometry(((672, 1008),)),
}
TILED = [geometry for geometry in GEOMETRIES.values() if geometry.grid_pinpoints]

geometries = st.sampled_from(list(GEOMETRIES.values()))
lengths = st.one_of(
    st.integers(1, 5000), st.sampled_from([1, 2, 13, 14, 24, 335, 336, 337, 671, 672, 673, 1008, 60_000])
)
sizes = st.tuples(lengths, lengths)
budgets = st.integers(MIN_BUDGET, 3500)


@st.composite
def any_geometry(draw: st.DrawFn) -> Geometry:
    """Tiles, pinpoints, depths and boundaries at random."""
    patch = draw(st.sampled_from([7, 14, 16]))
    tile = patch * draw(st.integers(2, 30)) + draw(st.integers(0, patch - 1))
    grids = draw(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), max_size=8, unique=True))
    depths = sorted(draw(st.sets(st.integers(1, 39), min_size=3, max_size=3)))
    decoder = _make_decoder(draw(st.integers(depths[-1] + 1, 40)))
    boundaries = draw(st.sampled_from([tuple(depths), ()]))
    return _make_geometry(tuple((tile * h, tile * w) for h, w in grids), tile, patch, boundaries, decoder)


def _resolve_or_skip(geometry: Geometry, size: tuple[int, int], budget: Any) -> Schedule:
    """Only an image with more tiles than its budget has rows may be refused; that is tested for itself."""
    try:
        return resolve(geometry, *size, budget)
    except BudgetError:
        assert geometry.num_tiles(*size) > budget
        assume(False)
        raise


# Budgets


@pytest.mark.parametrize(
    "value",
    [0, 31, -1, -640, 1.5, 640.0, float("nan"), True, False, "lots", "640", "FULL", " full", "", None, [], [640], {}],
)
def test_what_is_no_budget_is_refused_with_a_sentence_that_names_it(value: object) -> None:
    with pytest.raises(BudgetError) as error:
        parse_budget(value)
    assert repr(value) in str(error.value)
    assert "32" in str(error.value)
    assert isinstance(error.value, ValueError)


def test_presets_and_full_are_budgets() -> None:
    assert [parse_budget(name) for name in ("low", "medium", "high", "full")] == [160, 320, 640, FULL]
    assert set(PRESETS) == {"low", "medium", "high"}


@given(st.integers(32, 10**9))
def test_integers_from_32_up_are_budgets(value: int) -> None:
    assert parse_budget(value) == value


# The published tables


@pytest.mark.parametrize(
    ("budget", "rows"),
    [(640, (960, 700, 520, 380)), (320, (480, 350, 260, 190)), (160, (240, 175, 130, 95))],
)
def test_llava_next_gets_the_rows_of_the_methods_table(budget: int, rows: tuple[int, ...]) -> None:
    schedule = resolve(NEXT, 672, 672, budget)
    assert schedule.rows == rows
    assert (schedule.full, schedule.kept, schedule.saved) == (2928, budget, 2928 - budget)


def test_budget_32_is_the_authors_published_schedule() -> None:
    schedule = resolve(LLAVA_15, 336, 336, 32)
    assert schedule.encoder == (42, 6)
    assert schedule.decoder == ((30, 5), (22, 4), (16, 3))
    assert schedule.kept == 32


def test_without_decoder_stages_the_budget_is_the_encoders() -> None:
    schedule = resolve(NEXT_WITHOUT_STAGES, 672, 672, 640)
    assert schedule.encoder == (112, 16)
    assert schedule.rows == (640,)
    assert (schedule.kept, schedule.saved) == (640, 2288)


# The rule


@LAWS
@given(any_geometry(), sizes, budgets)
def test_rows_follow_the_rule_in_exact_arithmetic(geometry: Geometry, size: tuple[int, int], budget: int) -> None:
    schedule = _resolve_or_skip(geometry, size, budget)
    assume(budget < schedule.full)
    layers = geometry.decoder.num_layers
    depths = [0, *geometry.boundaries, layers]
    share = [Fraction(value, 32) for value in (48, 35, 26, 19)][: len(depths) - 1]
    weight = [Fraction(end - start, layers) for start, end in pairwise(depths)]
    average = sum(w * f for w, f in zip(weight, share, strict=True))
    wanted = [budget * f // average for f in share]

    tiles = schedule.num_tiles
    if wanted[0] >= schedule.full:
        assert schedule.encoder is None
        expected = [schedule.full]
    else:
        per_tile = min(wanted[0] // tiles, geometry.tile_tokens)
        assert schedule.encoder is not None
        assert schedule.encoder.rows == per_tile
        expected = [tiles * per_tile]
    for rows in wanted[1:]:
        expected.append(min(int(rows), expected[-1]))
    assert list(schedule.rows) == expected


@LAWS
@given(geometries, sizes, budgets)
@example(NEXT, (672, 672), 2927)
@example(LLAVA_15, (1, 1), 575)
def test_layer_average_never_exceeds_the_budget(geometry: Geometry, size: tuple[int, int], budget: int) -> None:
    schedule = _resolve_or_skip(geometry, size, budget)
    stage_of_layer = [sum(layer >= depth for depth in geometry.boundaries) for layer in range(32)]
    average = Fraction(sum(schedule.rows[stage] for stage in stage_of_layer), 32)
    assert average <= budget
    assert 0 <= schedule.kept - average < 1
    assert schedule.kept <= budget


@LAWS
@given(any_geometry(), sizes, st.one_of(budgets, st.just(FULL)))
def test_an_image_never_costs_more_than_in_the_stock_model(
    geometry: Geometry, size: tuple[int, int], budget: Any
) -> None:
    schedule = _resolve_or_skip(geometry, size, budget)
    assert schedule.kept <= schedule.full
    assert schedule.saved == schedule.full - schedule.kept >= 0
    assert schedule.num_placeholders == schedule.rows[0]
    for before, after in pairwise([schedule.full, *schedule.rows]):
        assert 1 <= after <= before


@LAWS
@given(any_geometry(), sizes, budgets)
def test_one_row_in_eight_is_contextual_and_a_stage_without_pruning_is_none(
    geometry: Geometry, size: tuple[int, int], budget: int
) -> None:
    schedule = _resolve_or_skip(geometry, size, budget)
    for split in (schedule.encoder, *schedule.decoder):
        if split is not None:
            assert split.dominant >= 1
            unpruned = split is schedule.encoder and split.rows == geometry.tile_tokens
            assert split.contextual in {0 if unpruned or split.rows == 1 else -(-split.rows // 8)}
    for split, (before, after) in zip(schedule.decoder, pairwise(schedule.rows), strict=True):
        assert (split is None) == (before == after)
        assert split is None or split.rows == after


@LAWS
@given(geometries, sizes, budgets, st.integers(1, 500))
def test_a_larger_budget_never_keeps_less(geometry: Geometry, size: tuple[int, int], budget: int, more: int) -> None:
    small = _resolve_or_skip(geometry, size, budget)
    large = resolve(geometry, *size, budget + more)
    assert all(a <= b for a, b in zip(small.rows, large.rows, strict=True))
    assert small.kept <= large.kept
    assert prefill_flops(geometry, 50, [small]) <= prefill_flops(geometry, 50, [large])


@LAWS
@given(any_geometry(), sizes, st.integers(0, 1000))
def test_a_budget_of_the_stock_count_or_more_is_full(geometry: Geometry, size: tuple[int, int], more: int) -> None:
    full = geometry.full_tokens(*size)
    for budget in (max(full, MIN_BUDGET) + more, FULL):
        schedule = resolve(geometry, *size, budget)
        assert schedule.is_full
        assert set(schedule.rows) == {full}
        assert (schedule.kept, schedule.saved) == (full, 0)
    if full > MIN_BUDGET:
        below = _resolve_or_skip(geometry, size, full - 1)
        assert not below.is_full
        assert below.saved > 0


def test_encoder_stays_stock_from_the_budget_whose_first_stage_reaches_the_stock_count() -> None:
    below, reached = resolve(LLAVA_15, 336, 336, 383), resolve(LLAVA_15, 336, 336, 384)
    assert below.encoder == (502, 72)
    assert reached.encoder is None
    assert reached.rows == (576, 420, 312, 228)
    assert not reached.is_full


@pytest.mark.parametrize(("budget", "encoder"), [(1920, (504, 72)), (1924, (577, 0)), (1951, (577, 0)), (1952, None)])
def test_a_tile_never_gets_more_rows_than_it_has_tokens(budget: int, encoder: tuple[int, int] | None) -> None:
    """Between 5 x 577 = 2885 and the stock 2928 rows every tile keeps all it has: CLS and 576 patches."""
    assert resolve(NEXT, 672, 672, budget).encoder == encoder


def test_a_budget_smaller_than_the_number_of_tiles_is_refused() -> None:
    """32 x 48 / 32 = 48 rows for 1 + 49 tiles."""
    geometry = _make_geometry(((7 * 336, 7 * 336),))
    with pytest.raises(BudgetError, match="50 tiles"):
        resolve(geometry, 2352, 2352, 32)
    assert resolve(geometry, 2352, 2352, 34).encoder == (1, 0)


def test_a_stage_that_the_rounding_to_tiles_has_already_reached_does_nothing() -> None:
    """37 tiles: 34 x 48 / 32 = 51 rows become 37, and 34 x 35 / 32 is 37, too."""
    schedule = resolve(GEOMETRIES["1x1 to 6x6 tiles, patches that do not divide the tile"], 2304, 2304, 34)
    assert schedule.rows == (37, 37, 27, 20)
    assert schedule.decoder[0] is None


# Explicit schedules


def test_an_explicit_schedule_gives_exactly_its_rows() -> None:
    schedule = resolve_explicit(NEXT, 672, 672, [[32, 4], (108, 18), [81, 15], [54, 12]])
    assert schedule.budget is None
    assert schedule.encoder == (32, 4)
    assert schedule.decoder == ((108, 18), (81, 15), (54, 12))
    assert schedule.rows == (180, 126, 96, 66)
    assert schedule.kept == 117
    assert not schedule.is_full


def test_an_explicit_stage_that_drops_nothing_is_none() -> None:
    schedule = resolve_explicit(LLAVA_15, 336, 336, [[42, 6], [40, 8], [22, 4], [26, 0]])
    assert schedule.decoder == (None, (22, 4), None)
    assert schedule.rows == (48, 48, 26, 26)


@LAWS
@given(st.data())
def test_every_budgets_own_splits_are_an_explicit_schedule(data: st.DataObject) -> None:
    geometry = data.draw(geometries)
    size = data.draw(sizes)
    schedule = _resolve_or_skip(geometry, size, data.draw(budgets))
    assume(schedule.encoder is not None)
    pairs = [schedule.encoder]
    for rows, split in zip(schedule.rows[1:], schedule.decoder, strict=True):
        pairs.append(split or TokenSplit(rows, 0))
    again = resolve_explicit(geometry, *size, [list(pair) for pair in pairs if pair])
    assert (again.encoder, again.decoder, again.rows) == (schedule.encoder, schedule.decoder, schedule.rows)


REST: list[Any] = [[30, 5], [22, 4], [16, 3]]


@pytest.mark.parametrize(
    "splits",
    [
        pytest.param([[42, 6]], id="too few stages"),
        pytest.param([[42, 6], *REST, [8, 1]], id="too many stages"),
        pytest.param([], id="none at all"),
        pytest.param([[0, 48], *REST], id="no CLS"),
        pytest.param([[570, 8], *REST], id="more than a tile has"),
        pytest.param([[577, 0], *REST], id="more than the stock model has"),
        pytest.param([[42, 6], [40, 9], [22, 4], [16, 3]], id="more rows than before"),
        pytest.param([[42, 6], [30, 5], [0, 0], [0, 0]], id="an empty stage"),
        pytest.param([[42, 6], [30, 5], [22, 4], [27, 0]], id="rows that grow again"),
        pytest.param([[42], *REST], id="half a pair"),
        pytest.param([[42, 6, 1], *REST], id="three of a pair"),
        pytest.param([[42, -6], *REST], id="negative"),
        pytest.param([[42.0, 6], *REST], id="float"),
        pytest.param([[True, 6], *REST], id="bool"),
        pytest.param([["42", 6], *REST], id="string"),
        pytest.param(["ab", *REST], id="string of two"),
        pytest.param([48, *REST], id="integer"),
        pytest.param([None, *REST], id="null"),
        pytest.param("abcd", id="a string"),
        pytest.param({0: 1, 1: 2, 2: 3, 3: 4}, id="an object"),
        pytest.param(48, id="an integer"),
        pytest.param(None, id="nothing"),
    ],
)
def test_an_explicit_schedule_that_cannot_be_served_is_refused(splits: Any) -> None:
    with pytest.raises(BudgetError):
        resolve_explicit(LLAVA_15, 336, 336, splits)


def test_an_explicit_tile_never_has_more_rows_than_tokens() -> None:
    """5 x 578 rows would be fewer than the stock model's 2928, with its newlines."""
    assert resolve_explicit(NEXT, 672, 672, [[577, 0], *REST]).rows[0] == 2885
    with pytest.raises(BudgetError, match="577"):
        resolve_explicit(NEXT, 672, 672, [[578, 0], *REST])


def test_an_explicit_schedule_without_decoder_stages_is_one_pair() -> None:
    assert resolve_explicit(NEXT_WITHOUT_STAGES, 672, 672, [[32, 4]]).rows == (180,)
    with pytest.raises(BudgetError, match=r"1 pair"):
        resolve_explicit(NEXT_WITHOUT_STAGES, 672, 672, [[42, 6], *REST])


# Geometry


@pytest.mark.parametrize(
    "boundaries",
    [(0, 1, 2), (8, 8, 16), (16, 8, 24), (8, 16, 32), (-8, 8, 16), (8,), (8, 16), (4, 8, 16, 24)],
)
def test_boundaries_must_be_three_ascending_depths_inside_the_decoder(boundaries: tuple[int, ...]) -> None:
    with pytest.raises(BudgetError, match="31"):
        _make_geometry(boundaries=boundaries)


@given(st.integers(4, 200))
def test_default_boundaries_are_quarters_and_valid_from_four_layers_up(num_layers: int) -> None:
    boundaries = default_boundaries(num_layers)
    assert boundaries == (num_layers // 4, num_layers * 2 // 4, num_layers * 3 // 4)
    geometry = _make_geometry(boundaries=boundaries, decoder=_make_decoder(num_layers))
    assert sum(geometry.layers_per_stage) == num_layers
    assert len(geometry.layers_per_stage) == 4


@LAWS
@given(any_geometry())
def test_a_geometry_survives_json(geometry: Geometry) -> None:
    again = Geometry.from_dict(json.loads(json.dumps(geometry.to_dict())))
    assert again == geometry
    assert hash(again) == hash(geometry)


def _drop(*path: str) -> Callable[[dict[str, Any]], object]:
    def change(data: dict[str, Any]) -> None:
        for key in path[:-1]:
            data = data[key]
        del data[path[-1]]

    return change


@pytest.mark.parametrize(
    "change",
    [
        _drop("boundaries"),
        _drop("rule_version"),
        _drop("decoder"),
        _drop("decoder", "head_dim"),
        lambda data: data.update(extra=1),
        lambda data: data["decoder"].update(extra=1),
    ],
)
def test_missing_and_unknown_keys_of_a_geometry_are_refused(change: Callable[[dict[str, Any]], object]) -> None:
    data = NEXT.to_dict()
    change(data)
    with pytest.raises(ValueError, match="needs exactly the keys"):
        Geometry.from_dict(data)


def test_a_tile_holds_cls_and_its_patches() -> None:
    assert (NEXT.tile_patches, NEXT.tile_tokens) == (576, 577)


# Against the models


def _stock_rows(geometry: Geometry, size: tuple[int, int]) -> int:
    """Cut, unpad and count a real tensor, as transformers' LLaVA-NeXT does with its features."""
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.llava_next.modeling_llava_next")
    side = geometry.tile_size // geometry.patch_size
    pinpoints = [list(pair) for pair in geometry.grid_pinpoints]
    rows, columns = modeling.get_anyres_image_grid_shape(size, pinpoints, geometry.tile_size)
    grid = modeling.unpad_image(torch.empty(1, rows * side, columns * side), size)
    with_newlines = torch.cat([grid, torch.empty(1, grid.shape[1], 1)], dim=-1)
    return side * side + int(with_newlines.numel())


@LAWS
@given(st.sampled_from(TILED), sizes)
@example(NEXT, (1, 60_000))
@example(NEXT, (60_000, 1))
@example(NEXT, (423, 752))  # 27 rows; 26 without transformers' rounding of 26.999999999999996
@example(NEXT, (752, 423))
def test_full_count_is_the_number_of_rows_that_transformers_makes(geometry: Geometry, size: tuple[int, int]) -> None:
    assert geometry.full_tokens(*size) == _stock_rows(geometry, size)


@LAWS
@given(any_geometry(), sizes)
def test_full_count_equals_transformers_for_random_pinpoints(geometry: Geometry, size: tuple[int, int]) -> None:
    assume(geometry.grid_pinpoints)
    assert geometry.full_tokens(*size) == _stock_rows(geometry, size)


@LAWS
@given(st.one_of(st.sampled_from(TILED), any_geometry()), sizes)
def test_tile_grid_equals_transformers(geometry: Geometry, size: tuple[int, int]) -> None:
    assume(geometry.grid_pinpoints)
    modeling = pytest.importorskip("transformers.models.llava_next.modeling_llava_next")
    pinpoints = [list(pair) for pair in geometry.grid_pinpoints]
    assert geometry.tile_grid(*size) == modeling.get_anyres_image_grid_shape(size, pinpoints, geometry.tile_size)
    tiles = modeling.image_size_to_num_patches(size, pinpoints, geometry.tile_size)
    assert geometry.num_tiles(*size) == tiles <= geometry.max_num_tiles()


@cache
def _vllm_count(geometry: Geometry) -> Callable[..., int]:
    """vLLM's own formula, without an engine."""
    llava_next = pytest.importorskip("vllm.model_executor.models.llava_next")
    side = geometry.tile_size // geometry.patch_size
    config = SimpleNamespace(
        vision_feature_select_strategy="default", image_grid_pinpoints=[list(pair) for pair in geometry.grid_pinpoints]
    )
    encoder = SimpleNamespace(
        get_num_image_tokens=lambda **_: side * side + 1,
        get_image_size=lambda: geometry.tile_size,
        get_patch_grid_length=lambda: side,
    )

    class Info(llava_next.LlavaNextProcessingInfo):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            pass

        def get_hf_config(self) -> Any:
            return config

        def get_vision_encoder_info(self) -> Any:
            return encoder

    count: Callable[..., int] = Info().get_num_image_tokens
    return count


@LAWS
@given(st.sampled_from(TILED), sizes)
def test_full_count_equals_vllms_number_of_placeholders(geometry: Geometry, size: tuple[int, int]) -> None:
    count = _vllm_count(geometry)
    assert geometry.full_tokens(*size) == count(image_height=size[0], image_width=size[1])


def test_every_published_pinpoint_has_its_known_count() -> None:
    """576 of the base view, the grid's patches and a newline for each of its rows."""
    assert [NEXT.full_tokens(*size) for size in PUBLISHED] == [1752, 1776, 2928, 2376, 2328]


def test_without_pinpoints_every_image_is_one_tile() -> None:
    assert (LLAVA_15.tile_grid(672, 672), LLAVA_15.num_tiles(672, 672)) == ((0, 0), 1)
    assert LLAVA_15.full_tokens(5, 5000) == LLAVA_15.max_full_tokens() == 576
    assert LLAVA_15.max_num_tiles() == 1


@LAWS
@given(any_geometry(), sizes)
def test_no_image_has_more_than_the_maximum(geometry: Geometry, size: tuple[int, int]) -> None:
    assert 1 <= geometry.full_tokens(*size) <= geometry.max_full_tokens()
    assert geometry.num_tiles(*size) <= geometry.max_num_tiles()


@LAWS
@given(any_geometry())
def test_some_image_reaches_the_maximum(geometry: Geometry) -> None:
    side = geometry.tile_size // geometry.patch_size
    areas = [(h // geometry.tile_size * side, w // geometry.tile_size * side) for h, w in geometry.grid_pinpoints]
    assert geometry.max_full_tokens() == side * side + max((h * (w + 1) for h, w in areas), default=0)


# FLOPs


def _count_flops(geometry: Geometry, tokens_per_layer: list[int]) -> int:
    """Every multiply-add of every layer, one matrix and one query at a time."""
    shape = geometry.decoder
    query_width, key_width = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    matrices = [
        (shape.hidden_size, query_width),
        (shape.hidden_size, key_width),
        (shape.hidden_size, key_width),
        (query_width, shape.hidden_size),
        (shape.hidden_size, shape.intermediate_size),
        (shape.hidden_size, shape.intermediate_size),
        (shape.intermediate_size, shape.hidden_size),
    ]
    operations = 0
    for tokens in tokens_per_layer:
        for rows, columns in matrices:
            operations += 2 * tokens * rows * columns
        for query in range(tokens):
            for _key in range(query + 1):
                operations += 2 * 2 * query_width
    return operations


@settings(LAWS, max_examples=60)
@given(any_geometry(), st.lists(st.tuples(sizes, st.integers(32, 80)), max_size=2), st.integers(1, 20))
def test_prefill_flops_equal_a_count_of_every_multiply_add(
    geometry: Geometry, pictures: list[tuple[tuple[int, int], int]], text: int
) -> None:
    images = [_resolve_or_skip(geometry, size, budget) for size, budget in pictures]
    per_layer = []
    for layer in range(geometry.decoder.num_layers):
        stage = sum(layer >= depth for depth in geometry.boundaries)
        per_layer.append(text + sum(image.rows[stage] for image in images))
    assume(sum(n * n for n in per_layer) < 2_000_000)
    assert prefill_flops(geometry, text, images) == _count_flops(geometry, per_layer)


def test_prefill_flops_of_the_7b_model_have_the_published_order() -> None:
    """The paper counts 46.25 TFLOPs at 2880 tokens and 7.70 at 320, tower and all; the decoder alone costs less."""
    full, small = (prefill_flops(NEXT, 60, [resolve(NEXT, 672, 672, budget)]) / 1e12 for budget in (FULL, 320))
    assert 38 < full < 46.25
    assert 4 < small < 7.70


# Imports


def test_schedule_imports_nothing_but_the_standard_library() -> None:
    """-I -S: none of the environment's site hooks, so whatever is loaded was asked for."""
    program = """
import sys
before = set(sys.modules)
sys.path.insert(0, sys.argv[1])
import vd_plugin.schedule
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program, str(root)], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == ["vd_plugin"]
