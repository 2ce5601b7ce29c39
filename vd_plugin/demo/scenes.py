"""Scenes: coloured shapes, numbers and words on a cluttered background, drawn by code.

A scene is a 3 x 3 grid of slots. A slot is empty, or holds one shape, two or three small shapes, or a sign (a number or
a word). Shapes may carry a label of one or two digits. Everything follows from the seed; the same seed gives the same
pixels under the same versions of Pillow and of the fonts.

Colours of the background are pale or dark greys, so that the named colours belong to the shapes alone.
"""

from __future__ import annotations

import colorsys
import functools
import importlib.util
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, NamedTuple, TypeAlias

from PIL import Image, ImageDraw, ImageFont

Color: TypeAlias = tuple[int, int, int]
Size: TypeAlias = Literal["small", "medium", "large"]

FIRST_HELD_OUT_SEED: Final = 1 << 41
"""No scene from here on is used in training."""

COLORS: Final[dict[str, Color]] = {
    "red": (214, 40, 40),
    "green": (40, 150, 60),
    "blue": (40, 80, 210),
    "yellow": (245, 215, 45),
    "orange": (245, 135, 30),
    "purple": (130, 50, 170),
    "pink": (250, 150, 200),
    "cyan": (60, 205, 225),
    "brown": (115, 70, 35),
    "black": (22, 22, 24),
    "white": (250, 250, 250),
}
SHAPES: Final = ("circle", "square", "triangle", "star", "diamond", "cross", "ring", "heart")
SIZES: Final[tuple[Size, ...]] = ("small", "medium", "large")

_EXTENT: Final[dict[Size, tuple[float, float]]] = {
    "small": (0.12, 0.17),
    "medium": (0.30, 0.42),
    "large": (0.55, 0.76),
}
"""Side of a shape's box, as a share of its slot's shorter side."""

_LETTER_HEIGHT: Final[dict[Size, tuple[float, float]]] = {
    "small": (0.115, 0.145),
    "medium": (0.18, 0.24),
    "large": (0.27, 0.36),
}
"""Font size of a sign, as a share of its slot's shorter side."""

FONTS: Final = (
    "Aileron",
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSerif",
    "DejaVuSansMono",
    "STIXGeneralBol",
)
"""The first comes with Pillow, the others with matplotlib."""

POSITIONS: Final = (
    ("top left", "top", "top right"),
    ("left", "center", "right"),
    ("bottom left", "bottom", "bottom right"),
)


class Box(NamedTuple):
    """Pixels of an image, the second corner outside."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def center(self) -> tuple[float, float]:
        return (self.left + self.right) / 2, (self.top + self.bottom) / 2


@dataclass(frozen=True, slots=True)
class Thing:
    """A shape."""

    shape: str
    color: str
    size: Size
    row: int
    column: int
    box: Box
    angle: float = 0.0
    """Degrees."""
    tint: Color = (0, 0, 0)
    """The colour's very shade."""
    label: str = ""
    """Digits written on it."""
    alone: bool = True
    """Whether it has its slot for itself."""

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def position(self) -> str:
        return POSITIONS[self.row][self.column]


@dataclass(frozen=True, slots=True)
class Sign:
    """A number or a word, written on a plate."""

    text: str
    size: Size
    row: int
    column: int
    box: Box
    font: str
    font_size: int
    ink: Color
    plate: Color

    @property
    def is_number(self) -> bool:
        return self.text.isdigit()

    @property
    def position(self) -> str:
        return POSITIONS[self.row][self.column]


@dataclass(frozen=True, slots=True)
class Scene:
    width: int
    height: int
    seed: int
    things: tuple[Thing, ...]
    signs: tuple[Sign, ...]


def make_scene(
    seed: int,
    width: int = 448,
    height: int = 448,
    *,
    min_slots: int = 1,
    max_slots: int = 9,
    small: bool = True,
    text: float = 0.28,
    words: Sequence[str] = (),
    fonts: Sequence[str] = FONTS,
) -> Scene:
    """Lay out the scene of `seed`.

    Args:
        min_slots, max_slots: how many of the nine slots are used.
        small: whether there are small shapes and signs.
        text: share of the used slots that hold a sign; above a half, no limit to their number.
        words: what signs may say; without any, letters are drawn at random.
    """
    rng = random.Random(seed)
    slots = [(row, column) for row in range(3) for column in range(3)]
    rng.shuffle(slots)
    slots = sorted(slots[: rng.randint(min_slots, max_slots)])
    # Few colours and shapes to a scene half of the time: names then need both, and counts go up.
    colors = rng.sample(sorted(COLORS), rng.choice((3, 4, len(COLORS), len(COLORS))))
    shapes = rng.sample(SHAPES, rng.choice((2, 3, len(SHAPES), len(SHAPES))))
    things: list[Thing] = []
    signs: list[Sign] = []
    for row, column in slots:
        slot = Box(column * width // 3, row * height // 3, (column + 1) * width // 3, (row + 1) * height // 3)
        kind = rng.random()
        if kind < text and (len(signs) < 3 or text > 0.5):
            signs.append(_make_sign(rng, slot, row, column, words, fonts, small=small))
        elif kind < text + 0.12 and small:
            things += _make_group(rng, slot, row, column, colors, shapes)
        else:
            size = rng.choices(SIZES, (0.3 * small, 0.4, 0.3))[0]
            things.append(_make_thing(rng, slot, row, column, rng.choice(shapes), rng.choice(colors), size))
    if not things and not signs:
        raise AssertionError("a scene has at least one slot")
    return Scene(width, height, seed, tuple(things), tuple(signs))


def draw(scene: Scene) -> Image.Image:
    """The scene's image, RGB."""
    rng = random.Random(f"background {scene.seed}")
    image = _draw_background(rng, scene.width, scene.height)
    canvas = ImageDraw.Draw(image)
    for thing in scene.things:
        draw_shape(canvas, thing, thing.tint, outline=_outline_of(thing.tint))
        if thing.label:
            _write(canvas, thing.label, thing.box.center, label_font(thing), _ink_on(thing.tint))
    for sign in scene.signs:
        canvas.rounded_rectangle((*sign.box[:2], sign.box.right - 1, sign.box.bottom - 1), 4, fill=sign.plate)
        _write(canvas, sign.text, sign.box.center, get_font(sign.font, sign.font_size), sign.ink)
    return image


def draw_shape(
    canvas: ImageDraw.ImageDraw,
    thing: Thing,
    fill: Color | int,
    outline: Color | None = None,
) -> None:
    """Draw one shape in `fill`; a map of indices is drawn by the same code as the image."""
    left, top, right, bottom = thing.box
    thin = max(1, thing.box.width // 40)
    if thing.shape == "circle":
        canvas.ellipse((left, top, right - 1, bottom - 1), fill=fill, outline=outline, width=thin)
    elif thing.shape == "ring":
        canvas.ellipse((left, top, right - 1, bottom - 1), outline=fill, width=max(3, thing.box.width // 5))
    else:
        canvas.polygon(_polygon(thing), fill=fill, outline=outline, width=thin)


def label_font(thing: Thing) -> ImageFont.FreeTypeFont:
    return get_font("Aileron", max(9, round(thing.box.width * 0.34)))


@functools.lru_cache(maxsize=512)
def get_font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """One of FONTS in `size` pixels.

    Raises:
        FileNotFoundError: the font comes with matplotlib, which is not installed.
    """
    if name == FONTS[0]:
        font = ImageFont.load_default(size)
        assert isinstance(font, ImageFont.FreeTypeFont)
        return font
    folder = _matplotlib_fonts()
    if folder is None:
        raise FileNotFoundError(f"the font {name} comes with matplotlib, which is not installed")
    return ImageFont.truetype(str(folder / f"{name}.ttf"), size)


@functools.cache
def _matplotlib_fonts() -> Path | None:
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf"


def _make_thing(rng: random.Random, slot: Box, row: int, column: int, shape: str, color: str, size: Size) -> Thing:
    side = _draw_side(rng, slot, size)
    box = _place(rng, slot, side, side)
    angle = 0.0 if shape in ("circle", "ring", "diamond", "heart") else rng.uniform(-12, 12)
    label = ""
    if size != "small" and shape not in ("ring", "cross") and side >= 36 and rng.random() < 0.35:
        label = str(rng.randint(0, 9) if rng.random() < 0.5 or shape in ("triangle", "star") else rng.randint(10, 99))
    return Thing(shape, color, size, row, column, box, angle, _vary(rng, COLORS[color]), label)


def _make_group(
    rng: random.Random, slot: Box, row: int, column: int, colors: Sequence[str], shapes: Sequence[str]
) -> list[Thing]:
    """Two or three small shapes, often alike, in quarters of a slot."""
    middle_x, middle_y = (slot.left + slot.right) // 2, (slot.top + slot.bottom) // 2
    quarters = [
        Box(slot.left, slot.top, middle_x, middle_y),
        Box(middle_x, slot.top, slot.right, middle_y),
        Box(slot.left, middle_y, middle_x, slot.bottom),
        Box(middle_x, middle_y, slot.right, slot.bottom),
    ]
    rng.shuffle(quarters)
    alike = rng.random() < 0.5
    shape, color = rng.choice(shapes), rng.choice(colors)
    things = []
    for quarter in quarters[: rng.randint(2, 3)]:
        if not alike:
            shape, color = rng.choice(shapes), rng.choice(colors)
        side = _draw_side(rng, slot, "small")
        box = _place(rng, quarter, side, side)
        things.append(Thing(shape, color, "small", row, column, box, 0.0, _vary(rng, COLORS[color]), "", False))
    return things


def _make_sign(
    rng: random.Random,
    slot: Box,
    row: int,
    column: int,
    words: Sequence[str],
    fonts: Sequence[str],
    *,
    small: bool,
) -> Sign:
    if rng.random() < 0.5:
        digits = rng.randint(2, 4)
        text = str(rng.randint(10 ** (digits - 1), 10**digits - 1))
    elif words:
        text = rng.choice(words)
    else:
        text = "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=rng.randint(3, 5)))
    size = rng.choices(SIZES, (0.4 * small, 0.35, 0.25))[0]
    font = rng.choice(list(fonts))
    font_size = max(11, round(_room(slot) * rng.uniform(*_LETTER_HEIGHT[size])))
    margin = max(3, font_size // 4)
    while True:
        left, top, right, bottom = get_font(font, font_size).getbbox(text)
        width, height = round(right - left) + 2 * margin, round(bottom - top) + 2 * margin
        if width <= slot.width - 4 or font_size <= 11:
            break
        font_size -= 2
    box = _place(rng, slot, min(width, slot.width), min(height, slot.height))
    dark = rng.random() < 0.5
    ink = _draw_shade(rng, 0, 40) if dark else _draw_shade(rng, 225, 255)
    plate = _draw_shade(rng, 215, 250) if dark else _draw_shade(rng, 5, 45)
    return Sign(text, size, row, column, box, font, font_size, ink, plate)


def _room(slot: Box) -> int:
    return min(slot.width, slot.height)


def _draw_side(rng: random.Random, slot: Box, size: Size) -> int:
    """Side of a shape's box in pixels."""
    return max(10, round(_room(slot) * rng.uniform(*_EXTENT[size])))


def _draw_shade(rng: random.Random, low: int, high: int) -> Color:
    return rng.randint(low, high), rng.randint(low, high), rng.randint(low, high)


def _place(rng: random.Random, slot: Box, width: int, height: int) -> Box:
    """A box of that size somewhere in the slot, with a margin to its edges where there is room."""
    free_x, free_y = slot.width - width, slot.height - height
    margin_x, margin_y = min(6, free_x // 2), min(6, free_y // 2)
    left = slot.left + rng.randint(max(0, margin_x), max(0, free_x - margin_x))
    top = slot.top + rng.randint(max(0, margin_y), max(0, free_y - margin_y))
    return Box(left, top, left + width, top + height)


def _polygon(thing: Thing) -> list[tuple[float, float]]:
    """Corners in pixels, from unit coordinates of -1..1, turned by the angle."""
    x, y = thing.box.center
    radius = thing.box.width / 2
    # Turned corners must stay inside the box.
    radius *= 0.88 if thing.shape == "square" else 1.0
    cosine, sine = math.cos(math.radians(thing.angle)), math.sin(math.radians(thing.angle))
    return [
        (x + radius * (px * cosine - py * sine), y + radius * (px * sine + py * cosine))
        for px, py in _UNIT_POLYGONS[thing.shape]()
    ]


def _star() -> list[tuple[float, float]]:
    return [
        (
            (1.0 if k % 2 == 0 else 0.42) * math.sin(math.pi * k / 5),
            -(1.0 if k % 2 == 0 else 0.42) * math.cos(math.pi * k / 5),
        )
        for k in range(10)
    ]


def _heart() -> list[tuple[float, float]]:
    points = []
    for k in range(40):
        t = 2 * math.pi * k / 40
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((x / 17, -y / 17))
    return points


_ARM: Final = 0.33
_UNIT_POLYGONS: Final[dict[str, Callable[[], list[tuple[float, float]]]]] = {
    "square": lambda: [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "diamond": lambda: [(0, -1), (0.72, 0), (0, 1), (-0.72, 0)],
    "triangle": lambda: [(0, -0.95), (0.95, 0.75), (-0.95, 0.75)],
    "star": _star,
    "heart": _heart,
    "cross": lambda: [
        (-_ARM, -0.95), (_ARM, -0.95), (_ARM, -_ARM), (0.95, -_ARM), (0.95, _ARM), (_ARM, _ARM),
        (_ARM, 0.95), (-_ARM, 0.95), (-_ARM, _ARM), (-0.95, _ARM), (-0.95, -_ARM), (-_ARM, -_ARM),
    ],
}  # fmt: skip


def _draw_background(rng: random.Random, width: int, height: int) -> Image.Image:
    """A pale or dark grey with a gradient, grain, and lines, blobs or stripes that mean nothing."""
    dark = rng.random() < 0.3
    base = rng.uniform(0.16, 0.32) if dark else rng.uniform(0.62, 0.86)
    hue = rng.random()

    def grey(spread: float) -> Color:
        value = min(1.0, max(0.05, base + rng.uniform(-spread, spread)))
        rgb = colorsys.hsv_to_rgb((hue + rng.uniform(-0.1, 0.1)) % 1.0, rng.uniform(0.0, 0.16), value)
        return (round(255 * rgb[0]), round(255 * rgb[1]), round(255 * rgb[2]))

    # Gradient and grain in one: a coarse random image, enlarged.
    cells = rng.choice((2, 4, 12, 40))
    coarse = Image.new("RGB", (cells, cells))
    coarse.putdata([grey(0.08) for _ in range(cells * cells)])
    image = coarse.resize((width, height), Image.Resampling.BILINEAR)
    canvas = ImageDraw.Draw(image)
    clutter = rng.choice(("lines", "blobs", "stripes", "checks", "strokes", "plain"))
    if clutter == "lines":
        for _ in range(rng.randint(10, 40)):
            points = [(rng.uniform(0, width), rng.uniform(0, height)) for _ in range(2)]
            canvas.line(points, fill=grey(0.14), width=rng.randint(1, 4))
    elif clutter == "blobs":
        for _ in range(rng.randint(10, 40)):
            x, y, radius = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(3, 40)
            canvas.ellipse((x - radius, y - radius, x + radius, y + radius * rng.uniform(0.5, 1.5)), fill=grey(0.1))
    elif clutter == "stripes":
        step = rng.randint(10, 40)
        slant = rng.uniform(-1, 1)
        for offset in range(-height, width + height, step):
            canvas.line([(offset, 0), (offset + slant * height, height)], fill=grey(0.08), width=step // 3)
    elif clutter == "checks":
        step = rng.randint(12, 48)
        tone = grey(0.1)
        for y in range(0, height, step):
            for x in range((y // step % 2) * step, width, 2 * step):
                canvas.rectangle((x, y, x + step - 1, y + step - 1), fill=tone)
    elif clutter == "strokes":
        for _ in range(rng.randint(60, 200)):
            x, y = rng.uniform(0, width), rng.uniform(0, height)
            canvas.line([(x, y), (x + rng.uniform(-14, 14), y + rng.uniform(-14, 14))], fill=grey(0.16), width=2)
    return image


def _vary(rng: random.Random, color: Color) -> Color:
    red, green, blue = (min(255, max(0, channel + rng.randint(-12, 12))) for channel in color)
    return red, green, blue


def _outline_of(color: Color) -> Color:
    return (225, 225, 225) if sum(color) < 120 else (color[0] * 2 // 3, color[1] * 2 // 3, color[2] * 2 // 3)


def _ink_on(color: Color) -> Color:
    return (15, 15, 15) if 0.3 * color[0] + 0.59 * color[1] + 0.11 * color[2] > 130 else (245, 245, 245)


def _write(
    canvas: ImageDraw.ImageDraw,
    text: str,
    center: tuple[float, float],
    font: ImageFont.FreeTypeFont,
    ink: Color,
) -> None:
    canvas.text(text_origin(text, center, font), text, fill=ink, font=font)


def text_origin(text: str, center: tuple[float, float], font: ImageFont.FreeTypeFont) -> tuple[float, float]:
    """Where `text` starts so that its ink is centred."""
    left, top, right, bottom = font.getbbox(text)
    return center[0] - (left + right) / 2, center[1] - (top + bottom) / 2
