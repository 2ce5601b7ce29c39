"""LLaVA-NeXT as a plain PyTorch module, under the names of published checkpoints, so that its state is the checkpoint.

What transformers' class cannot do cheaply, and this one can: many questions share one image in one sequence. Each
question attends to the image and to itself, and stands at the position that it has when it is asked alone.

Shapes: B images, V views (base and tiles) of an image, N = 257 tokens of a view, C tower width, P tokens before the
questions, L tokens of questions, D decoder width.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOTS = 9
MAX_IN_SLOT = 3
LONGEST_WORD = 6
WIDTHS = 16
"""Classes of a shape's width, each an eighth above the one before."""
ROW = 96
"""Questions stand in rows of so many tokens, none in two: a token is compared with its row, not with all others."""


class Linear(nn.Linear):
    """Computes in the dtype of its input; the weight stays float32."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class RmsNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class TowerAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, num_queries: int | None = None) -> Tensor:
        """Of the first `num_queries` tokens, or of all, what they gather from all."""
        q, k, v = self._split(self.q_proj(x[:, :num_queries])), self._split(self.k_proj(x)), self._split(self.v_proj(x))
        return self.out_proj(_attend(q, k, v).transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def attention_of_cls(self, x: Tensor) -> Tensor:
        """(B, heads, N) softmax of the CLS query over all tokens, float32; what VisionDrop scores patches by."""
        q, k = self._split(self.q_proj(x[:, :1])).float(), self._split(self.k_proj(x)).float()
        return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1).squeeze(2)


class TowerMlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = Linear(width, inner), Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))


class TowerLayer(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, eps = config["hidden_size"], config["layer_norm_eps"]
        self.self_attn = TowerAttention(width, config["num_attention_heads"])
        self.layer_norm1, self.layer_norm2 = LayerNorm(width, eps), LayerNorm(width, eps)
        self.mlp = TowerMlp(width, config["intermediate_size"])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class TowerEmbeddings(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, patch = config["hidden_size"], config["patch_size"]
        self.class_embedding = nn.Parameter(torch.randn(width) * 0.02)
        self.patch_embedding = nn.Conv2d(3, width, patch, patch, bias=False)
        self.position_embedding = nn.Embedding((config["image_size"] // patch) ** 2 + 1, width)

    def forward(self, pixels: Tensor, chosen: Tensor | None) -> Tensor:
        # The convolution as a product: patches do not overlap.
        patch = self.patch_embedding.kernel_size[0]
        views, channels, height, width = pixels.shape
        cells = pixels.view(views, channels, height // patch, patch, width // patch, patch)
        cells = cells.permute(0, 2, 4, 1, 3, 5).reshape(views, -1, channels * patch * patch)
        places = self.position_embedding.weight.to(pixels.dtype)
        at_cls, at_patches = places[0], places[1:].expand(views, -1, -1)
        if chosen is not None:
            cells = cells.gather(1, chosen.unsqueeze(-1).expand(-1, -1, cells.shape[-1]))
            at_patches = places[1:][chosen]
        x = cells @ self.patch_embedding.weight.flatten(1).T.to(pixels.dtype)
        cls = (self.class_embedding.to(x.dtype) + at_cls).expand(views, 1, -1)
        return torch.cat((cls, x + at_patches), dim=1)


class Tower(nn.Module):
    """CLIP's vision model."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, eps = config["hidden_size"], config["layer_norm_eps"]
        self.embeddings = TowerEmbeddings(config)
        self.pre_layrnorm = LayerNorm(width, eps)  # misspelt in every CLIP checkpoint
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(TowerLayer(config) for _ in range(config["num_hidden_layers"]))
        self.post_layernorm = LayerNorm(width, eps)

    def forward(self, pixels: Tensor, chosen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(views, 3, height, width) -> features of the layer before last (views, N, C), pooled CLS (views, C).

        With `chosen` (views, n) the tower sees these patches alone, and N is 1 + n.
        """
        x = self.pre_layrnorm(self.embeddings(pixels, chosen))
        for layer in self.encoder.layers[:-1]:
            x = layer(x)
        features = x
        # Of the last layer only CLS is wanted.
        last = self.encoder.layers[-1]
        cls = x[:, :1] + last.self_attn(last.layer_norm1(x), num_queries=1)
        cls = cls + last.mlp(last.layer_norm2(cls))
        return features, self.post_layernorm(cls).squeeze(1)

    def attention_of_cls(self, pixels: Tensor) -> Tensor:
        """(views, N) attention of CLS in the layer before last, summed over heads."""
        x = self.pre_layrnorm(self.embeddings(pixels, None))
        *before, layer = self.encoder.layers[:-1]
        for other in before:
            x = other(x)
        return layer.self_attn.attention_of_cls(layer.layer_norm1(x)).sum(1)


class DecoderAttention(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, dim = config["hidden_size"], config["head_dim"]
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.q_proj = Linear(width, self.heads * dim, bias=False)
        self.k_proj = Linear(width, self.kv_heads * dim, bias=False)
        self.v_proj = Linear(width, self.kv_heads * dim, bias=False)
        self.o_proj = Linear(self.heads * dim, width, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], prefix: int, mask: Tensor) -> Tensor:
        q = _rotate(self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2), rotation)
        k = _rotate(self.k_proj(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2), rotation)
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        group = self.heads // self.kv_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        image = _attend(q[:, :, :prefix], k[:, :, :prefix], v[:, :, :prefix], is_causal=True)
        text = _attend_in_rows(q[:, :, prefix:], k, v, prefix, mask)
        return self.o_proj(torch.cat((image, text), dim=2).transpose(1, 2).flatten(2))


class DecoderMlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (Linear(width, inner, bias=False) for _ in range(2))
        self.down_proj = Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, eps = config["hidden_size"], config["rms_norm_eps"]
        self.self_attn = DecoderAttention(config)
        self.mlp = DecoderMlp(width, config["intermediate_size"])
        self.input_layernorm, self.post_attention_layernorm = RmsNorm(width, eps), RmsNorm(width, eps)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], prefix: int, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation, prefix, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Projector(nn.Module):
    def __init__(self, tower_width: int, width: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = Linear(tower_width, width), Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x)))


class Heads(nn.Module):
    """What training asks of the tower besides the answers; none of it is part of the checkpoint.

    Patches name the shape and the colour that they show, the character in each of their halves, which of its word's
    characters that is, and their own row and column; CLS names all that its view shows. The last two are for the
    decoder: in the middle of it, the last token of a name in a question tells how many of that name each slot holds,
    and how wide the only one is.
    """

    def __init__(self, width: int, text_width: int, shapes: int, colors: int, characters: int) -> None:
        super().__init__()
        self.norm = LayerNorm(width)
        self.shape, self.color = Linear(width, shapes + 1), Linear(width, colors + 1)
        self.character = Linear(width, 2 * (characters + 1))
        self.index = Linear(width, 2 * (LONGEST_WORD + 1))
        self.row, self.column = Linear(width, 16), Linear(width, 16)
        present = shapes * colors + characters
        self.present = Linear(width, present)
        self.present_pooled = Linear(width, present)
        self.slots_norm = RmsNorm(text_width, 1e-5)
        self.slots = Linear(text_width, SLOTS * (MAX_IN_SLOT + 1))
        self.size = Linear(text_width, WIDTHS)


class Batch(NamedTuple):
    """What the network is fed; made by `training.batches`."""

    pixels: Tensor
    """(B, V, 3, 224, 224) normalised."""
    chosen: Tensor | None
    """(B, V, n) int64: the patches that the tower sees, ascending; None for all."""
    order: Tensor
    """(B, K) int64: the image's tokens in order, indices into its V * n patches; -1 is a newline."""
    before: Tensor
    """(A,) int64 token ids before the image."""
    after: Tensor
    """(Z,) int64 token ids between the image and the questions."""
    tokens: Tensor
    """(B, L) int64 of questions and answers, in rows of ROW."""
    offsets: Tensor
    """(B, L) int64, position of a token counted from the start of its question."""
    units: Tensor
    """(B, L) int64, number of the token's question; -1 is padding."""
    asked: Tensor
    """(M,) int64, places in the flattened tokens whose following token is to be told: those of answers, then others."""
    wanted: Tensor
    """(M,) int64, those tokens."""
    num_answers: int
    """How many of them are of answers."""
    mentions: Tensor
    """(N,) int64, places in the flattened tokens where a name ends."""


class Output(NamedTuple):
    """What the network says. Logits are float32."""

    projected: Tensor
    """(B, V, N - 1, D) patches as the decoder gets them."""

    logits: Tensor
    """(M, vocabulary) at `Batch.asked`."""
    slots: Tensor
    """(N, slots, numbers) at `Batch.mentions`: logits of how many of what is named each slot holds."""
    widths: Tensor
    """(N, widths) there: logits of how wide the only one is."""


class Network(nn.Module):
    def __init__(self, config: dict[str, Any], shapes: int, colors: int, characters: int) -> None:
        super().__init__()
        vision, text = config["vision_config"], config["text_config"]
        self.vision_tower = nn.Module()
        self.vision_tower.vision_model = Tower(vision)
        self.multi_modal_projector = Projector(vision["hidden_size"], text["hidden_size"])
        self.image_newline = nn.Parameter(torch.randn(text["hidden_size"]) * 0.02)
        self.language_model = nn.Module()
        self.language_model.model = nn.Module()
        model = self.language_model.model
        model.embed_tokens = nn.Embedding(text["vocab_size"], text["hidden_size"])
        model.layers = nn.ModuleList(DecoderLayer(text) for _ in range(text["num_hidden_layers"]))
        model.norm = RmsNorm(text["hidden_size"], text["rms_norm_eps"])
        self.language_model.lm_head = Linear(text["hidden_size"], text["vocab_size"], bias=False)
        self.heads = Heads(vision["hidden_size"], text["hidden_size"], shapes, colors, characters)
        frequencies = text["rope_theta"] ** (-torch.arange(0, text["head_dim"], 2).float() / text["head_dim"])
        self.register_buffer("_frequencies", frequencies, persistent=False)
        self._initialize(len(model.layers), vision["num_hidden_layers"])

    @property
    def tower(self) -> Tower:
        tower: Tower = self.vision_tower.vision_model
        return tower

    def see(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Features (B, V, N, C) and pooled CLS (B, V, C) of the batch's images."""
        chosen = None if batch.chosen is None else batch.chosen.flatten(0, 1)
        features, pooled = self.tower(batch.pixels.flatten(0, 1), chosen)
        shape = batch.pixels.shape[:2]
        return features.unflatten(0, shape), pooled.unflatten(0, shape)

    def forward(self, batch: Batch, features: Tensor) -> Output:
        projected = self.multi_modal_projector(features[:, :, 1:])
        patches = projected.flatten(1, 2)
        image = patches.gather(1, batch.order.clamp(min=0).unsqueeze(-1).expand(-1, -1, patches.shape[-1]))
        newline = self.image_newline.to(image.dtype)
        image = torch.where((batch.order < 0).unsqueeze(-1), newline, image)
        model = self.language_model.model
        number, dtype = len(image), image.dtype
        before = model.embed_tokens(batch.before).to(dtype).expand(number, -1, -1)
        after = model.embed_tokens(batch.after).to(dtype).expand(number, -1, -1)
        x = torch.cat((before, image, after, model.embed_tokens(batch.tokens).to(dtype)), dim=1)
        prefix = x.shape[1] - batch.tokens.shape[1]
        ahead = torch.arange(prefix, device=x.device).expand(number, -1)
        rotation = self._rotation(torch.cat((ahead, prefix + batch.offsets), dim=1), dtype)
        mask = _mask(batch.units)
        for number, layer in enumerate(model.layers, 1):
            x = layer(x, rotation, prefix, mask)
            if number == len(model.layers) // 2:
                halfway = x
        mentions = self.heads.slots_norm(_pick(halfway[:, prefix:], batch.mentions))
        logits = self.language_model.lm_head(model.norm(_pick(x[:, prefix:], batch.asked)))
        slots = self.heads.slots(mentions).unflatten(-1, (SLOTS, -1))
        return Output(projected, logits.float(), slots.float(), self.heads.size(mentions).float())

    def checkpoint(self) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in self.state_dict().items() if not name.startswith("heads.")}

    def _rotation(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        angles = positions.unsqueeze(-1).float() * self._frequencies
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def _initialize(self, decoder_layers: int, tower_layers: int) -> None:
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                if name.endswith("bias"):
                    nn.init.zeros_(parameter)
                continue
            fan_in = parameter[0].numel()
            if name.endswith("embed_tokens.weight"):
                nn.init.normal_(parameter, std=0.5)
            elif name.endswith("position_embedding.weight"):
                # As loud as a patch, or no patch would know its place for long.
                parameter.data[1:] = places(math.isqrt(len(parameter) - 1), parameter.shape[1])
                nn.init.normal_(parameter.data[:1], std=0.02)
            elif name.endswith("linear_1.weight"):
                # What comes out of the tower is some sixteen times louder than a word's embedding.
                nn.init.normal_(parameter, std=fan_in**-0.5 / 16)
            else:
                nn.init.normal_(parameter, std=fan_in**-0.5)
            if name.endswith(("out_proj.weight", "fc2.weight")):
                parameter.data.div_(math.sqrt(2 * tower_layers))
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.data.div_(math.sqrt(2 * decoder_layers))
            if name.startswith("heads.") or name.endswith("lm_head.weight"):
                parameter.data.mul_(0.1)


def places(side: int, width: int) -> Tensor:
    """(side x side, width): sines and cosines of row and column, of standard deviation 0.7."""
    steps = torch.arange(side).float()
    angles = steps[:, None] * (1.0 / 100 ** (torch.arange(width // 4) / (width // 4)))
    line = torch.cat((angles.sin(), angles.cos()), dim=1)
    rows, columns = line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)
    return torch.cat((rows, columns), dim=-1).flatten(0, 1)


def _pick(x: Tensor, places: Tensor) -> Tensor:
    """(B, L, D), (N,) places in B x L -> (N, D)."""
    return x.flatten(0, 1).index_select(0, places)


def _mask(units: Tensor) -> Tensor:
    """(B, S, ROW, ROW) bool: a token sees what came before in its question; all of a question stands in one row."""
    rows = units.unflatten(1, (-1, ROW))
    return (rows.unsqueeze(3) == rows.unsqueeze(2)) & torch.ones(ROW, ROW, dtype=torch.bool, device=units.device).tril()


def _attend_in_rows(q: Tensor, k: Tensor, v: Tensor, prefix: int, mask: Tensor) -> Tensor:
    """Attention of the questions, (B, heads, S x ROW, d): each row sees the prefix and, as `mask` says, itself."""
    rows = mask.shape[1]
    q, own_k, own_v = (x.unflatten(2, (rows, ROW)) for x in (q, k[:, :, prefix:], v[:, :, prefix:]))
    prefix_k, prefix_v = k[:, :, :prefix], v[:, :, :prefix]
    if q.is_cuda:
        keys, values = (
            torch.cat((before.unsqueeze(2).expand(-1, -1, rows, -1, -1), own), dim=3).transpose(1, 2).flatten(0, 1)
            for before, own in ((prefix_k, own_k), (prefix_v, own_v))
        )
        seen = F.pad(mask, (prefix, 0), value=True).flatten(0, 1).unsqueeze(1)
        made = F.scaled_dot_product_attention(q.transpose(1, 2).flatten(0, 1), keys, values, attn_mask=seen)
        return made.unflatten(0, (-1, rows)).transpose(1, 2).flatten(2, 3)
    q = q * q.shape[-1] ** -0.5
    on_prefix = (q.flatten(2, 3) @ prefix_k.transpose(-1, -2)).unflatten(2, (rows, ROW))
    on_row = q @ own_k.transpose(-1, -2) + torch.where(mask, 0.0, -1e4).to(q.dtype).unsqueeze(1)
    weights = torch.cat((on_prefix, on_row), dim=-1).softmax(-1)
    from_prefix = weights[..., :prefix].flatten(2, 3) @ prefix_v
    return from_prefix + (weights[..., prefix:] @ own_v).flatten(2, 3)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, is_causal: bool = False) -> Tensor:
    """Softmax attention; `mask` is what may be seen. On a CPU, plain products are twice as fast as SDPA, or more."""
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores + torch.where(mask, 0.0, -1e4).to(scores.dtype)
    return scores.softmax(-1) @ v


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cosine, sine = rotation
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-second, first), dim=-1) * sine
