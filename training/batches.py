"""Batches: scenes drawn and asked about by worker processes, cut into views on the device.

A worker makes whole batches, one size of image and one number of tokens each, so that nothing is padded but the text.
Everything follows from the number of the step; held-out scenes have seeds that training never reaches.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from training.network import MAX_IN_SLOT, ROW, SLOTS, WIDTHS, Batch
from vd_plugin.demo import MODEL_PATH
from vd_plugin.demo.questions import Question, choose, make_questions
from vd_plugin.demo.scenes import COLORS, SHAPES, Scene, draw, draw_shape, get_font, label_font, make_scene, text_origin
from vd_plugin.demo.words import TRAINING_WORDS
from vd_plugin.model_config import read_model_config
from vd_plugin.options import read_geometry
from vd_plugin.tools.provenance import Origin, stock_origins

GEOMETRY = read_geometry(read_model_config(MODEL_PATH))
TILE, PATCH = GEOMETRY.tile_size, GEOMETRY.patch_size
SIDE = TILE // PATCH
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MAX_THINGS = 28
_PADDING = (3, 0, -1, -100)
"""Of tokens, offsets, units and targets."""
HELD_OUT = 1 << 40
"""Scenes from this seed on are for evaluation."""

SIZES = (
    ((448, 448), 0.60),
    ((448, 224), 0.06),
    ((224, 448), 0.06),
    ((672, 224), 0.04),
    ((224, 672), 0.04),
    ((448, 336), 0.08),
    ((336, 448), 0.08),
    ((400, 400), 0.04),
)
"""(width, height) of images and how often they come."""

_SYSTEM = (
    "You are a helpful assistant.\n",
    "Answer briefly.\n",
    "You are a careful assistant that looks at images. Answer with few words.\n",
)


@dataclass(frozen=True)
class Plan:
    """What a batch is made of."""

    width: int
    height: int
    tiled: bool
    """Whether the image is cut into tiles; without, the decoder sees the base view alone."""
    images: int
    keep: float
    """Share of each view's patches that the network sees."""
    questions: int
    small: bool = True
    """Whether there are small shapes and signs."""


def plan_for(step: int, progress: float, scale: float = 1.0) -> Plan:
    """The curriculum: the tower alone, base views of small images, tiles with part of their patches, whole images."""
    rng = random.Random(f"plan {step}")
    (width, height), *_ = rng.choices([size for size, _ in SIZES], [share for _, share in SIZES])
    if progress < 0.22:
        return Plan(width, height, True, max(1, round(12 * scale)), rng.choice((0.15, 0.15, 0.3)), 0)
    base_only = max(0.06, 1 - max(0.0, progress - 0.48) / 0.06) if progress < 0.84 else 0.0
    if rng.random() < base_only:
        return Plan(224, 224, False, max(1, round(16 * scale)), rng.choice((0.35, 0.5)), 16, small=False)
    whole = rng.random() < (0.0 if progress < 0.66 else 0.2 if progress < 0.84 else 0.6)
    keep = 1.0 if whole else rng.choice((0.2, 0.3, 0.45) if progress < 0.66 else (0.2, 0.3, 0.45, 0.65))
    return Plan(width, height, True, max(1, round((6 if whole else 10) * scale)), keep, 16)


@dataclass
class Raw:
    """A batch as a worker sends it: bytes and small integers."""

    plan: Plan
    images: Tensor
    """(B, height, width, 3) uint8."""
    things: Tensor
    """(B, height, width) uint8, number of the shape that is there, from 1."""
    characters: Tensor
    """(B, height, width) uint8, index into CHARACTERS from 1, plus 36 for each character before it in its word."""
    shapes: Tensor
    """(B, MAX_THINGS + 1) int64, index into SHAPES of each shape."""
    colors: Tensor
    before: Tensor
    after: Tensor
    tokens: Tensor
    offsets: Tensor
    units: Tensor
    targets: Tensor
    mentions: Tensor
    """(B, L, SLOTS + 1) int8: where a name ends in a question, how many of it each slot holds, and the class of its
    width if it is the only one; elsewhere -1."""
    questions: list[list[Question]]
    """Only for evaluation, else empty."""


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL_PATH / "tokenizer.json"))


@functools.lru_cache(maxsize=100_000)
def _encode(text: str) -> tuple[int, ...]:
    return tuple(tokenizer().encode(text, add_special_tokens=False).ids)


def make_raw(plan: Plan, first_seed: int, *, evaluation: bool = False) -> Raw:
    rng = random.Random(f"batch {first_seed}")
    scenes = [_make_scene(plan, first_seed + i, evaluation or i % 4 == 0) for i in range(plan.images)]
    images, things, characters = [], [], []
    shapes = torch.zeros(plan.images, MAX_THINGS + 1, dtype=torch.int64)
    colors = torch.zeros(plan.images, MAX_THINGS + 1, dtype=torch.int64)
    names = list(COLORS)
    rows = []
    asked: list[list[Question]] = []
    for i, scene in enumerate(scenes):
        images.append(np.asarray(draw(scene)))
        thing_map, character_map = label_maps(scene)
        things.append(np.asarray(thing_map))
        characters.append(np.asarray(character_map))
        for number, thing in enumerate(scene.things, 1):
            shapes[i, number], colors[i, number] = SHAPES.index(thing.shape), names.index(thing.color)
        questions = choose(make_questions(scene, scene.seed), plan.questions, scene.seed) if plan.questions else []
        told = [] if evaluation or not questions else [inventory(scene)]
        rows.append(_pack([*told, *questions], rng, turns=not evaluation))
        asked.append(questions)
    length = max(len(row[0]) for row in rows)
    columns = []
    for position, padding in enumerate(_PADDING):
        columns.append(torch.tensor([row[position] + [padding] * (length - len(row[0])) for row in rows]))
    mentions = torch.full((plan.images, length, SLOTS + 1), -1, dtype=torch.int8)
    for i, (scene, row) in enumerate(zip(scenes, rows, strict=True)):
        for place, numbers, width in find_mentions(scene, row[0], row[3]):
            mentions[i, place] = torch.tensor([*numbers, width])
    system = rng.choice(_SYSTEM) if not evaluation and rng.random() < 0.12 else ""
    return Raw(
        plan,
        torch.from_numpy(np.stack(images)),
        torch.from_numpy(np.stack(things)),
        torch.from_numpy(np.stack(characters)),
        shapes,
        colors,
        torch.tensor([1, *_encode(f"{system}USER: ")]),
        torch.tensor(_encode("\n")),
        *columns,
        mentions,
        asked if evaluation else [],
    )


def find_mentions(scene: Scene, tokens: list[int], targets: list[int]) -> Iterator[tuple[int, list[int], int]]:
    """Where questions name a colour, a shape or both, how many of these each slot holds, and the only one's width."""
    colors, shapes = _name_tokens()
    slot = min(scene.width, scene.height) / 3
    for place, token in enumerate(tokens):
        color, shape = colors.get(token), shapes.get(token)
        if (color is None and shape is None) or targets[place] != -100 or (color and tokens[place + 1] in shapes):
            continue
        color = color or colors.get(tokens[place - 1])
        named = [t for t in scene.things if color in (None, t.color) and shape in (None, t.shape)]
        numbers = [0] * SLOTS
        for thing in named:
            numbers[3 * thing.row + thing.column] += 1
        width = -1
        if len(named) == 1:
            width = min(WIDTHS - 1, max(0, int(math.log(named[0].box.width / slot / 0.12, 1.125))))
        yield place, [min(number, MAX_IN_SLOT) for number in numbers], width


@functools.cache
def _name_tokens() -> tuple[dict[int, str], dict[int, str]]:
    """Colours and shapes by the id of their one token; shapes also in the plural."""
    colors = {_encode(f" {color}")[0]: color for color in COLORS}
    shapes = {_encode(f" {shape}{plural}")[0]: shape for shape in SHAPES for plural in ("", "s")}
    return colors, shapes


def _make_scene(plan: Plan, seed: int, words: bool) -> Scene:
    """The tower alone is shown crowded scenes, most of them full of text: characters take it longest.

    Later one scene in five still is; and most words are letters at random, so that reading beats knowing them.
    """
    crowded: dict[str, Any] = {}
    if not plan.questions:
        crowded = {"min_slots": 6, "text": 0.28 if seed % 3 == 0 else 0.75}
    elif plan.small and seed % 5 == 0 and not words:
        crowded = {"min_slots": 4, "text": 0.75}
    return make_scene(
        seed, plan.width, plan.height, small=plan.small,
        words=TRAINING_WORDS if words and plan.questions else (), **crowded,
    )  # fmt: skip


def inventory(scene: Scene) -> Question:
    """All that the scene holds, slot by slot in reading order: a caption, for training alone."""
    items = [(thing.row, thing.column, thing.position, thing.name) for thing in scene.things]
    items += [(sign.row, sign.column, sign.position, sign.text) for sign in scene.signs]
    items.sort(key=lambda item: item[:2])
    told = ", ".join(f"{position}: {name}" for _, _, position, name in items)
    return Question("inventory", "Describe every part of the image.", told, (), easy=False)


def _pack(
    questions: list[Question], rng: random.Random, *, turns: bool
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Questions in rows of ROW: tokens, offsets, units, targets. One in five is the second turn of the one before."""
    units: list[tuple[list[int], list[int]]] = []
    for question in questions:
        prompt, answer = _encode(f"{question.text}\nASSISTANT:\n"), (*_encode(question.answer), 2)
        before: tuple[list[int], list[int]] = ([], [])
        if turns and len(units) > 1 and rng.random() < 0.2:
            follow = (*_encode("USER: "), *prompt)
            if len(units[-1][0]) + len(follow) + len(answer) <= ROW:
                before, prompt = units.pop(), follow
        tokens = [*before[0], *prompt, *answer]
        targets = [*before[1], *[-100] * (len(prompt) - 1), *answer, -100]
        units.append((tokens[:ROW], [*targets[: ROW - 1], -100][: len(tokens)]))
    rows: list[list[int]] = []
    room: list[int] = []
    for number, (tokens, _) in enumerate(units):
        row = next((row for row, left in enumerate(room) if left >= len(tokens)), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(ROW)
        rows[row].append(number)
        room[row] -= len(tokens)
    packed: tuple[list[int], list[int], list[int], list[int]] = ([], [], [], [])
    for row, left in zip(rows, room, strict=True):
        for number in row:
            tokens, targets = units[number]
            for column, values in zip(
                packed, (tokens, range(len(tokens)), [number] * len(tokens), targets), strict=True
            ):
                column += values
        for column, padding in zip(packed, _PADDING, strict=True):
            column += [padding] * left
    return packed


def label_maps(scene: Scene) -> tuple[Image.Image, Image.Image]:
    """For every pixel the number of its shape, from 1, and its character as in `Raw.characters`."""
    things = Image.new("L", (scene.width, scene.height))
    characters = Image.new("L", (scene.width, scene.height))
    shape_canvas, text_canvas = ImageDraw.Draw(things), ImageDraw.Draw(characters)
    texts = [(sign.text, sign.box, get_font(sign.font, sign.font_size)) for sign in scene.signs]
    for number, thing in enumerate(scene.things, 1):
        draw_shape(shape_canvas, thing, number)
        if thing.label:
            texts.append((thing.label, thing.box, label_font(thing)))
    for text, box, font in texts:
        x, y = text_origin(text, box.center, font)
        _, top, _, bottom = font.getbbox(text)
        for i, character in enumerate(text):
            left, right = font.getlength(text[:i]), font.getlength(text[: i + 1])
            fill = len(CHARACTERS) * i + CHARACTERS.index(character) + 1
            text_canvas.rectangle((x + left, y + top, x + right - 1, y + bottom), fill=fill)
    return things, characters


class Batches(IterableDataset[Raw]):
    """Raw batches for ever; each worker takes every n-th step. How far training is, it reads from `progress`."""

    def __init__(self, seed: int, first_step: int, progress: Synchronized[float], scale: float) -> None:
        self._seed, self._first_step, self._progress, self._scale = seed, first_step, progress, scale

    def __iter__(self) -> Iterator[Raw]:
        torch.set_num_threads(1)
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        step = self._first_step + number
        while True:
            plan = plan_for(step, self._progress.value, self._scale)
            yield make_raw(plan, (self._seed << 32) + step * 64)
            step += count


# On the device from here on.


@dataclass
class Labels:
    """What the tower's heads should say of each patch of each view; int64, 0 for nothing."""

    shape: Tensor
    """(B, V, n)"""
    color: Tensor
    """(B, V, n)"""
    character: Tensor
    """(B, V, n, 2), left and right half of the patch"""
    index: Tensor
    """(B, V, n, 2), which of its word's characters that is, from 1"""

    @classmethod
    def of(cls, things: Tensor, characters: Tensor, shapes: Tensor, colors: Tensor) -> Labels:
        flat = things.flatten(1)
        shape = torch.where(flat > 0, shapes.gather(1, flat) + 1, 0).view_as(things)
        color = torch.where(flat > 0, colors.gather(1, flat) + 1, 0).view_as(things)
        number = len(CHARACTERS)
        character = torch.where(characters > 0, (characters - 1) % number + 1, 0)
        return cls(shape, color, character, (characters + number - 1) // number)

    def at(self, chosen: Tensor) -> Labels:
        halves = chosen.unsqueeze(-1).expand(-1, -1, -1, 2)
        return Labels(
            self.shape.gather(2, chosen),
            self.color.gather(2, chosen),
            self.character.gather(2, halves),
            self.index.gather(2, halves),
        )

    @property
    def foreground(self) -> Tensor:
        return (self.shape > 0) | (self.character > 0).any(-1)

    def present(self) -> Tensor:
        """(B, V, shapes x colours + characters) float: what each view shows."""
        pairs = torch.where(self.shape > 0, (self.shape - 1) * len(COLORS) + self.color, 0)
        return torch.cat(
            (
                _multi_hot(pairs, len(SHAPES) * len(COLORS)),
                _multi_hot(self.character.flatten(2), len(CHARACTERS)),
            ),
            dim=-1,
        )


def _multi_hot(indices: Tensor, count: int) -> Tensor:
    hot = torch.zeros(*indices.shape[:-1], count + 1, device=indices.device)
    return hot.scatter_(-1, indices, 1.0)[..., 1:]


def prepare(raw: Raw, device: torch.device, dtype: torch.dtype, seed: int) -> tuple[Batch, Labels]:
    """Cut views, make labels, and choose which tokens the decoder sees."""
    images = raw.images.to(device, non_blocking=True).permute(0, 3, 1, 2).to(torch.float32)
    maps = torch.stack((raw.things, raw.characters), dim=1).to(device, non_blocking=True)
    pixels = cut(images, raw.plan.tiled, bicubic=True)
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (MEAN, STD))
    pixels = ((pixels / 255 - mean) / std).to(dtype)
    views = cut(maps.to(torch.float32), raw.plan.tiled, bicubic=False)
    cells = views.view(*views.shape[:3], SIDE, PATCH, SIDE, PATCH)
    things = _pool(cells[:, :, 0]).flatten(2)
    characters = _pool(cells[:, :, 1].unflatten(-1, (2, PATCH // 2)).movedim(-2, 2)).movedim(2, -1).flatten(2, 3)
    labels = Labels.of(things, characters, raw.shapes.to(device), raw.colors.to(device))
    order = stock_order(raw.plan.height, raw.plan.width) if raw.plan.tiled else torch.arange(SIDE * SIDE)
    order = order.to(device)
    chosen = None
    if raw.plan.keep < 1:
        chosen, order = _choose(order, labels.foreground, raw.plan.keep, seed)
        labels = labels.at(chosen)
    else:
        order = order.expand(len(images), -1)
    # Counted here and not on the device, which would have to be waited for.
    targets = raw.targets.flatten()
    asked = (targets != -100).nonzero().squeeze(1)
    follows = (raw.units[:, 1:] == raw.units[:, :-1]) & (raw.units[:, 1:] >= 0) & (raw.targets[:, :-1] == -100)
    prompts = F.pad(follows, (0, 1)).flatten().nonzero().squeeze(1)
    wanted = torch.cat((targets[asked], raw.tokens.flatten()[prompts + 1])) if len(asked) else targets[asked]
    text = (raw.before, raw.after, raw.tokens, raw.offsets, raw.units, torch.cat((asked, prompts)), wanted)
    mentions = (raw.mentions[..., 0].flatten() >= 0).nonzero().squeeze(1).to(device)
    made = Batch(pixels, chosen, order, *(t.to(device, non_blocking=True) for t in text), len(asked), mentions)
    return made, labels


def _pool(cells: Tensor) -> Tensor:
    """(..., SIDE, height, SIDE, width) -> (..., SIDE, SIDE) int64: the label of a cell that is covered enough."""
    covered = (cells > 0).float().mean(dim=(-3, -1)) >= 0.06
    return (cells.amax(dim=(-3, -1)) * covered).long()


def cut(images: Tensor, tiled: bool, *, bicubic: bool) -> Tensor:
    """(B, C, height, width) -> (B, V, C, 224, 224), base view first.

    The same steps as LLaVA-NeXT's image processor: the base view is the image squeezed into a square; the tiles are cut
    from the image fitted into the best pinpoint, centred on black.
    """

    def resize(height: int, width: int) -> Tensor:
        if (height, width) == tuple(images.shape[-2:]):
            return images
        if not bicubic:
            return F.interpolate(images, size=(height, width), mode="nearest-exact")
        return F.interpolate(images, size=(height, width), mode="bicubic", antialias=True).round().clamp(0, 255)

    base = resize(TILE, TILE).unsqueeze(1)
    if not tiled:
        return base
    height, width = images.shape[-2:]
    rows, columns = GEOMETRY.tile_grid(height, width)
    target_height, target_width = rows * TILE, columns * TILE
    fitted_height, fitted_width = fit(height, width, target_height, target_width)
    fitted = resize(fitted_height, fitted_width)
    left, top = (target_width - fitted_width) // 2, (target_height - fitted_height) // 2
    padded = F.pad(fitted, (left, target_width - fitted_width - left, top, target_height - fitted_height - top))
    tiles = padded.unflatten(-1, (columns, TILE)).unflatten(-3, (rows, TILE)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    return torch.cat((base, tiles), dim=1)


def fit(height: int, width: int, target_height: int, target_width: int) -> tuple[int, int]:
    """Size of the image when it just fits the target."""
    scale_width, scale_height = target_width / width, target_height / height
    if scale_width < scale_height:
        return min(-int(-(height * scale_width) // 1), target_height), target_width
    return target_height, min(-int(-(width * scale_height) // 1), target_width)


def stock_order(height: int, width: int) -> Tensor:
    """(K,) indices into the patches of all views, in the stock model's order; -1 is the newline after a row."""
    columns = GEOMETRY.tile_grid(height, width)[1]

    def index(origin: Origin) -> int:
        if origin.view is None:
            return -1
        tile = 0 if origin.view == "base" else 1 + origin.row // SIDE * columns + origin.column // SIDE
        return (tile * SIDE + origin.row % SIDE) * SIDE + origin.column % SIDE

    return torch.tensor([index(origin) for origin in stock_origins(GEOMETRY, height, width)])


def _choose(order: Tensor, foreground: Tensor, keep: float, seed: int) -> tuple[Tensor, Tensor]:
    """Patches for the network to see, and their order in the decoder: (B, V, n) and (B, V x n).

    Those that show something come first, then background at random; never padding. Newlines are left out.
    """
    _, views, patches = foreground.shape
    count = round(keep * patches)
    generator = torch.Generator().manual_seed(seed)
    chance = torch.rand(foreground.shape, generator=generator).to(order.device)
    real = order[order >= 0]
    place = torch.full((views * patches,), len(real), device=order.device)
    place[real] = torch.arange(len(real), device=order.device)
    is_real = (place < len(real)).view(views, patches)
    chosen = (foreground * 2 + chance + is_real * 4).topk(count, dim=2).indices.sort(dim=2).values
    start = torch.arange(views, device=order.device).view(1, views, 1) * patches
    return chosen, place[(chosen + start).flatten(1)].argsort(dim=1)
