"""The method as pure functions: score -> plan -> apply. torch only, no vLLM.

VisionDrop, arXiv 2506.22283, sections 3.2 (visual-only scoring) and 3.3 (staged pruning and merging).

Three notable things. A plan is indices alone, so that it can move every tensor that must move. All of its sizes follow
from the requested counts, never from data: planning and applying copy nothing between device and host. And an entry of
a batch comes out as it does alone, on a CPU to the last bit (at widths that are multiples of 8, as of all models):
products are batched ones even for one entry, and tiles are cut by an entry's own size.

Shapes: ... leading batch dimensions (tiles, images), N tokens in, K dominant, C contextual, R merged away, D hidden.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_TILE_ELEMENTS = 1 << 24
"""Attention weights held at once while scoring: 64 MiB of float32."""
_CPU_TILE_ELEMENTS = 1 << 21
"""The same on a CPU, where they should stay in its cache."""


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
    runs = rest[..., : step * contextual].unflatten(-1, (contextual, step))
    merged = torch.cat((runs[..., 0], runs[..., 1:].flatten(-2), rest[..., step * contextual :]), dim=-1)
    anchors, donors = merged[..., :contextual], merged[..., contextual:]

    # 3. Every donor joins the most similar anchor; argmax takes the first of equals.
    directions = F.normalize(_rows(_widen(keys), merged), dim=-1)
    similarity = _product(directions[..., contextual:, :], directions[..., :contextual, :].transpose(-1, -2))
    return Plan(kept, anchors, donors, owners=similarity.argmax(dim=-1))


def apply(plan: Plan, tokens: Tensor) -> Tensor:
    """Move tokens as planned: (..., N, D) -> (..., K + C, D), kept tokens first, then anchor + mean of its donors.

    An anchor stays outside the mean, and is alone where no donor joined it (the release's rule).
    """
    num_contextual, num_donors = plan.anchors.shape[-1], plan.donors.shape[-1]
    if num_contextual == 0:
        return _rows(tokens, plan.kept)
    rows = _rows(tokens, torch.cat((plan.kept, plan.anchors, plan.donors), dim=-1))
    if num_donors == 0:
        return rows
    stay, donors = rows[..., :-num_donors, :], _widen(rows[..., -num_donors:, :])
    # A product with the membership matrix, not a scatter: on a GPU scatters add in an order that varies between runs.
    numbers = torch.arange(num_contextual, device=tokens.device).unsqueeze(-1)
    membership = (plan.owners.unsqueeze(-2) == numbers).to(donors.dtype)
    means = _product(membership, donors) / membership.sum(dim=-1, keepdim=True).clamp(min=1)
    stay[..., -num_contextual:, :].add_(means)
    return stay


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
        queries: (..., heads, M, D), of the last M tokens.
        keys: (..., kv_heads, N, D), of the whole sequence; a key head serves heads / kv_heads query heads.

    Returns:
        (..., M) float32 at least. Works through the queries tile by tile: no (heads, M, N) tensor comes into being.
    """
    heads, num_queries, width = queries.shape[-3:]
    kv_heads, num_keys = keys.shape[-3:-1]
    first = num_keys - num_queries
    grouped = _widen(queries).unflatten(-3, (kv_heads, -1)) * width**-0.5
    transposed = _widen(keys).transpose(-1, -2)
    tile = min(num_queries, max(1, _tile_elements(keys.device) // (heads * num_keys)))
    is_later = torch.ones(tile, tile, dtype=torch.bool, device=keys.device).triu(diagonal=1)
    received: Tensor | None = None
    for begin in reversed(range(0, num_queries, tile)):
        end = min(begin + tile, num_queries)
        count = end - begin
        # Causal: row i of the tile sees keys up to its own; nothing behind the tile's last row is computed. The query
        # heads of a key head are rows of one product.
        tall = grouped[..., begin:end, :].flatten(-3, -2)
        logits = _product(tall, transposed[..., : first + end])
        own = logits.unflatten(-2, (-1, count))[..., first + begin :]
        own.masked_fill_(is_later[:count, :count], float("-inf"))
        attention = logits.softmax(dim=-1)[..., first:].sum(dim=(-3, -2))
        if received is None:
            received = attention  # the last tile sees all columns
        else:
            received[..., :end].add_(attention)
    assert received is not None
    return received


def images_at_once(heads: int, num_queries: int, num_keys: int, width: int, device: torch.device) -> int:
    """How many images `attention_received` may take at once, so that neither weights nor keys are more than a tile."""
    return max(1, _tile_elements(device) // (heads * num_keys * max(num_queries, width)))


def _tile_elements(device: torch.device) -> int:
    return min(_TILE_ELEMENTS, _CPU_TILE_ELEMENTS) if device.type == "cpu" else _TILE_ELEMENTS


def _product(one: Tensor, other: Tensor) -> Tensor:
    """Matrix products of a batch, or of none: (..., A, B) by (..., B, C) -> (..., A, C).

    Always the batched kernel: the one for two matrices sums in another order. So does one for another arrangement in
    memory: operands must be arranged alike, however many there are.
    """
    count = math.prod(one.shape[:-2])
    product = torch.bmm(one.reshape(count, *one.shape[-2:]), other.reshape(count, *other.shape[-2:]))
    return product.view(*one.shape[:-1], other.shape[-1])


def _widen(tensor: Tensor) -> Tensor:
    """At least float32, contiguous. Sums and similarities in half precision would tie too often."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.to(wide, memory_format=torch.contiguous_format).contiguous()


def _rows(tokens: Tensor, index: Tensor) -> Tensor:
    """Gather rows along the second-last dimension: (..., N, D) by (..., M) -> (..., M, D)."""
    return tokens.gather(-2, index.unsqueeze(-1).expand(*index.shape, tokens.shape[-1]))
