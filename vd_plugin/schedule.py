"""Token arithmetic: how many visual tokens an image costs at every depth of the model.

Every count in the project comes from this file: placeholders, rows per stage, kept and saved tokens, prefill FLOPs.
Standard library only, so that the gateway, which has no torch, computes with the same code as the engine.

Words: a *budget* is what a client requests; resolving it for one image gives a *schedule*: the rows of each *stage*.
Stage 0 is the encoder's output, stages 1..3 begin after the decoder's boundaries. A budget of B means that an image
costs on average at most B visual tokens a decoder layer. A model without boundaries has stage 0 alone.

Sources: the shares are those of the schedule that VisionDrop's authors publish (arXiv 2506.22283; 48, 35, 26 and 19
rows, 32 on average); the stock counts follow transformers' LLaVA-NeXT processing and vLLM's `llava_next.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from reprlib import Repr
from typing import Any, Final, Literal, NamedTuple, TypeAlias, cast

RULE_VERSION: Final = 1
"""Version of the rule from budget to rows. Gateway and engine must agree on it."""

MIN_BUDGET: Final = 32
FULL: Final = "full"
PRESETS: Final[Mapping[str, int]] = {"low": 160, "medium": 320, "high": 640}

_STAGE_SHARES: Final = (48, 35, 26, 19)
"""Rows of stages 0..3 in the authors' published schedule, whose layer average is 32."""

_ROWS_PER_CONTEXTUAL: Final = 8
"""One row in eight, rounded up, is contextual: fits 42+6, 30+5, 22+4 and 16+3 of the published schedule."""

Budget: TypeAlias = int | Literal["full"]
"""A parsed budget: an integer from MIN_BUDGET up, or "full"."""


_BRIEF: Final = Repr()
_BRIEF.maxlist = _BRIEF.maxtuple = _BRIEF.maxdict = 5
_BRIEF.maxlevel = 3
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = 60


def quote(value: object) -> str:
    """A value as an error message quotes it: cut short, whatever its size, since it comes from a client."""
    return _BRIEF.repr(value)


class BudgetError(ValueError):
    """A budget, schedule or set of boundaries that cannot be served. The message is for the person who sent it."""


def accepted_budgets() -> str:
    """What a budget may be, as the tail of a sentence."""
    presets = ", ".join(f"{name!r} ({rows})" for name, rows in PRESETS.items())
    return f"an integer of at least {MIN_BUDGET}, or one of {presets}, {FULL!r} (no pruning)"


def parse_budget(value: object) -> Budget:
    """Turn what a client sent into a budget.

    Raises:
        BudgetError: `value` is none of the accepted forms (booleans, floats and numeric strings included).
    """
    if isinstance(value, str):
        if value == FULL:
            return FULL
        if value in PRESETS:
            return PRESETS[value]
    elif isinstance(value, int) and not isinstance(value, bool) and value >= MIN_BUDGET:
        return value
    raise BudgetError(f"a visual token budget must be {accepted_budgets()}; got {quote(value)}")


def read_budget(text: str) -> Budget:
    """The budget that a header or a command line spells: a decimal number or a preset's name.

    Raises:
        BudgetError: it is neither.
    """
    return parse_budget(int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else text)


class TokenSplit(NamedTuple):
    """What one stage keeps: `dominant` tokens as they are, and `contextual` ones that the rest is merged into."""

    dominant: int
    contextual: int

    @property
    def rows(self) -> int:
        return self.dominant + self.contextual


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """Sizes of the language model that prefill FLOPs depend on."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class Geometry:
    """All that a token count depends on besides image and budget. The engine publishes it, the gateway reads it.

    Sizes are in pixels, (height, width). `grid_pinpoints` is empty for models with a single view (LLaVA-1.5).
    """

    rule_version: int
    tile_size: int
    patch_size: int
    grid_pinpoints: tuple[tuple[int, int], ...]
    boundaries: tuple[int, ...]
    decoder: DecoderShape

    def __post_init__(self) -> None:
        depths = self.boundaries
        if depths and (
            len(depths) != len(_STAGE_SHARES) - 1
            or any(not 1 <= depth < self.decoder.num_layers for depth in depths)
            or any(a >= b for a, b in pairwise(depths))
        ):
            raise BudgetError(
                f"decoder boundaries must be three ascending depths from 1 to {self.decoder.num_layers - 1}, "
                f"or none; got {list(depths)}"
            )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Geometry:
        """Inverse of `to_dict`.

        Raises:
            ValueError: a key is missing or unknown.
        """
        _check_keys(cls, data)
        _check_keys(DecoderShape, data["decoder"])
        return cls(
            rule_version=data["rule_version"],
            tile_size=data["tile_size"],
            patch_size=data["patch_size"],
            grid_pinpoints=tuple((height, width) for height, width in data["grid_pinpoints"]),
            boundaries=tuple(data["boundaries"]),
            decoder=DecoderShape(**data["decoder"]),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def tile_patches(self) -> int:
        return (self.tile_size // self.patch_size) ** 2

    @property
    def tile_tokens(self) -> int:
        """Tokens that the encoder holds for a tile: CLS and every patch."""
        return 1 + self.tile_patches

    @property
    def layers_per_stage(self) -> tuple[int, ...]:
        edges = (0, *self.boundaries, self.decoder.num_layers)
        return tuple(end - start for start, end in pairwise(edges))

    def tile_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tiles that an image is cut into, the base view left out; (0, 0) without tiling."""
        if not self.grid_pinpoints:
            return 0, 0
        best_height, best_width = self._best_resolution(height, width)
        return best_height // self.tile_size, best_width // self.tile_size

    def num_tiles(self, height: int, width: int) -> int:
        """Views that the encoder sees: the base view and the tiles."""
        rows, columns = self.tile_grid(height, width)
        return 1 + rows * columns

    def full_tokens(self, height: int, width: int) -> int:
        """Visual tokens of the image in the stock model: base view, unpadded tiles, a newline for each patch row."""
        if not self.grid_pinpoints:
            return self.tile_patches
        side = self.tile_size // self.patch_size
        rows, columns = self.tile_grid(height, width)
        grid_height, grid_width = side * rows, side * columns
        # The rounding is that of transformers' `unpad_image`, which decides how many rows the model really makes.
        if width / height > grid_width / grid_height:
            grid_height -= 2 * ((grid_height - int(round(height * (grid_width / width), 7))) // 2)
        else:
            grid_width -= 2 * ((grid_width - int(round(width * (grid_height / height), 7))) // 2)
        return self.tile_patches + grid_height * grid_width + grid_height

    def max_full_tokens(self) -> int:
        """The largest stock count that any image can have: an image that fills a pinpoint needs no unpadding."""
        if not self.grid_pinpoints:
            return self.tile_patches
        return max(self.full_tokens(height, width) for height, width in self.grid_pinpoints)

    def max_num_tiles(self) -> int:
        return 1 + max(((h // self.tile_size) * (w // self.tile_size) for h, w in self.grid_pinpoints), default=0)

    def _best_resolution(self, height: int, width: int) -> tuple[int, int]:
        """The pinpoint that loses least of the image; the same choice as transformers' `select_best_resolution`."""

        def fit(pinpoint: tuple[int, int]) -> tuple[int, int]:
            scale = min(pinpoint[1] / width, pinpoint[0] / height)
            effective = min(int(width * scale) * int(height * scale), width * height)
            wasted = pinpoint[0] * pinpoint[1] - effective
            return effective, -wasted

        return max(self.grid_pinpoints, key=fit)


@dataclass(frozen=True, slots=True)
class Schedule:
    """A budget resolved for one image.

    `encoder` is what each of `num_tiles` tiles keeps, `decoder[k - 1]` what the image keeps at stage k;
    None stands for a stage that changes nothing.
    """

    budget: Budget | None
    """As requested; None if the rows were given explicitly."""
    full: int
    num_tiles: int
    encoder: TokenSplit | None
    decoder: tuple[TokenSplit | None, ...]
    layers_per_stage: tuple[int, ...]

    @property
    def rows(self) -> tuple[int, ...]:
        """Visual tokens of the image at each stage; rows[0] is the number of placeholders."""
        return stage_rows(self.full if self.encoder is None else self.num_tiles * self.encoder.rows, self.decoder)

    @property
    def num_placeholders(self) -> int:
        return self.rows[0]

    @property
    def is_full(self) -> bool:
        """Whether the image is served as the stock model would."""
        return self.encoder is None and not any(self.decoder)

    @property
    def effective_budget(self) -> Budget:
        """The budget after resolving: one that reaches the image's stock count is "full"."""
        return FULL if self.is_full or self.budget is None else self.budget

    @property
    def kept(self) -> int:
        """Visual tokens a decoder layer holds on average, rounded up."""
        total = sum(rows * layers for rows, layers in zip(self.rows, self.layers_per_stage, strict=True))
        return -(-total // sum(self.layers_per_stage))

    @property
    def saved(self) -> int:
        return self.full - self.kept


def resolve(geometry: Geometry, height: int, width: int, budget: Budget) -> Schedule:
    """Resolve a budget for an image of `height` x `width` pixels (rule version 1).

    Raises:
        BudgetError: the budget is smaller than one token for each tile of the image.
    """
    full = geometry.full_tokens(height, width)
    num_tiles = geometry.num_tiles(height, width)
    stages = geometry.layers_per_stage
    if budget == FULL or budget >= full:
        return Schedule(budget, full, num_tiles, None, (None,) * (len(stages) - 1), stages)

    targets = _stage_targets(budget, stages)
    encoder = None
    rows = full
    if targets[0] < full:
        per_tile = targets[0] // num_tiles
        if per_tile < 1:
            raise BudgetError(
                f"a visual token budget of {budget} leaves less than one token for each of this image's "
                f"{num_tiles} tiles; raise it"
            )
        encoder = _split_evenly(per_tile) if per_tile < geometry.tile_tokens else TokenSplit(geometry.tile_tokens, 0)
        rows = num_tiles * encoder.rows

    decoder: list[TokenSplit | None] = []
    for target in targets[1:]:
        decoder.append(_split_evenly(target) if target < rows else None)
        rows = min(target, rows)
    return Schedule(budget, full, num_tiles, encoder, tuple(decoder), stages)


def resolve_explicit(geometry: Geometry, height: int, width: int, splits: object) -> Schedule:
    """Resolve rows that were given as (dominant, contextual) pairs: the first for each tile, the others for the image.

    Raises:
        BudgetError: wrong number or form of pairs, or a stage that would have more rows than there are.
    """
    stages = geometry.layers_per_stage
    if not isinstance(splits, Sequence) or isinstance(splits, str) or len(splits) != len(stages):
        raise BudgetError(
            f"a visual token schedule must be {len(stages)} pair(s) [dominant, contextual], one for each tile at the "
            f"encoder and one for the image at each decoder boundary of this engine "
            f"({list(geometry.boundaries) or 'none'}); got {quote(splits)}"
        )
    pairs = [_parse_split(split) for split in splits]
    full = geometry.full_tokens(height, width)
    num_tiles = geometry.num_tiles(height, width)
    encoder = pairs[0]
    if encoder.dominant < 1:
        raise BudgetError("the encoder's dominant tokens include CLS, which is always kept: give at least 1")
    if encoder.rows > geometry.tile_tokens or num_tiles * encoder.rows > full:
        raise BudgetError(
            f"a visual token schedule of {encoder.rows} rows a tile does not prune this image: it has "
            f"{num_tiles} tile(s) of {geometry.tile_tokens} tokens, and {full} tokens in the stock model"
        )
    rows = num_tiles * encoder.rows
    decoder: list[TokenSplit | None] = []
    for split in pairs[1:]:
        if not 1 <= split.rows <= rows:
            raise BudgetError(f"a stage of {split.rows} rows cannot follow one of {rows}")
        decoder.append(split if split.rows < rows else None)
        rows = split.rows
    return Schedule(None, full, num_tiles, encoder, tuple(decoder), stages)


def stage_rows(placeholders: int, decoder: Sequence[TokenSplit | None]) -> tuple[int, ...]:
    """Rows of an image at every stage, from its rows at the encoder's output and what the decoder's stages keep."""
    rows = [placeholders]
    for split in decoder:
        rows.append(rows[-1] if split is None else split.rows)
    return tuple(rows)


def prefill_flops(geometry: Geometry, text_tokens: int, images: Sequence[Schedule]) -> int:
    """Floating-point operations of the decoder's layers over one prompt (2 for each multiply-add, causal attention).

    Left out, because pruning does not change them: embeddings, the output head and the vision tower.
    """
    shape = geometry.decoder
    attention_width = shape.num_heads * shape.head_dim
    linear = shape.hidden_size * (
        2 * attention_width + 2 * shape.num_kv_heads * shape.head_dim + 3 * shape.intermediate_size
    )
    total = 0
    for stage, num_layers in enumerate(geometry.layers_per_stage):
        tokens = text_tokens + sum(image.rows[stage] for image in images)
        # Query i meets i + 1 keys, once for the scores and once for the values.
        attention = tokens * (tokens + 1) * attention_width
        total += num_layers * 2 * (tokens * linear + attention)
    return total


def default_boundaries(num_layers: int) -> tuple[int, ...]:
    """After a quarter, a half and three quarters of the layers; none in a decoder of fewer than four."""
    if num_layers < 4:
        return ()
    return num_layers // 4, num_layers // 2, 3 * num_layers // 4


def _stage_targets(budget: int, layers_per_stage: Sequence[int]) -> tuple[int, ...]:
    """Rows of each stage before rounding to tiles: the published shares, scaled to a layer average of `budget`."""
    shares = _STAGE_SHARES[: len(layers_per_stage)]
    weighted = sum(share * layers for share, layers in zip(shares, layers_per_stage, strict=True))
    return tuple(budget * share * sum(layers_per_stage) // weighted for share in shares)


def _split_evenly(rows: int) -> TokenSplit:
    contextual = min(-(-rows // _ROWS_PER_CONTEXTUAL), rows - 1)
    return TokenSplit(rows - contextual, contextual)


def _parse_split(split: object) -> TokenSplit:
    if (
        isinstance(split, Sequence)
        and len(split) == 2
        and all(isinstance(count, int) and not isinstance(count, bool) and count >= 0 for count in split)
    ):
        return TokenSplit(*cast("Sequence[int]", split))
    raise BudgetError(f"a stage of a visual token schedule must be a pair [dominant, contextual]; got {quote(split)}")


def _check_keys(cls: type[Any], data: Mapping[str, Any]) -> None:
    expected = {field.name for field in fields(cls)}
    if set(data) != expected:
        raise ValueError(f"{cls.__name__} needs exactly the keys {sorted(expected)}; got {sorted(data)}")
