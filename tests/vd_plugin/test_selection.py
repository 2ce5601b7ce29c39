"""Laws of the pure method: what is kept, what is merged into what, and the authors' recorded plans."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import golden
import pytest
import torch
from golden import Case, requires_golden
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import merge_plan, merge_tokens
from torch import Tensor
from torch.testing import assert_close

from vd_plugin.selection import Plan, apply, select

LAWS = settings(deadline=None, max_examples=150)


class Stage(NamedTuple):
    scores: Tensor
    keys: Tensor
    tokens: Tensor
    dominant: int
    contextual: int


def _make_stage(
    seed: int,
    num_tokens: int,
    dominant: int,
    contextual: int,
    batch: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float32,
) -> Stage:
    """Random tokens without ties: the scores of each batch entry are a permutation."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(*batch, num_tokens, generator=generator).argsort(dim=-1).to(dtype) / num_tokens
    keys = torch.randn(*batch, num_tokens, 6, generator=generator, dtype=dtype)
    tokens = torch.randn(*batch, num_tokens, 5, generator=generator, dtype=dtype)
    return Stage(scores, keys, tokens, dominant, contextual)


@st.composite
def stages(draw: st.DrawFn, batch: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> Stage:
    num_tokens = draw(st.integers(1, 60))
    rows = draw(st.integers(1, num_tokens))
    contextual = draw(st.integers(0, rows))
    return _make_stage(draw(st.integers(0, 2**32)), num_tokens, rows - contextual, contextual, batch, dtype)


def _has_clear_owners(stage: Stage, plan: Plan) -> bool:
    """Whether every donor prefers one anchor by more than rounding: else two right answers exist."""
    if plan.anchors.shape[-1] < 2 or not plan.donors.numel():
        return True
    unit = torch.nn.functional.normalize(stage.keys.double(), dim=-1)
    similarity = unit[plan.donors] @ unit[plan.anchors].T
    best = similarity.topk(2, dim=-1).values
    return bool((best[:, 0] - best[:, 1]).min() > 1e-5)


@pytest.fixture
def two_thread_counts() -> Iterator[tuple[int, int]]:
    before = torch.get_num_threads()
    yield 1, 2
    torch.set_num_threads(before)


# Planning


@LAWS
@given(stages())
def test_every_token_is_kept_or_an_anchor_or_a_donor_and_only_one_of_them(stage: Stage) -> None:
    plan = select(stage.scores, stage.keys, stage.dominant, stage.contextual)
    assert plan.kept.shape == (stage.dominant,)
    assert plan.anchors.shape == (stage.contextual,)
    assert plan.owners.shape == plan.donors.shape
    assert sorted(torch.cat(plan[:3]).tolist()) == list(range(len(stage.scores)))
    for index in plan:
        assert index.dtype == torch.int64
    for index in plan[:3]:
        assert all(a < b for a, b in pairwise(index.tolist()))
    if stage.contextual and plan.owners.numel():
        assert plan.owners.min() >= 0
        assert plan.owners.max() < stage.contextual


@LAWS
@given(stages())
def test_no_token_that_is_kept_scores_below_one_that_is_not(stage: Stage) -> None:
    plan = select(stage.scores, stage.keys, stage.dominant, stage.contextual)
    rest = torch.cat([plan.anchors, plan.donors])
    if stage.dominant and len(rest):
        assert stage.scores[plan.kept].min() > stage.scores[rest].max()


@LAWS
@given(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=1, max_size=50), st.data())
def test_of_equal_scores_the_lowest_index_is_kept(scores: list[float], data: st.DataObject) -> None:
    dominant = data.draw(st.integers(1, len(scores)))
    plan = select(torch.tensor(scores), torch.ones(len(scores), 2), dominant, 0)
    order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    assert plan.kept.tolist() == sorted(order[:dominant])


@pytest.mark.parametrize("num_tokens", [17, 576, 2880])
def test_constant_scores_keep_the_first_tokens_at_every_size(num_tokens: int) -> None:
    """Sorting algorithms change with the size; stability must not."""
    plan = select(torch.zeros(num_tokens), torch.ones(num_tokens, 2), num_tokens // 2, 0)
    assert plan.kept.tolist() == list(range(num_tokens // 2))


@LAWS
@given(stages())
def test_anchors_are_every_step_th_token_of_the_rest(stage: Stage) -> None:
    plan = select(stage.scores, stage.keys, stage.dominant, stage.contextual)
    rest = sorted(set(range(len(stage.scores))) - set(plan.kept.tolist()))
    if stage.contextual:
        step = max(1, len(rest) // stage.contextual)
        assert plan.anchors.tolist() == [rest[number * step] for number in range(stage.contextual)]


def test_of_equally_similar_anchors_the_first_owns() -> None:
    """Anchors 0, 2, 4, 6 with the keys east, north, east, north; lengths must not matter."""
    east, north = [1.0, 0.0], [0.0, 1.0]
    keys = torch.tensor([east, north, north, [7.0, 0.0], [2.0, 0.0], [0.0, 0.25], [0.0, 4.0], east, [1.0, 0.5]])
    plan = select(torch.zeros(9), keys, 0, 4)
    assert plan.anchors.tolist() == [0, 2, 4, 6]
    assert plan.owners.tolist() == [1, 0, 1, 0, 0]


def test_similarity_is_of_direction_not_of_length() -> None:
    """A dot product would prefer the long anchor."""
    keys = torch.tensor([[1.0, 0.0], [1.0, 0.1], [50.0, 50.0], [0.0, 1.0]])
    plan = select(torch.zeros(4), keys, 0, 2)
    assert plan.anchors.tolist() == [0, 2]
    assert plan.owners.tolist() == [0, 1]


def test_keys_of_zero_length_join_some_anchor() -> None:
    plan = select(torch.zeros(6), torch.zeros(6, 3), 1, 2)
    assert plan.owners.shape == (3,)
    assert set(plan.owners.tolist()) <= {0, 1}
    assert apply(plan, torch.ones(6, 4)).isfinite().all()


def test_an_anchor_without_direction_attracts_nobody_who_resembles_another() -> None:
    keys = torch.tensor([[0.0, 0.0], [1.0, 2.0], [0.0, 1.0], [1.0, 1.0]])
    assert select(torch.zeros(4), keys, 0, 2).owners.tolist() == [1, 1]


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize(("dominant", "contextual"), [(0, 0), (-1, 3), (3, -1), (9, 0), (0, 9), (5, 4), (8, 1)])
def test_counts_that_do_not_fit_are_refused(dominant: int, contextual: int, batch: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="8"):
        select(torch.rand(*batch, 8), torch.rand(*batch, 8, 2), dominant, contextual)


def test_scores_and_keys_of_different_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="keys"):
        select(torch.rand(8), torch.rand(7, 2), 2, 2)


# Applying


@LAWS
@given(stages())
def test_every_row_is_a_token_or_an_anchor_plus_the_mean_of_its_donors(stage: Stage) -> None:
    """Moving the identity matrix shows each row's recipe: no token lost, none used twice."""
    plan = select(stage.scores, stage.keys, stage.dominant, stage.contextual)
    recipe = apply(plan, torch.eye(len(stage.scores), dtype=torch.float64))
    assert recipe.shape == (stage.dominant + stage.contextual, len(stage.scores))
    expected = torch.zeros_like(recipe)
    for row, index in enumerate([*plan.kept.tolist(), *plan.anchors.tolist()]):
        expected[row, index] = 1
    if stage.contextual:
        owners = plan.owners.tolist()
        for donor, owner in zip(plan.donors.tolist(), owners, strict=True):
            expected[stage.dominant + owner, donor] = 1 / owners.count(owner)
    assert_close(recipe, expected)


def test_without_contextual_tokens_the_rest_is_dropped() -> None:
    stage = _make_stage(0, 20, 7, 0)
    plan = select(stage.scores, stage.keys, 7, 0)
    assert torch.equal(apply(plan, stage.tokens), stage.tokens[plan.kept])


@pytest.mark.parametrize("batch", [(), (2,)])
def test_keeping_all_tokens_moves_nothing(batch: tuple[int, ...]) -> None:
    stage = _make_stage(1, 20, 20, 0, batch)
    plan = select(stage.scores, stage.keys, 20, 0)
    assert torch.equal(apply(plan, stage.tokens), stage.tokens)


def test_where_nothing_is_left_to_merge_the_rest_follows_unchanged() -> None:
    stage = _make_stage(2, 20, 12, 8)
    plan = select(stage.scores, stage.keys, 12, 8)
    assert plan.donors.numel() == 0
    assert torch.equal(apply(plan, stage.tokens), stage.tokens[torch.cat([plan.kept, plan.anchors])])


@LAWS
@given(stages(), st.sampled_from([-3.0, 0.0, 1.0, 0.25]))
def test_the_mean_of_a_constant_is_that_constant(stage: Stage, constant: float) -> None:
    plan = select(stage.scores, stage.keys, stage.dominant, stage.contextual)
    rows = apply(plan, torch.full((len(stage.scores), 3), constant))
    assert (rows[: stage.dominant] == constant).all()
    for number, row in enumerate(rows[stage.dominant :]):
        assert (row == constant * (2 if number in plan.owners.tolist() else 1)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rows_have_the_type_of_the_tokens_and_kept_ones_are_not_rounded(dtype: torch.dtype) -> None:
    stage = _make_stage(3, 40, 10, 4)
    tokens = stage.tokens.to(dtype)
    plan = select(stage.scores.to(dtype), stage.keys.to(dtype), 10, 4)
    rows = apply(plan, tokens)
    assert rows.dtype == dtype
    assert torch.equal(rows[:10], tokens[plan.kept])


def test_inputs_are_left_as_they_were() -> None:
    stage = _make_stage(4, 40, 10, 4)
    copies = [tensor.clone() for tensor in stage[:3]]
    apply(select(stage.scores, stage.keys, 10, 4), stage.tokens)
    for tensor, copy in zip(stage[:3], copies, strict=True):
        assert torch.equal(tensor, copy)


# Against the reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(LAWS, max_examples=100)
@given(data=st.data())
def test_plan_and_rows_equal_the_reference(dtype: torch.dtype, data: st.DataObject) -> None:
    stage = data.draw(stages(dtype=dtype))
    plan = select(stage.scores, stage.keys, stage.dominant, stage.contextual)
    assume(_has_clear_owners(stage, plan))
    expected = merge_plan(stage.scores, stage.keys, stage.dominant, stage.contextual)
    assert plan.kept.tolist() == expected.kept
    assert plan.anchors.tolist() == expected.anchors
    assert plan.donors.tolist() == expected.donors
    if stage.contextual:
        assert plan.owners.tolist() == expected.owners
    precision = 1e-12 if dtype == torch.float64 else 1e-6
    assert_close(apply(plan, stage.tokens), merge_tokens(expected, stage.tokens), atol=precision, rtol=precision)


# Batches and repeatability


@pytest.mark.parametrize("batch", [(4,), (2, 3)])
@settings(LAWS, max_examples=60)
@given(data=st.data())
def test_a_batch_equals_each_alone(batch: tuple[int, ...], data: st.DataObject) -> None:
    stage = data.draw(stages(batch=batch))
    whole = select(stage.scores, stage.keys, stage.dominant, stage.contextual)
    rows = apply(whole, stage.tokens)
    for place in torch.cartesian_prod(*map(torch.arange, batch)).reshape(-1, len(batch)).tolist():
        index = tuple(place)
        alone = Stage(stage.scores[index], stage.keys[index], stage.tokens[index], stage.dominant, stage.contextual)
        plan = select(alone.scores, alone.keys, alone.dominant, alone.contextual)
        assume(_has_clear_owners(alone, plan))
        for ours, its in zip(whole, plan, strict=True):
            assert torch.equal(ours[index], its)
        assert_close(rows[index], apply(plan, alone.tokens))


def test_result_is_the_same_bit_for_bit_on_any_number_of_threads(two_thread_counts: tuple[int, int]) -> None:
    """At the size of the real model: five tiles of 576 patches, 1024 wide."""
    generator = torch.Generator().manual_seed(5)
    scores = torch.rand(5, 576, generator=generator)
    keys, tokens = torch.randn(5, 576, 64, generator=generator), torch.randn(5, 576, 1024, generator=generator)
    results: list[tuple[Plan, Tensor]] = []
    for threads in two_thread_counts * 4:
        torch.set_num_threads(threads)
        plan = select(scores, keys, 83, 12)
        results.append((plan, apply(plan, tokens)))
    first_plan, first_rows = results[0]
    for plan, rows in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(first_plan, plan, strict=True))
        assert torch.equal(first_rows, rows)


# The authors' recorded run


@requires_golden
@pytest.mark.parametrize("case", golden.image_cases(), ids=str)
def test_encoder_plans_equal_the_release(case: Case) -> None:
    """All tiles at once. CLS is always kept: it is set aside before and put back after."""
    dominant, contextual = case.encoder
    plan = select(case["v_cls_attn_sum"], case["v_metric"][:, 1:], dominant - 1, contextual)
    assert torch.equal(1 + plan.kept, case["v_keep_sorted"][:, 1:])
    assert torch.equal(1 + plan.anchors, case["v_target_abs"])
    assert torch.equal(1 + plan.donors, case["v_merge_abs"])
    assert torch.equal(plan.owners, case["v_similarity_argmax"])
    hidden = case["v_hidden"]
    rows = torch.cat([hidden[:, :1], apply(plan, hidden[:, 1:])], dim=1)
    assert_close(rows, case["v_tokens"], atol=1e-5, rtol=0)


@requires_golden
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("case", golden.image_cases(), ids=str)
def test_decoder_plans_equal_the_release(case: Case, stage: int) -> None:
    def recorded(name: str) -> Tensor:
        return case[f"s{stage}_{name}"]

    dominant, contextual = case.decoder[stage - 1]
    plan = select(recorded("score"), recorded("metric"), dominant, contextual)
    assert torch.equal(plan.kept, recorded("keep_sorted"))
    assert torch.equal(plan.anchors, recorded("target_abs"))
    assert torch.equal(plan.donors, recorded("merge_abs"))
    assert torch.equal(plan.owners, recorded("assign"))
    start = int(case["image_pos"])
    image = recorded("hidden_in")[start : start + len(recorded("score"))]
    expected = recorded("hidden_out")[start : start + dominant + contextual]
    assert_close(apply(plan, image), expected, atol=1e-5, rtol=0)
