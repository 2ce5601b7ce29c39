"""The reference against the authors' recorded run, against transformers' own models, and against itself.

Without this file the other tests would compare the product with an oracle that nobody has checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import golden
import pytest
import torch
from golden import Case, requires_golden
from reference import (
    Image,
    Reference,
    Result,
    TileRows,
    decoder_scores,
    encoder_stage,
    image_sequence,
    merge_plan,
    merge_tokens,
)
from torch import Tensor
from torch.testing import assert_close

CASES = golden.cases()
IMAGE_CASES = golden.image_cases()


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny matrices: a second thread costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# One stage, on paper


def test_a_stage_worked_out_by_hand() -> None:
    """7 tokens, 2 dominant, 2 contextual: of the rest 0, 2, 3, 5, 6 the anchors are the first and the third."""
    scores = torch.tensor([0.1, 0.9, 0.2, 0.3, 0.8, 0.4, 0.5])
    east, north = [1.0, 0.0], [0.0, 1.0]
    keys = torch.tensor([east, east, [0.9, 0.1], north, north, [0.1, 5.0], [3.0, 1.0]])
    plan = merge_plan(scores, keys, 2, 2)
    assert plan == ([1, 4], [0, 3], [2, 5, 6], [0, 1, 0])
    tokens = torch.tensor([[1.0], [2.0], [4.0], [8.0], [16.0], [32.0], [64.0]])
    assert merge_tokens(plan, tokens).flatten().tolist() == [2, 16, 1 + (4 + 64) / 2, 8 + 32]


def test_an_anchor_that_nobody_joins_stays_as_it_is() -> None:
    plan = merge_plan(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1]]), 0, 2)
    assert plan == ([], [0, 1], [2], [0])
    assert merge_tokens(plan, torch.tensor([[1.0], [2.0], [4.0]])).flatten().tolist() == [5, 2]


def test_equal_scores_keep_the_lowest_index() -> None:
    assert merge_plan(torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0]), torch.ones(5, 1), 3, 0).kept == [0, 1, 3]


def test_sequence_of_tiles_reads_the_grid_row_by_row() -> None:
    """A 1 x 2 grid of 2 x 2 patches. A row is called tile.patch, CLS is .9 and the contextual row .8."""
    kept = [[0, 3], [1, 2], [0, 2]]
    tiles = [TileRows(torch.empty(0), patches, merge_plan(torch.ones(4), torch.ones(4, 1), 1, 0)) for patches in kept]
    rows = [
        torch.tensor([[tile + 0.9], *([tile + patch / 10] for patch in patches), [tile + 0.8]])
        for tile, patches in enumerate(kept)
    ]
    expected = [0.9, 0.0, 0.3, 0.8, 1.1, 2.0, 1.2, 2.2, 1.9, 2.9, 1.8, 2.8]
    assert_close(image_sequence(tiles, rows, (1, 2), 2).flatten(), torch.tensor(expected))


def test_decoder_scores_are_columns_of_the_whole_causal_softmax() -> None:
    torch.manual_seed(0)
    queries, keys = torch.randn(4, 11, 8), torch.randn(2, 11, 8)
    logits = torch.einsum("hid,hjd->hij", queries, keys.repeat_interleave(2, dim=0)) / 8**0.5
    weights = logits.masked_fill(torch.ones(11, 11).triu(1).bool(), -torch.inf).softmax(-1)
    assert_close(decoder_scores(queries, keys, 3, 6), weights[:, 3:9, 3:9].mean((0, 1)))


# A tiny random model, against transformers and against itself

PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
IMAGE_TOKEN = 63


def _make_checkpoint(folder: Path, kind: str) -> Path:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
    )

    torch.manual_seed(1)
    parts: dict[str, Any] = {
        "vision_config": CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=28,
            patch_size=7,
            initializer_factor=5.0,
        ),
        "text_config": LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
            initializer_range=0.3,
        ),
        "image_token_id": IMAGE_TOKEN,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    if kind == "llava_next":
        model: Any = LlavaNextForConditionalGeneration(LlavaNextConfig(image_grid_pinpoints=PINPOINTS, **parts))
        torch.nn.init.normal_(model.model.image_newline)
    else:
        model = LlavaForConditionalGeneration(LlavaConfig(**parts))
    for parameter in model.model.multi_modal_projector.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["llava", "llava_next"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(_make_checkpoint(tmp_path_factory.mktemp("tiny") / request.param, request.param))


def _make_image(model: Reference, seed: int = 0, size: tuple[int, int] = (40, 90), **what: Any) -> Image:
    """An image of noise, with as many tiles as transformers cuts from one of that size (height, width)."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    tiles = image_size_to_num_patches(size, PINPOINTS, 28) if model.is_next else 1
    pixels = torch.randn(tiles, 3, 28, 28, generator=torch.Generator().manual_seed(seed))
    return Image(pixels, size, **what)


PROMPT = [1, 5, 6, IMAGE_TOKEN, 7, 8, 9]
STAGES: dict[str, Any] = {"encoder": (5, 2), "decoder": [(4, 1), (2, 1), (1, 1)]}


@pytest.mark.parametrize("size", [(40, 90), (90, 40), (56, 56), (28, 28), (31, 100), (7, 300)])
@torch.inference_mode()
def test_unpruned_model_equals_transformers(tiny: Reference, size: tuple[int, int]) -> None:
    image = _make_image(tiny, size=size)
    ours = tiny.generate(PROMPT, [image], num_tokens=1)
    expanded = [1, 5, 6, *[IMAGE_TOKEN] * ours.image_rows[0], 7, 8, 9]
    pixels: dict[str, Any] = {"pixel_values": image.pixel_values}
    if tiny.is_next:
        pixels = {"pixel_values": image.pixel_values[None], "image_sizes": torch.tensor([size])}
    theirs = tiny.hf_model(input_ids=torch.tensor([expanded]), **pixels).logits[0, -1]
    assert_close(ours.logits[0], theirs, atol=1e-4, rtol=1e-4)


def test_encoder_pruning_keeps_the_same_rows_of_every_tile(tiny: Reference) -> None:
    image = _make_image(tiny, encoder=(5, 2))
    result = tiny.generate(PROMPT, [image])
    assert result.image_rows == [7 * len(image.pixel_values)]
    assert set(result.prefill_lengths) == {6 + result.image_rows[0]}


@torch.inference_mode()
def test_encoder_pruning_that_drops_nothing_only_reorders(tiny: Reference) -> None:
    """All 16 patches and CLS, no newline and no unpadding: the same rows whatever the grid."""
    image = _make_image(tiny, encoder=(17, 0))
    hidden, _, _ = tiny.tower_layer(image.pixel_values)
    every = tiny.projector(hidden.flatten(0, 1))
    rows = tiny.image_rows(image)
    assert len(rows) == len(every)
    assert_close(rows.sort(0).values, every.sort(0).values)
    assert_close(rows[:17], every[:17])


def test_stages_that_drop_nothing_change_nothing(tiny: Reference) -> None:
    rows = 7 * len(_make_image(tiny).pixel_values)
    plain = tiny.generate(PROMPT, [_make_image(tiny, encoder=(5, 2))])
    image = _make_image(tiny, encoder=(5, 2), decoder=[(rows, 0), None, (rows - 1, 1)])
    staged = tiny.generate(PROMPT, [image], boundaries=(1, 2, 3))
    assert not staged.stages
    assert torch.equal(staged.logits, plain.logits)


def test_each_layer_keeps_its_own_length_and_positions(tiny: Reference) -> None:
    image = _make_image(tiny, **STAGES)
    result = tiny.generate(PROMPT, [image], boundaries=(1, 2, 3), num_tokens=4)
    rows = [7 * len(image.pixel_values), 5, 3, 2]
    assert result.prefill_lengths == [6 + count for count in rows]
    assert result.decode_positions == [[6 + step + count for count in rows] for step in range(3)]


def test_decoding_equals_a_prefill_of_prompt_and_answer(tiny: Reference) -> None:
    """And so nothing that follows an image influences what is kept of it."""
    image = _make_image(tiny, **STAGES)
    decoded = tiny.generate(PROMPT, [image], boundaries=(1, 2, 3), num_tokens=5)
    again = tiny.generate([*PROMPT, *decoded.token_ids[:4]], [image], boundaries=(1, 2, 3), num_tokens=1)
    assert {key: stage.plan for key, stage in again.stages.items()} == {
        key: stage.plan for key, stage in decoded.stages.items()
    }
    assert_close(again.logprobs[0], decoded.logprobs[4], atol=1e-4, rtol=1e-4)


def test_pruning_changes_the_answer(tiny: Reference) -> None:
    """Else every comparison of log-probabilities would be blind."""
    runs = [
        tiny.generate(PROMPT, [_make_image(tiny)], num_tokens=1),
        tiny.generate(PROMPT, [_make_image(tiny, encoder=(5, 2))], num_tokens=1),
        tiny.generate(PROMPT, [_make_image(tiny, encoder=(6, 1))], num_tokens=1),
        tiny.generate(PROMPT, [_make_image(tiny, **STAGES)], boundaries=(1, 2, 3), num_tokens=1),
    ]
    for number, run in enumerate(runs):
        for other in runs[:number]:
            assert (run.logprobs - other.logprobs).abs().max() > 1e-2


def test_an_image_is_pruned_as_in_a_prompt_that_ends_with_it(tiny: Reference) -> None:
    first = _make_image(tiny, 0, **STAGES)
    second = _make_image(tiny, 1, (90, 40), encoder=(6, 1), decoder=[(5, 1), None, (3, 0)])
    prompt = [1, IMAGE_TOKEN, 5, IMAGE_TOKEN, 7, 8]
    whole = tiny.generate(prompt, [first, second], boundaries=(1, 2, 3))
    for end, images in ((2, [first]), (4, [first, second])):
        part = tiny.generate(prompt[:end], images, boundaries=(1, 2, 3), num_tokens=1)
        for key, stage in part.stages.items():
            assert stage.plan == whole.stages[key].plan
            assert_close(stage.scores, whole.stages[key].scores)
    assert set(whole.stages) == {(1, 0), (2, 0), (3, 0), (1, 1), (3, 1)}
    rows = [7 * len(first.pixel_values) + 7 * len(second.pixel_values), 5 + 6, 3 + 6, 2 + 3]
    assert whole.prefill_lengths == [4 + count for count in rows]


# The authors' recorded run


@cache
def _model(folder: Path) -> Reference:
    return Reference(folder)


def _images(case: Case, *, pruned: bool = True) -> list[Image]:
    """The recorded pixels. The release prunes only the first of two images inside the LLM: so do we here."""
    if not case.has_image:
        return []
    sizes = case["image_size_wh"].tolist()
    views = case["pixel_values"].chunk(len(sizes))
    return [
        Image(
            pixels,
            (height, width),
            case.encoder if pruned else None,
            case.decoder if pruned and number == 0 else (),
        )
        for number, (pixels, (width, height)) in enumerate(zip(views, sizes, strict=True))
    ]


@cache
def _pruned_run(case_name: str) -> Result:
    case = next(case for case in CASES if case.name == case_name)
    return _model(case.model_dir).generate(case["input_ids"].tolist(), _images(case), case.boundaries)


def _tiles(case: Case) -> list[TileRows]:
    arrays = zip(case["v_hidden"], case["v_cls_attn"], case["v_metric"], strict=True)
    return [encoder_stage(*tile, *case.encoder) for tile in arrays]


@requires_golden
@pytest.mark.parametrize("case", CASES, ids=str)
def test_pruned_logits_equal_the_release(case: Case) -> None:
    result = _pruned_run(case.name)
    assert result.token_ids == case["gen_ids"].tolist()
    assert_close(result.logits, case["step_logits"], atol=1e-4, rtol=0)
    assert result.prefill_lengths == case["prefill_len_per_layer"].tolist()
    assert result.decode_positions == case["decode_position_per_layer"].tolist()


@requires_golden
@pytest.mark.parametrize("case", CASES, ids=str)
def test_unpruned_logits_equal_the_release(case: Case) -> None:
    model = _model(case.model_dir)
    result = model.generate(case["input_ids"].tolist(), _images(case, pruned=False))
    assert result.token_ids == case["unpruned_gen_ids"].tolist()
    assert_close(result.logits, case["unpruned_step_logits"], atol=1e-4, rtol=0)


@requires_golden
@pytest.mark.parametrize("case", IMAGE_CASES, ids=str)
def test_tower_gives_the_recorded_layer(case: Case) -> None:
    hidden, attention, keys = _model(case.model_dir).tower_layer(case["pixel_values"])
    assert_close(hidden, case["v_hidden"], atol=1e-4, rtol=0)
    assert_close(attention, case["v_cls_attn"], atol=1e-5, rtol=0)
    assert_close(keys.mean(1), case["v_metric"], atol=1e-4, rtol=0)


@requires_golden
@pytest.mark.parametrize("case", IMAGE_CASES, ids=str)
def test_encoder_stage_equals_the_release(case: Case) -> None:
    for number, tile in enumerate(_tiles(case)):

        def ids(indices: list[int]) -> list[int]:
            return [1 + index for index in indices]

        assert [0, *ids(tile.patches)] == case["v_keep_sorted"][number].tolist()
        assert ids(tile.plan.anchors) == case["v_target_abs"][number].tolist()
        assert ids(tile.plan.donors) == case["v_merge_abs"][number].tolist()
        assert tile.plan.owners == case["v_similarity_argmax"][number].tolist()
        assert_close(tile.tokens, case["v_tokens"][number], atol=1e-5, rtol=1e-5)


@requires_golden
@pytest.mark.parametrize("case", IMAGE_CASES, ids=str)
def test_image_rows_equal_the_release(case: Case) -> None:
    model = _model(case.model_dir)
    rows = torch.cat([model.image_rows(image) for image in _images(case)])
    assert_close(rows, case["image_seq"], atol=1e-4, rtol=0)


@requires_golden
@pytest.mark.parametrize("case", [case for case in IMAGE_CASES if "grid" in case.name], ids=str)
def test_kept_patches_lie_where_the_release_marked_them(case: Case) -> None:
    rows, columns = case["grid_hw"].tolist()
    mask = torch.zeros(rows, columns, 24 * 24, dtype=torch.bool)
    for number, tile in enumerate(_tiles(case)[1:]):
        mask[number // columns, number % columns, tile.patches] = True
    whole = mask.unflatten(-1, (24, 24)).transpose(1, 2).reshape(24 * rows, 24 * columns)
    assert torch.equal(whole, case["grid_mask"])


@requires_golden
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("case", IMAGE_CASES, ids=str)
def test_decoder_stage_equals_the_release(case: Case, stage: int) -> None:
    record = _pruned_run(case.name).stages[stage, 0]

    def recorded(name: str) -> Tensor:
        return case[f"s{stage}_{name}"]

    assert record.start == case["image_pos"][0]
    assert_close(record.hidden_in, recorded("hidden_in"), atol=1e-4, rtol=0)
    assert_close(record.scores, recorded("score"), atol=1e-6, rtol=1e-4)
    assert_close(record.metric, recorded("metric"), atol=1e-4, rtol=0)
    assert record.plan.kept == recorded("keep_sorted").tolist()
    assert record.plan.anchors == recorded("target_abs").tolist()
    assert record.plan.donors == recorded("merge_abs").tolist()
    assert record.plan.owners == recorded("assign").tolist()


@requires_golden
@pytest.mark.parametrize("case", CASES, ids=str)
def test_prompt_and_image_give_the_recorded_input(case: Case) -> None:
    model = _model(case.model_dir)
    expected = case["input_ids"]
    assert model.tokenize(case.prompt) == expected.where(expected >= 0, model.config.image_token_id).tolist()
    if case.has_image and not case.is_named(golden.BASE_VIEW, golden.TWO_IMAGES):
        from PIL import Image as Pillow

        image = model.prepare(Pillow.fromarray(case.arrays["image_u8"]))
        assert torch.equal(image.pixel_values, case["pixel_values"])
