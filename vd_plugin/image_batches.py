"""Which images of a stage are pruned together, and where on the device each finds its rows and keys.

Images with equally many rows, of which equally many stay, share their kernels, whatever requests they belong to. Later
images of a request see the earlier ones pruned: they wait for the next wave. Scores also take equally many keys before
the image, no padding: an image's result must not depend, to the last bit, on what shares its kernels.

Everything follows from schedules, so it is laid out on the host, and goes to the device in one copy.

Shapes: P rows that are projected, B images of a batch, M rows of an image, N keys up to its end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from vd_plugin.schedule import TokenSplit
from vd_plugin.step_layout import ImageRows, RequestRows


@dataclass(frozen=True, slots=True)
class ImageKeys:
    """An image, and the keys that it is scored against."""

    request: RequestRows
    image: ImageRows
    keys: np.ndarray
    """(N,) int64, places in the pool of keys, in the order of the prompt; the last M are the image's own rows."""
    is_last: bool
    """Of its request: nothing sees it pruned."""


@dataclass(frozen=True, slots=True)
class ImageBatch:
    """Images that are selected from together, in an order in which those with equal N are neighbours."""

    num_rows: int
    split: TokenSplit
    images: tuple[ImageKeys, ...]

    def key_arrays(self) -> Iterator[np.ndarray]:
        """(images, N) for every N."""
        for _, alike in groupby(self.images, key=lambda image: len(image.keys)):
            yield np.stack([image.keys for image in alike])


@dataclass(frozen=True, slots=True)
class Wave:
    """Images that see nothing of each other."""

    batches: tuple[ImageBatch, ...]
    followed: tuple[tuple[int, int], ...]
    """Batch and place in it of the images whose kept rows later ones see; their keys join the pool in this order."""
    positions: np.ndarray
    """Of those kept rows, int64."""


@dataclass(frozen=True, slots=True)
class StageImages:
    """All that a stage prunes. The pool of keys begins with those of `rows`, then come the blocks that are read."""

    rows: np.ndarray
    """(P,) int64, rows of the step: of each request those of this step up to the end of its last image."""
    positions: np.ndarray
    """(P,) int64, at which they are scored: those of the new stage, but with the image itself still whole."""
    block_owners: np.ndarray
    """Batch index, of each KV block to read, int64."""
    block_numbers: np.ndarray
    """Its place in the block table, int64."""
    waves: tuple[Wave, ...]


def portions(requests: Sequence[RequestRows], max_keys: int) -> Iterator[list[RequestRows]]:
    """Consecutive requests, as many as have no more keys together; one at least."""
    portion: list[RequestRows] = []
    num_keys = 0
    for request in requests:
        count = request.context + request.end - request.start
        if portion and num_keys + count > max_keys:
            yield portion
            portion, num_keys = [], 0
        portion.append(request)
        num_keys += count
    if portion:
        yield portion


def batch_images(stage: int, requests: Sequence[RequestRows], block_size: int) -> StageImages:
    """Lay out the images that `stage` prunes; rows are counted as they enter it.

    Args:
        block_size: rows of a KV block of the stage.
    """
    num_blocks = [-(-request.context // block_size) for request in requests]
    num_projected = sum(request.end - request.start for request in requests)
    pool_size = num_projected + sum(num_blocks) * block_size
    first_rows, first_keys = 0, num_projected
    places, seen = [], {}
    for request, count in zip(requests, num_blocks, strict=True):
        places.append(np.arange(first_rows, first_rows + request.end - request.start))
        seen[request.request.batch_index] = [np.arange(first_keys, first_keys + request.context)]
        first_rows += request.end - request.start
        first_keys += count * block_size

    waves = []
    for depth in range(max(len(request.images) for request in requests)):
        now = []
        for request, rows in zip(requests, places, strict=True):
            if depth < len(request.images):
                image, before = request.images[depth], seen[request.request.batch_index]
                ends = [0, *(earlier.offset + earlier.span.rows[stage - 1] for earlier in request.images[: depth + 1])]
                before.append(rows[ends[depth] : image.offset])
                keys = np.concatenate((*before, rows[image.offset : ends[depth + 1]]))
                now.append(ImageKeys(request, image, keys, is_last=depth + 1 == len(request.images)))
        batches = tuple(_group(stage, now))
        followed, positions = [], [np.empty(0, dtype=np.int64)]
        for number, batch in enumerate(batches):
            for place, placed in enumerate(batch.images):
                if not placed.is_last:
                    kept = placed.image.span.rows[stage]
                    followed.append((number, place))
                    first = len(placed.keys) - batch.num_rows
                    positions.append(np.arange(first, first + kept))
                    seen[placed.request.request.batch_index].append(np.arange(pool_size, pool_size + kept))
                    pool_size += kept
        waves.append(Wave(batches, tuple(followed), np.concatenate(positions)))
    return StageImages(
        rows=np.concatenate([np.arange(request.start, request.end) for request in requests]),
        positions=np.concatenate([_positions(stage, request) for request in requests]),
        block_owners=np.repeat([request.request.batch_index for request in requests], num_blocks),
        block_numbers=np.concatenate([np.arange(count) for count in num_blocks]),
        waves=tuple(waves),
    )


def _group(stage: int, images: Sequence[ImageKeys]) -> Iterator[ImageBatch]:
    def shape(placed: ImageKeys) -> tuple[int, int, int]:
        split = placed.image.span.splits[stage - 1]
        assert split is not None
        return placed.image.span.rows[stage - 1], split.dominant, split.contextual

    ordered = sorted(images, key=lambda placed: (shape(placed), len(placed.keys)))
    for (num_rows, dominant, contextual), alike in groupby(ordered, key=shape):
        yield ImageBatch(num_rows, TokenSplit(dominant, contextual), tuple(alike))


def _positions(stage: int, request: RequestRows) -> np.ndarray:
    positions = np.arange(request.context, request.context + request.end - request.start)
    for image in request.images:
        behind = image.offset + image.span.rows[stage - 1]
        positions[behind:] -= image.span.rows[stage - 1] - image.span.rows[stage]
    return positions
