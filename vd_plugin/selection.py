"""The method as pure functions: score -> plan -> apply. torch only, no vLLM.

VisionDrop, arXiv 2506.22283, sections 3.2 (visual-only scoring) and 3.3 (staged pruning and merging).

Two notable things. A plan is indices alone, so that it can move every tensor that must move. And all of its sizes
follow from the requested counts, never from data: planning and applying need no device-to-host copy.

Shapes: ... leading batch dimensions (tiles), N tokens in, K dominant, C contextual, R merged away, D hidden.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_TILE_ELEMENTS = 1 << 24
"""Attention weights held at once while scoring: 64 MiB of float32."""


class Plan(NamedTuple):
    """Which tokens stay, and where the others go. Index tensors are int64 and ascending, but for `owners`."""

    kept: Tensor
    """(..., K) tokens that stay as they are."""
    anchors: Tensor
    """(..., C) tokens that the others are merged into."""
    donors: Tensor
    """(..., R) tokens that are merged away; where C is 0 they are dropped."""
    owners: Tensor
    """(..., R) for each donor the number of its anchor, in 0..C-1."""


def select(scores: Tensor, keys: Tensor, dominant: int, contextual: int) -> Plan:
    """Plan one stage.

    Args:
        scores: (..., N) float, higher = keep. Of equal scores the lower index is kept, so that a run can be repeated.
        keys: (..., N, H) float, the tokens' key metric; a donor joins the anchor of highest cosine similarity.
        dominant: K, tokens that stay.
        contextual: C, tokens that the rest is merged into.

    Raises:
        ValueError: a count is negative, or their sum is not in 1..N.
    """
    num_tokens = scores.shape[-1]
    if dominant < 0 or contextual < 0 or not 1 <= dominant + contextual <= num_tokens:
        raise ValueError(f"cannot keep {dominant} + {contextual} of {num_tokens} tokens")
    if keys.shape[:-1] != scores.shape:
        raise ValueError(f"scores {tuple(scores.shape)} and keys {tuple(keys.shape)} are not of the same tokens")

    # 1. Dominant tokens. A stable sort, because topk leaves the order of equal scores open.
    ranking = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    kept = ranking[..., :dominant].sort(dim=-1).values
    rest = ranking[..., dominant:].sort(dim=-1).values

    # 2. Anchors: every step-th of the rest, the first C of them.
    num_rest = num_tokens - dominant
    if contextual == 0:
        empty = rest[..., :0]
        return Plan(kept, anchors=empty, donors=rest, owners=torch.zeros_like(rest))
    step = max(1, num_rest // contextual)
    is_anchor = torch.zeros(num_rest, dtype=torch.bool)
    is_anchor[: step * contextual : step] = True
    # Which positions of `rest` are anchors is known on the host; only the two short index lists travel.
    anchors = rest.index_select(-1, is_anchor.nonzero().squeeze(-1).to(rest.device, non_blocking=True))
    donors = rest.index_select(-1, (~is_anchor).nonzero().squeeze(-1).to(rest.device, non_blocking=True))

    # 3. Every donor joins the most similar anchor; argmax takes the first of equals.
    directions = F.normalize(_widen(keys), dim=-1)
    similarity = _rows(directions, donors) @ _rows(directions, anchors).transpose(-1, -2)
    return Plan(kept, anchors, donors, owners=similarity.argmax(dim=-1))


def apply(plan: Plan, tokens: Tensor) -> Tensor:
    """Move tokens as planned: (..., N, D) -> (..., K + C, D), kept tokens first, then anchor + mean of its donors.

    An anchor stays outside the mean, and is alone where no donor joined it (the release's rule).
    """
    kept = _rows(tokens, plan.kept)
    num_contextual = plan.anchors.shape[-1]
    if num_contextual == 0:
        return kept
    anchors = _rows(tokens, plan.anchors)
    if plan.donors.shape[-1] == 0:
        return torch.cat((kept, anchors), dim=-2)
    # A product with the membership matrix, not a scatter: on a GPU scatters add in an order that varies between runs.
    donors = _widen(_rows(tokens, plan.donors))
    membership = F.one_hot(plan.owners, num_contextual).transpose(-1, -2).to(donors.dtype)
    means = (membership @ donors) / membership.sum(dim=-1, keepdim=True).clamp(min=1)
    return torch.cat((kept, (anchors + means).to(tokens.dtype)), dim=-2)


def visual_scores(queries: Tensor, keys: Tensor, start: int, count: int) -> Tensor:
    """Attention that an image pays to each of its own tokens (VisionDrop, section 3.2): the score inside the decoder.

    Args:
        queries: (heads, N, D) rotated, of one sequence.
        keys: (kv_heads, N, D) rotated, of the same sequence.
        start, count: the image's tokens, start..start + count.

    Returns:
        (count,) float32 at least: mean over heads and over the image's queries of the causal softmax over the whole
        row, on the image's columns (not renormalised there). What follows the image plays no part.
    """
    end = start + count
    return attention_received(queries[:, start:end], keys[:, :end]) / (queries.shape[0] * count)


def attention_received(queries: Tensor, keys: Tensor) -> Tensor:
    """Attention that the last M tokens of a sequence pay to themselves: the sum over heads and queries, by column.

    Args:
        queries: (heads, M, D), of the last M tokens.
        keys: (kv_heads, N, D), of the whole sequence; a key head serves heads / kv_heads query heads.

    Returns:
        (M,) float32 at least. Works through the queries tile by tile: no (heads, M, N) tensor comes into being.
    """
    kv_heads, num_keys, width = keys.shape
    num_queries = queries.shape[1]
    first = num_keys - num_queries
    grouped = _widen(queries).unflatten(0, (kv_heads, -1)) * width**-0.5
    transposed = _widen(keys).transpose(-1, -2).unsqueeze(1)
    columns = torch.arange(num_keys, device=keys.device)
    received = torch.zeros(num_queries, dtype=grouped.dtype, device=keys.device)
    tile = max(1, _TILE_ELEMENTS // (queries.shape[0] * num_keys))
    for begin in range(0, num_queries, tile):
        rows = slice(begin, min(begin + tile, num_queries))
        # Causal: row i of the tile sees keys up to its own; nothing behind the tile's last row is computed.
        seen = first + rows.stop
        logits = grouped[:, :, rows] @ transposed[..., :seen]
        hidden = columns[:seen] > first + torch.arange(rows.start, rows.stop, device=keys.device).unsqueeze(1)
        weights = logits.masked_fill_(hidden, float("-inf")).softmax(dim=-1)
        received[: rows.stop] += weights[..., first:].sum(dim=(0, 1, 2))
    return received


def _widen(tensor: Tensor) -> Tensor:
    """At least float32: sums and similarities in half precision would tie too often."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _rows(tokens: Tensor, index: Tensor) -> Tensor:
    """Gather rows along the second-last dimension: (..., N, D) by (..., M) -> (..., M, D)."""
    return tokens.gather(-2, index.unsqueeze(-1).expand(*index.shape, tokens.shape[-1]))
