"""Prompts with pruned images, as hypothesis draws them."""

from __future__ import annotations

from hypothesis import strategies as st

from vd_plugin.schedule import TokenSplit
from vd_plugin.spans import ImageSpan

NUM_STAGES = 3


@st.composite
def spans_and_length(draw: st.DrawFn) -> tuple[tuple[ImageSpan, ...], int]:
    spans = []
    length = draw(st.integers(0, 4))
    for _ in range(draw(st.integers(0, 3))):
        rows = [draw(st.integers(1, 9))]
        splits: list[TokenSplit | None] = []
        for _ in range(NUM_STAGES):
            kept = draw(st.integers(1, rows[-1]))
            splits.append(TokenSplit(kept, 0) if kept < rows[-1] else None)
            rows.append(kept)
        spans.append(ImageSpan(length, tuple(rows), tuple(splits)))
        length += rows[0] + draw(st.integers(0, 4))
    return tuple(spans), max(1, length)
