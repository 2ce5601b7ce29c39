"""The layout of a step against a simulation that moves every single row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from span_strategies import NUM_STAGES, spans_and_length

from vd_plugin.spans import ImageSpan, dropped_before
from vd_plugin.step_layout import PrunedRequest, StageRows, final_rows, plan_stages


@dataclass(frozen=True)
class Prompt:
    spans: tuple[ImageSpan, ...]
    length: int
    computed: int
    """Tokens that were computed in earlier steps."""
    end: int
    """Of this step."""


@st.composite
def prompts(draw: st.DrawFn) -> Prompt:
    spans, length = draw(spans_and_length())
    edges = [edge for edge in range(length + 1) if not any(span.offset < edge < span.end for span in spans)]
    computed = draw(st.sampled_from(edges[:-1]))
    return Prompt(spans, length, computed, draw(st.sampled_from([edge for edge in edges if edge > computed])))


def plan(batch: list[Prompt]) -> tuple[np.ndarray, list[PrunedRequest], list[StageRows]]:
    lengths = np.array([prompt.end - prompt.computed for prompt in batch], dtype=np.int32)
    # Per-request state is kept by slot, and slots are in another order than the batch.
    slots = list(range(len(batch)))[::-1]
    drops = np.zeros((NUM_STAGES, len(batch)), dtype=np.int32)
    pruned = []
    for index, (prompt, slot) in enumerate(zip(batch, slots, strict=True)):
        for stage in range(1, NUM_STAGES + 1):
            drops[stage - 1, slot] = dropped_before(prompt.spans, stage, prompt.computed)
        now = tuple(span for span in prompt.spans if prompt.computed <= span.offset < prompt.end)
        if now:
            pruned.append(PrunedRequest(f"request {index}", index, slot, prompt.computed, now))
    return lengths, pruned, plan_stages(lengths, pruned, drops, NUM_STAGES)


def survivors(prompt: Prompt, stage: int, end: int) -> list[int]:
    """Tokens of a prompt's first `end` that have a row at `stage`, an image's rows right-aligned in its span."""
    gone = {
        token for span in prompt.spans for token in range(span.offset, span.end - span.rows[stage]) if span.end <= end
    }
    return [token for token in range(end) if token not in gone]


@settings(max_examples=300, deadline=None)
@given(st.lists(prompts(), min_size=1, max_size=4))
def test_every_stage_has_the_rows_that_survive(batch: list[Prompt]) -> None:
    lengths, pruned, stages = plan(batch)
    assert lengths.tolist() == [prompt.end - prompt.computed for prompt in batch], "the argument stays as it is"
    assert len(stages) == NUM_STAGES
    for stage, rows in enumerate(stages, start=1):
        alive = [[t for t in survivors(prompt, stage, prompt.end) if t >= prompt.computed] for prompt in batch]
        assert rows.lengths.tolist() == [len(tokens) for tokens in alive]
        assert rows.starts.tolist() == np.cumsum([0, *map(len, alive)]).tolist()
        assert rows.num_rows == sum(map(len, alive))
        busy = [p for p in pruned if any(span.splits[stage - 1] for span in p.spans)]
        assert [work.request for work in rows.requests] == busy


@settings(max_examples=300, deadline=None)
@given(st.lists(prompts(), min_size=1, max_size=4))
def test_a_stage_works_on_the_rows_of_the_stage_before(batch: list[Prompt]) -> None:
    _, _, stages = plan(batch)
    for stage, rows in enumerate(stages, start=1):
        # All rows of the step as they enter the stage: (request, token).
        entering = [
            (index, token)
            for index, prompt in enumerate(batch)
            for token in survivors(prompt, stage - 1, prompt.end)
            if token >= prompt.computed
        ]
        for work in rows.requests:
            index = work.request.batch_index
            prompt = batch[index]
            mine = [place for place, (owner, _) in enumerate(entering) if owner == index]
            assert work.start == mine[0]
            images = [span for span in work.request.spans if span.splits[stage - 1]]
            assert [image.span for image in work.images] == images
            for image in work.images:
                tokens = range(image.span.end - image.span.rows[stage - 1], image.span.end)
                assert [place for place in mine if entering[place][1] in tokens] == list(
                    range(image.start, image.start + len(tokens))
                )
                assert image.offset == image.start - work.start
            assert entering[work.end - 1] == (index, images[-1].end - 1)
            # What lies in the new stage's cache: pruned as that stage prunes.
            assert work.context == len(survivors(prompt, stage, prompt.computed))


@settings(max_examples=300, deadline=None)
@given(st.lists(prompts(), min_size=1, max_size=4))
def test_every_surviving_token_finds_its_final_row(batch: list[Prompt]) -> None:
    lengths, pruned, stages = plan(batch)
    rows = final_rows(lengths, pruned, stages[-1], NUM_STAGES)
    last = [
        (index, token)
        for index, prompt in enumerate(batch)
        for token in survivors(prompt, NUM_STAGES, prompt.end)
        if token >= prompt.computed
    ]
    before = [(index, token) for index, p in enumerate(batch) for token in range(p.computed, p.end)]
    assert len(rows) == len(before)
    assert {before[place]: row for place, row in enumerate(rows) if before[place] in last} == {
        key: row for row, key in enumerate(last)
    }
    # The others point somewhere harmless: into their own image.
    for (index, token), row in zip(before, rows, strict=True):
        if (index, token) not in last:
            span = next(span for span in batch[index].spans if span.offset <= token < span.end)
            assert last[row] == (index, span.end - span.rows[NUM_STAGES])
