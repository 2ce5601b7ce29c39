"""Spans of pruned images: what an identifier carries, and where a prompt may be cut."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from span_strategies import NUM_STAGES, spans_and_length

from vd_plugin.schedule import Schedule, TokenSplit, stage_rows
from vd_plugin.spans import ImageSpan, before_images, dropped_before, identify, read_spans, whole_images

LAYERS = (2, 2, 2, 2)


@dataclass(frozen=True)
class Position:
    offset: int
    length: int


@dataclass(frozen=True)
class Feature:
    """As much of vLLM's feature as is read; its data may be gone."""

    identifier: str
    mm_position: Position
    data: None = None


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    encoder = draw(st.none() | st.builds(TokenSplit, st.integers(1, 40), st.integers(0, 8)))
    rows = 600 if encoder is None else encoder.rows
    decoder: list[TokenSplit | None] = []
    for _ in range(NUM_STAGES):
        kept = draw(st.integers(1, rows))
        contextual = draw(st.integers(0, kept))
        decoder.append(TokenSplit(kept - contextual, contextual) if kept < rows else None)
        rows = kept
    return Schedule(None, 600, 1, encoder, tuple(decoder), LAYERS)


@given(st.lists(st.tuples(schedules(), st.integers(0, 9)), max_size=4), st.randoms(use_true_random=False))
def test_what_is_written_into_identifiers_is_read_back(wanted: list[tuple[Schedule, int]], random: object) -> None:
    features, expected, offset = [], [], 0
    for number, (schedule, gap) in enumerate(wanted):
        offset += gap
        position = Position(offset, schedule.num_placeholders)
        features.append(Feature(identify(f"image-{number}.jpg", schedule), position))
        if any(schedule.decoder):
            expected.append(ImageSpan(offset, schedule.rows, schedule.decoder))
        offset += schedule.num_placeholders
    random.shuffle(features)  # type: ignore[attr-defined]
    assert read_spans(features) == tuple(expected)


@given(schedules(), schedules())
def test_different_schedules_never_share_an_identifier(one: Schedule, other: Schedule) -> None:
    same = (one.encoder, one.decoder) == (other.encoder, other.decoder)
    assert (identify("image", one) == identify("image", other)) is same


def test_an_image_in_full_keeps_the_stock_identifier() -> None:
    full = Schedule("full", 600, 1, None, (None,) * 3, LAYERS)
    assert identify("image", full) == "image"
    assert read_spans([Feature("image", Position(0, 600))]) == ()


def test_an_image_pruned_at_the_encoder_alone_has_an_identifier_but_no_span() -> None:
    schedule = Schedule(None, 600, 1, TokenSplit(40, 6), (None,) * 3, LAYERS)
    assert identify("image", schedule) != "image"
    assert read_spans([Feature(identify("image", schedule), Position(0, 46))]) == ()


def test_a_client_cannot_write_a_schedule_into_an_identifier() -> None:
    pruned = Schedule(None, 600, 1, TokenSplit(40, 6), (TokenSplit(9, 1), None, None), LAYERS)
    with pytest.raises(ValueError, match="may not contain"):
        identify(identify("image", pruned), pruned)
    with pytest.raises(ValueError, match="may not contain"):
        identify(identify("image", pruned), Schedule("full", 600, 1, None, (None,) * 3, LAYERS))


@given(spans_and_length(), st.data())
def test_a_step_ends_as_late_as_it_can_without_splitting_an_image(
    prompt: tuple[tuple[ImageSpan, ...], int], data: st.DataObject
) -> None:
    spans, length = prompt
    allowed = [edge for edge in range(length + 1) if not any(span.offset < edge < span.end for span in spans)]
    start = data.draw(st.sampled_from(allowed))
    end = data.draw(st.integers(start, length))
    assert whole_images(spans, start, end) == max(edge for edge in allowed if edge <= end)


@given(spans_and_length(), st.data())
def test_a_step_ends_as_late_as_it_can_without_an_image(
    prompt: tuple[tuple[ImageSpan, ...], int], data: st.DataObject
) -> None:
    spans, length = prompt
    start = data.draw(
        st.sampled_from([0, length, *(span.end for span in spans)])
        | st.integers(0, length).filter(lambda edge: not any(span.offset < edge < span.end for span in spans))
    )
    end = data.draw(st.integers(start, length))
    allowed = [
        edge for edge in range(start, end + 1) if not any(start < span.end and span.offset < edge for span in spans)
    ]
    assert before_images(spans, start, end) == max(allowed)


@given(spans_and_length(), st.integers(1, NUM_STAGES))
def test_dropped_rows_are_those_of_the_images_that_are_computed(
    prompt: tuple[tuple[ImageSpan, ...], int], stage: int
) -> None:
    spans, length = prompt
    for num_tokens in range(length + 1):
        expected = sum(span.rows[0] - span.rows[stage] for span in spans if span.offset + span.rows[0] <= num_tokens)
        assert dropped_before(spans, stage, num_tokens) == expected
    dropped = [dropped_before(spans, stage, num_tokens) for num_tokens in range(length + 1)]
    assert all(before <= after for before, after in pairwise(dropped))


@given(schedules())
def test_spans_count_rows_as_the_schedule_does(schedule: Schedule) -> None:
    assert schedule.rows == stage_rows(schedule.num_placeholders, schedule.decoder)
