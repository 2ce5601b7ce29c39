"""Where a prompt's pruned images lie, and how long the prompt is at each stage of the decoder.

Scheduler, KV-cache manager and model runner all meet a request as token ids and multimodal features. What a feature
keeps travels in its identifier (vLLM drops the data of a feature whose tokens hit the prefix cache), so all three read
the same spans from the same place. Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from vd_plugin.schedule import Schedule, TokenSplit, stage_rows

_MARK: Final = "~visiondrop:"


def identify(base: str, schedule: Schedule | None) -> str:
    """Identifier of an image: the stock identifier, followed by what every stage of its schedule keeps, if any does.

    Raises:
        ValueError: `base`, which may come from a client, already carries a schedule.
    """
    if _MARK in base:
        raise ValueError(f"an image identifier may not contain {_MARK!r}")
    if schedule is None or schedule.is_full:
        return base
    stages = (
        f"{split.dominant}.{split.contextual}" if split else "" for split in (schedule.encoder, *schedule.decoder)
    )
    return f"{base}{_MARK}{'-'.join(stages)}"


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """An image that is pruned inside the decoder. Offsets count the prompt's tokens as the scheduler sees them."""

    offset: int
    rows: tuple[int, ...]
    """At every stage; rows[0] placeholders."""
    splits: tuple[TokenSplit | None, ...]
    """What stage k + 1 keeps; None where it changes nothing."""

    @property
    def end(self) -> int:
        return self.offset + self.rows[0]

    def dropped(self, stage: int) -> int:
        """Rows that are gone at `stage`."""
        return self.rows[0] - self.rows[stage]


def read_splits(identifier: str) -> tuple[TokenSplit | None, ...]:
    """What an image keeps at every stage, the encoder first; empty for one served in full.

    Raises:
        ValueError: `identify` has not made it.
    """
    _, found, stages = identifier.partition(_MARK)
    return tuple(_parse(stage) for stage in stages.split("-")) if found else ()


def read_spans(features: Iterable[Any]) -> tuple[ImageSpan, ...]:
    """Spans of a request's vLLM features, in prompt order; images without decoder stages are left out."""
    spans = []
    for feature in features:
        splits = read_splits(feature.identifier)[1:]
        if any(splits):
            rows = stage_rows(feature.mm_position.length, splits)
            spans.append(ImageSpan(feature.mm_position.offset, rows, splits))
    return tuple(sorted(spans, key=lambda span: span.offset))


def dropped_before(spans: Iterable[ImageSpan], stage: int, num_tokens: int) -> int:
    """Rows that are gone at `stage` among the first `num_tokens` tokens. An image is there whole or not at all."""
    # Asked for every request and stage whenever blocks are allocated: no calls for each image.
    return sum([span.rows[0] - span.rows[stage] for span in spans if span.offset + span.rows[0] <= num_tokens])


def whole_images(spans: Iterable[ImageSpan], start: int, end: int) -> int:
    """The largest end of a step, at most `end`, that starts at token `start` and splits no image."""
    for span in spans:
        if start <= span.offset < end < span.end:
            return span.offset
    return end


def before_images(spans: Iterable[ImageSpan], start: int, end: int) -> int:
    """The largest end of a step, at most `end`, that starts at token `start` and computes no pruned image."""
    return min((span.offset for span in spans if start <= span.offset < end), default=end)


def _parse(stage: str) -> TokenSplit | None:
    if not stage:
        return None
    dominant, contextual = stage.split(".")
    return TokenSplit(int(dominant), int(contextual))
