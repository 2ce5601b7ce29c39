"""Medians, ratios and marks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.bench.figures import Mark, Spread, percentile, ratios

SECONDS = st.lists(st.floats(0.001, 1000), min_size=1, max_size=20)


def test_a_spread_is_the_median_with_its_quartiles() -> None:
    assert Spread.of([5, 1, 3, 2, 4]) == Spread(median=3, low=2, high=4, count=5)
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0, 1)
    with pytest.raises(ValueError, match="samples"):
        Spread.of([])


@given(SECONDS)
def test_the_quartiles_enclose_the_median_and_lie_among_the_samples(samples: list[float]) -> None:
    spread = Spread.of(samples)
    assert min(samples) <= spread.low <= spread.median <= spread.high <= max(samples)


@given(SECONDS, st.floats(1, 20))
def test_a_machine_that_slows_down_between_rounds_changes_no_ratio(rounds: list[float], speedup: float) -> None:
    """Each round saw another machine; both engines saw the same one in each."""
    found = ratios([speedup * seconds for seconds in rounds], rounds)
    assert found.low == pytest.approx(speedup)
    assert found.high == pytest.approx(speedup)


def test_samples_of_different_rounds_have_no_ratio() -> None:
    with pytest.raises(ValueError, match="argument 2"):
        ratios([1.0, 2.0], [1.0])


@pytest.mark.parametrize(("share", "expected"), [(0.5, 50), (0.99, 99), (0.001, 1), (1.0, 100)])
def test_a_percentile_is_a_sample_that_this_share_does_not_exceed(share: float, expected: int) -> None:
    assert percentile([float(number) for number in range(100, 0, -1)], share) == expected


def test_a_percentile_of_few_samples_is_their_largest() -> None:
    assert percentile([1.0, 3.0, 2.0], 0.99) == 3.0


@pytest.mark.parametrize(
    ("value", "at_least", "is_met"),
    [(3.5, True, True), (3.499, True, False), (3.6, True, True), (3.5, False, True), (3.501, False, False)],
)
def test_a_mark_is_met_at_its_bound_and_on_the_good_side_of_it(value: float, at_least: bool, is_met: bool) -> None:
    mark = Mark("speed", value, 3.5, at_least)
    assert mark.is_met is is_met
    assert str(mark).startswith("met " if is_met else "MISSED ")
    assert mark.to_dict()["met"] is is_met
