"""Stage 0: prune what the CLIP tower returns, each tile by itself, and put an image's tokens in order.

VisionDrop, arXiv 2506.22283, section 3.2. The score of a patch is the attention that the CLS token pays to it in the
layer whose output LLaVA selects; the key metric is that layer's keys averaged over heads. vLLM's attention returns no
weights, so the one query row that is needed is computed from the layer's own projections; no other layer changes.

Shapes: T tiles, N tokens of a tile (CLS and the patches), H heads on this rank, C tower width, D any width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from vllm.model_executor.models.clip import CLIPEncoderLayer, CLIPVisionModel

from vd_plugin.schedule import TokenSplit
from vd_plugin.selection import apply, select
from vd_plugin.tensor_parallel import sum_over_ranks


class TileFeatures(NamedTuple):
    """The tower's view of T tiles."""

    tokens: Tensor
    """(T, N, C) output of the selected layer, CLS first."""
    scores: Tensor
    """(T, N - 1) float32, attention of CLS to each patch, summed over heads."""
    keys: Tensor
    """(T, N - 1, C / heads) float32, key projections of the patches, averaged over heads."""


class PrunedTiles(NamedTuple):
    tokens: Tensor
    """(T, rows, D): CLS, kept patches in index order, contextual tokens."""
    kept: Tensor
    """(T, dominant - 1) int64, indices of the kept patches, 0..N-2."""
    anchors: Tensor
    """(T, contextual) int64, indices of the patches that the contextual tokens grew from."""


def run_tower(tower: CLIPVisionModel, pixel_values: Tensor) -> TileFeatures:
    """The tower's forward over (T, 3, height, width), keeping what scores and metric are made of.

    Same steps as `CLIPVisionTransformer.forward` and `CLIPEncoderLayer.forward` of vLLM 0.32; a test holds them equal.
    """
    vision = tower.vision_model
    hidden = vision.pre_layrnorm(vision.embeddings(pixel_values))
    for layer in vision.encoder.layers[:-1]:
        hidden = layer(hidden)
    hidden, query, key = _run_last_layer(vision.encoder.layers[-1], hidden)
    if vision.post_layernorm is not None:
        hidden = vision.post_layernorm(hidden)

    attention = vision.encoder.layers[-1].self_attn
    heads = attention.num_heads_per_partition
    query = query[:, 0].unflatten(-1, (heads, -1)).float()
    key = key.unflatten(-1, (heads, -1)).float()
    weights = (torch.einsum("thd,tnhd->thn", query, key) * attention.scale).softmax(dim=-1)
    scores, keys = weights.sum(dim=1), key.sum(dim=2)
    if attention.tp_size > 1:  # else the tower runs whole on every rank
        scores, keys = sum_over_ranks(scores, keys)
    return TileFeatures(hidden, scores[:, 1:], keys[:, 1:] / attention.num_heads)


def prune_tiles(features: TileFeatures, split: TokenSplit) -> PrunedTiles:
    """Keep `split` of every tile. CLS is always kept and counts as one of the dominant tokens."""
    cls, patches = features.tokens[:, :1], features.tokens[:, 1:]
    dominant = split.dominant - 1
    if dominant + split.contextual == 0:
        none = torch.empty(cls.shape[0], 0, dtype=torch.int64, device=cls.device)
        return PrunedTiles(cls, none, none)
    plan = select(features.scores, features.keys, dominant, split.contextual)
    return PrunedTiles(torch.cat((cls, apply(plan, patches)), dim=1), plan.kept, plan.anchors)


def order_image(tokens: Tensor, kept: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """One image's sequence: (T, rows, D) pruned tiles, base tile first -> (T * rows, D)."""
    return tokens.flatten(0, 1)[image_order(kept, tokens.shape[1], grid, side)]


def image_order(kept: Tensor, num_rows: int, grid: tuple[int, int], side: int) -> Tensor:
    """(T * rows,) int64: for each row of an image's sequence, its place among the tiles' rows laid end to end.

    All of the base tile, then the other tiles' kept patches in reading order over the whole grid, then their CLS
    tokens, then their contextual tokens, both in tile order (the release's order; no newlines, no unpadding).

    Args:
        kept: (T, K) patch indices of each tile's kept patches.
        num_rows: rows of a tile: CLS, kept patches, contextual tokens.
        grid: rows and columns of tiles, the base tile left out.
        side: patches along a tile's edge.
    """
    num_tiles, num_kept = kept.shape
    places = torch.arange(num_tiles * num_rows, device=kept.device).view(num_tiles, num_rows)
    base, tiles = places[0], places[1:]
    if num_tiles == 1:
        return base
    tile = torch.arange(num_tiles - 1, device=kept.device).unsqueeze(1)
    row = tile // grid[1] * side + kept[1:] // side
    column = tile % grid[1] * side + kept[1:] % side
    reading_order = (row * (grid[1] * side) + column).flatten().argsort()
    patches = tiles[:, 1 : 1 + num_kept].flatten()[reading_order]
    return torch.cat((base, patches, tiles[:, 0], tiles[:, 1 + num_kept :].flatten()))


def _run_last_layer(layer: CLIPEncoderLayer, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The layer's forward, and its query and key projections: (T, N, C) -> three of (T, N, C on this rank)."""
    attention = layer.self_attn
    qkv, _ = attention.qkv_proj(layer.layer_norm1(hidden))
    query, key, value = qkv.chunk(3, dim=-1)
    attended, _ = attention.out_proj(attention.attn(query, key, value))
    hidden = hidden + attended
    return hidden + layer.mlp(layer.layer_norm2(hidden)), query, key
