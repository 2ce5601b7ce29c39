"""The method, slow and obvious: plain torch and Python loops, no vLLM. An oracle for tests, never for the product.

Written from the method's description alone (arXiv 2506.22283, and the observed behaviour of the authors' release), so
that it shares no code, and hopefully no mistake, with `vd_plugin/`. Token counts are not computed here, they are
counted: rows of real tensors, unpadded by transformers' own `unpad_image`.

    merge_plan, merge_tokens   one stage: which tokens stay, which are merged into which
    encoder_stage              stage 0 on one tile;  image_sequence: the tiles' rows in LLaVA-NeXT's order
    decoder_scores             how much an image looks at each of its own tokens
    Reference                  a whole unbatched LLaVA or LLaVA-NeXT: tower, projector, decoder, greedy decoding

Shapes: T tiles, n tokens, D width, H heads, d head width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

Pair = tuple[int, int]
"""(dominant, contextual)."""


class ReferencePlan(NamedTuple):
    kept: list[int]
    anchors: list[int]
    donors: list[int]
    owners: list[int]


def merge_plan(scores: Tensor, keys: Tensor, dominant: int, contextual: int) -> ReferencePlan:
    """One stage's decision. scores: (n,), higher = keep; keys: (n, d)."""
    values = scores.tolist()
    order = sorted(range(len(values)), key=lambda index: (-values[index], index))
    kept = sorted(order[:dominant])
    rest = [index for index in range(len(values)) if index not in kept]

    if contextual == 0:
        return ReferencePlan(kept, [], rest, [])
    step = max(1, len(rest) // contextual)
    anchors = rest[::step][:contextual]
    donors = [index for index in rest if index not in anchors]
    unit = [key / key.norm() for key in keys]
    owners = []
    for donor in donors:
        similarities = [float(unit[donor] @ unit[anchor]) for anchor in anchors]
        owners.append(similarities.index(max(similarities)))
    return ReferencePlan(kept, anchors, donors, owners)


def merge_tokens(plan: ReferencePlan, tokens: Tensor) -> Tensor:
    """(n, D) -> (dominant + contextual, D): the kept ones, then each anchor plus the mean of what joined it."""
    rows = [tokens[index] for index in plan.kept]
    for number, anchor in enumerate(plan.anchors):
        joined = [tokens[donor] for donor, owner in zip(plan.donors, plan.owners, strict=False) if owner == number]
        rows.append(tokens[anchor] + torch.stack(joined).mean(0) if joined else tokens[anchor])
    return torch.stack(rows)


class TileRows(NamedTuple):
    tokens: Tensor
    """(dominant + contextual, D): CLS, kept patches ascending, contextual."""
    patches: list[int]
    """Which patches were kept, 0-based and without CLS, ascending."""
    plan: ReferencePlan
    """Over the patches: CLS is not in it."""


def encoder_stage(hidden: Tensor, cls_attention: Tensor, keys: Tensor, dominant: int, contextual: int) -> TileRows:
    """Prune one tile.

    hidden: (1 + n, D), row 0 is CLS; cls_attention: (H, 1 + n), the CLS query's softmaxed row of that layer;
    keys: (H, 1 + n, d), the same layer's key projections, or their mean over heads (1 + n, d).
    """
    metric = keys.mean(0) if keys.dim() == 3 else keys
    plan = merge_plan(cls_attention.sum(0)[1:], metric[1:], dominant - 1, contextual)
    return TileRows(torch.cat([hidden[:1], merge_tokens(plan, hidden[1:])]), plan.kept, plan)


def image_sequence(tiles: Sequence[TileRows], rows: Sequence[Tensor], grid: Pair, side: int) -> Tensor:
    """Order the rows of an image's tiles. `rows[t]` belong to `tiles[t]` (projected or not); `grid` counts tiles.

    The base tile whole, then of the others the patches row by row over the whole grid, the CLS, the contextual rows.
    """
    patches: list[tuple[int, int, Tensor]] = []
    heads: list[Tensor] = []
    tails: list[Tensor] = []
    for number, (tile, tile_rows) in enumerate(zip(tiles[1:], rows[1:], strict=True)):
        heads.append(tile_rows[0])
        for offset, patch in enumerate(tile.patches):
            y = number // grid[1] * side + patch // side
            x = number % grid[1] * side + patch % side
            patches.append((y, x, tile_rows[1 + offset]))
        tails.extend(tile_rows[1 + len(tile.patches) :])
    patches.sort(key=lambda patch: patch[:2])
    return torch.stack([*rows[0], *(row for _, _, row in patches), *heads, *tails])


def decoder_scores(queries: Tensor, keys: Tensor, start: int, count: int) -> Tensor:
    """Score of the image tokens start .. start + count. queries: (H, n, d), keys: (H_kv, n, d), both rotated."""
    groups = queries.shape[0] // keys.shape[0]
    total = torch.zeros(count, dtype=queries.dtype)
    for head in range(queries.shape[0]):
        for position in range(start, start + count):
            seen = keys[head // groups, : position + 1]
            row = torch.softmax(seen @ queries[head, position] / math.sqrt(queries.shape[-1]), dim=0)
            total[: position + 1 - start] += row[start:]
    return total / (queries.shape[0] * count)


@dataclass
class Image:
    """An image ready for the tower, and what is to be kept of it."""

    pixel_values: Tensor
    """(T, 3, side, side): base view first, then the tiles row-major."""
    size: Pair = (336, 336)
    """(height, width) of the image itself."""
    encoder: Pair | None = None
    """Per tile; None = the stock model's rows."""
    decoder: Sequence[Pair | None] = ()
    """Per boundary; None, or a missing one, changes nothing."""


@dataclass
class Span:
    """Where an image lies in the sequence that the next layer sees."""

    start: int
    count: int


@dataclass
class StageRecord:
    """What one stage did to one image."""

    hidden_in: Tensor
    scores: Tensor
    metric: Tensor
    plan: ReferencePlan
    start: int


@dataclass
class Result:
    token_ids: list[int]
    logits: Tensor
    """(steps, V), the first from the prompt."""
    image_rows: list[int]
    """Rows of each image at the encoder's output, that is placeholders."""
    prefill_lengths: list[int]
    """Sequence length that each layer saw in the prompt."""
    decode_positions: list[list[int]] = field(default_factory=list)
    """Per decode step, the new token's position in each layer."""
    stages: dict[tuple[int, int], StageRecord] = field(default_factory=dict)
    """(boundary number from 1, image number from 0) -> record."""

    @property
    def logprobs(self) -> Tensor:
        return torch.log_softmax(self.logits.float(), dim=-1)


class Reference:
    """LLaVA-1.5 or LLaVA-NeXT from a checkpoint folder, one prompt at a time.

    Modules are transformers' (tower, projector, norms, linear layers); order of tokens, attention, caches and pruning
    are written out here. `grid_pinpoints` is empty for LLaVA-1.5.
    """

    def __init__(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        from transformers import AutoModelForImageTextToText

        self.folder = Path(folder)
        model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()
        self.hf_model = model
        self.config = model.config
        self.tower = model.model.vision_tower
        self.projector = model.model.multi_modal_projector
        self.language_model = model.model.language_model
        self.lm_head = model.lm_head
        self.is_next = model.config.model_type == "llava_next"
        self.newline = model.model.image_newline if self.is_next else None
        self.grid_pinpoints = [tuple(pair) for pair in model.config.image_grid_pinpoints] if self.is_next else []
        self.tile_size: int = model.config.vision_config.image_size
        self.side: int = self.tile_size // model.config.vision_config.patch_size
        self.num_layers: int = model.config.text_config.num_hidden_layers

    # Vision

    def prepare(self, picture: Any, encoder: Pair | None = None, decoder: Sequence[Pair | None] = ()) -> Image:
        """A PIL image through the checkpoint's own image processor (PIL back end: resized as the authors do)."""
        from transformers import AutoImageProcessor

        processor = AutoImageProcessor.from_pretrained(self.folder, backend="pil")
        pixels = torch.as_tensor(processor(picture, return_tensors="pt")["pixel_values"])
        tiles = pixels.reshape(-1, *pixels.shape[-3:])
        return Image(tiles, (picture.height, picture.width), encoder, decoder)

    def tile_grid(self, image: Image) -> Pair:
        """Rows and columns of tiles, as transformers chooses them."""
        from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

        if not self.is_next or len(image.pixel_values) == 1:
            return 0, 0
        grid = get_anyres_image_grid_shape(image.size, [list(pair) for pair in self.grid_pinpoints], self.tile_size)
        assert 1 + grid[0] * grid[1] == len(image.pixel_values)
        return grid

    @torch.inference_mode()
    def tower_layer(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The layer that LLaVA selects: output (T, 1 + n, C), CLS attention (T, H, 1 + n), keys (T, H, 1 + n, d)."""
        states = self.tower(pixel_values.to(self.tower.dtype), output_hidden_states=True).hidden_states
        selected = self.config.vision_feature_layer
        index = selected if selected >= 0 else len(states) + selected
        layer = self.tower.encoder.layers[index - 1]
        x = layer.layer_norm1(states[index - 1])
        attention = layer.self_attn
        heads, width = attention.num_heads, attention.head_dim
        queries = attention.q_proj(x[:, 0]).unflatten(-1, (heads, width))
        keys = attention.k_proj(x).unflatten(-1, (heads, width)).transpose(1, 2)
        logits = torch.einsum("thd,thnd->thn", queries, keys).float() / math.sqrt(width)
        return states[index], torch.softmax(logits, dim=-1), keys

    @torch.inference_mode()
    def image_rows(self, image: Image) -> Tensor:
        """(n, D): what replaces the image's placeholder."""
        return self._stock_rows(image) if image.encoder is None else self._pruned_rows(image, image.encoder)

    def _pruned_rows(self, image: Image, pair: Pair) -> Tensor:
        hidden, attention, keys = self.tower_layer(image.pixel_values)
        tiles = [encoder_stage(*tile, *pair) for tile in zip(hidden, attention, keys, strict=True)]
        rows = [self.projector(tile.tokens) for tile in tiles]
        if not self.is_next:
            return rows[0]
        if len(rows) == 1:
            return torch.cat([rows[0], self.newline[None]])
        return image_sequence(tiles, rows, self.tile_grid(image), self.side)

    def _stock_rows(self, image: Image) -> Tensor:
        from transformers.models.llava_next.modeling_llava_next import unpad_image

        hidden, _, _ = self.tower_layer(image.pixel_values)
        rows = self.projector(hidden[:, 1:])
        if not self.is_next:
            return rows[0]
        if len(rows) == 1:
            return torch.cat([rows[0], self.newline[None]])
        height, width = self.tile_grid(image)
        side = self.side
        grid = rows[1:].reshape(height, width, side, side, -1).permute(4, 0, 2, 1, 3)
        grid = unpad_image(grid.reshape(-1, height * side, width * side), image.size)
        lines = [torch.cat([grid[:, y].T, self.newline[None]]) for y in range(grid.shape[1])]
        return torch.cat([rows[0], *lines])

    # Language

    def tokenize(self, prompt: str) -> list[int]:
        """Ids of a prompt that is complete: nothing is added, and each image's placeholder stands once."""
        from transformers import AutoTokenizer

        ids: list[int] = AutoTokenizer.from_pretrained(self.folder)(prompt, add_special_tokens=False)["input_ids"]
        return ids

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Sequence[int],
        images: Sequence[Image] = (),
        boundaries: Sequence[int] = (),
        num_tokens: int = 8,
    ) -> Result:
        """Greedy decoding, end-of-sequence disabled. An image stands for one id: the image token's, or a negative one.

        `boundaries[k - 1]` layers have run when stage k prunes.
        """
        embeddings, spans = self._embed(list(input_ids), [self.image_rows(image) for image in images])
        result = Result([], torch.empty(0), [span.count for span in spans], [])
        caches: list[tuple[Tensor, Tensor]] = []

        x = embeddings
        for number, layer in enumerate(self.language_model.layers):
            if number in boundaries:
                stage = 1 + list(boundaries).index(number)
                x = self._decoder_stage(stage, layer, x, images, spans, result)
            result.prefill_lengths.append(len(x))
            x, cache = self._run_layer(layer, x, None)
            caches.append(cache)
        logits = [self._logits(x[-1])]

        while True:
            result.token_ids.append(int(logits[-1].argmax()))
            if len(logits) == num_tokens:
                break
            x = self.language_model.embed_tokens(torch.tensor(result.token_ids[-1:]))
            result.decode_positions.append([len(keys[0]) for keys, _ in caches])
            for number, layer in enumerate(self.language_model.layers):
                x, caches[number] = self._run_layer(layer, x, caches[number])
            logits.append(self._logits(x[-1]))
        result.logits = torch.stack(logits)
        return result

    def _embed(self, input_ids: list[int], rows: list[Tensor]) -> tuple[Tensor, list[Span]]:
        parts: list[Tensor] = []
        spans: list[Span] = []
        waiting = list(rows)
        for token in input_ids:
            if token < 0 or token == self.config.image_token_id:
                image = waiting.pop(0)
                spans.append(Span(sum(map(len, parts)), len(image)))
                parts.append(image)
            else:
                parts.append(self.language_model.embed_tokens(torch.tensor([token])))
        if waiting:
            raise ValueError(f"{len(waiting)} image(s) without a placeholder in the prompt")
        return torch.cat(parts), spans

    def _decoder_stage(
        self, stage: int, layer: Any, x: Tensor, images: Sequence[Image], spans: list[Span], result: Result
    ) -> Tensor:
        """Prune the images from left to right, each seeing the earlier ones pruned, like a prompt that ends with it."""
        for number, (image, span) in enumerate(zip(images, spans, strict=True)):
            pair = image.decoder[stage - 1] if stage <= len(image.decoder) else None
            if pair is None or sum(pair) >= span.count:
                continue
            end = span.start + span.count
            queries, keys, _ = self._project(layer, x[:end], torch.arange(end))
            scores = decoder_scores(queries.float(), keys.float(), span.start, span.count)
            metric = keys.mean(0)[span.start : end]
            plan = merge_plan(scores, metric, *pair)
            result.stages[stage, number] = StageRecord(x, scores, metric, plan, span.start)
            x = torch.cat([x[: span.start], merge_tokens(plan, x[span.start : end]), x[end:]])
            dropped = span.count - sum(pair)
            span.count -= dropped
            for later in spans[number + 1 :]:
                later.start -= dropped
        return x

    def _project(self, layer: Any, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (H, n, d) and keys (H_kv, n, d), and values (H_kv, n, d)."""
        attention = layer.self_attn
        normed = layer.input_layernorm(x)
        queries, keys, values = (
            project(normed).unflatten(-1, (-1, attention.head_dim)).transpose(0, 1)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        cos, sin = (part[0] for part in self.language_model.rotary_emb(x[None], positions[None]))
        return _rotate(queries, cos, sin), _rotate(keys, cos, sin), values

    def _run_layer(
        self, layer: Any, x: Tensor, cache: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One decoder layer over the new rows `x`; their positions continue this layer's own cache."""
        past = 0 if cache is None else cache[0].shape[1]
        positions = torch.arange(past, past + len(x))
        queries, keys, values = self._project(layer, x, positions)
        if cache is not None:
            keys = torch.cat([cache[0], keys], dim=1)
            values = torch.cat([cache[1], values], dim=1)
        groups = len(queries) // len(keys)
        hidden = torch.arange(keys.shape[1])[None, :] > positions[:, None]
        outputs = []
        for head, query in enumerate(queries):
            weights = (query @ keys[head // groups].T).float() / math.sqrt(query.shape[-1])
            weights = torch.softmax(weights.masked_fill(hidden, -torch.inf), dim=-1).to(x.dtype)
            outputs.append(weights @ values[head // groups])
        x = x + layer.self_attn.o_proj(torch.cat(outputs, dim=-1))
        return x + layer.mlp(layer.post_attention_layernorm(x)), (keys, values)

    def _logits(self, x: Tensor) -> Tensor:
        return self.lm_head(self.language_model.norm(x))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in Llama's layout: the first half of the width pairs with the second. cos, sin: (n, d)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
