"""Images of any kind brought to what a model takes: 8-bit grey or RGB, upright, on white.

Done in bands, so that no more than source and result is ever held whole: 8 bytes a pixel, since Pillow keeps RGB in
four.
"""

from __future__ import annotations

import zlib
from io import BytesIO
from typing import Final

from PIL import Image

_BAND_PIXELS: Final = 2_000_000
_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation to what undoes it."""
_16_BIT_GREY: Final = tuple((value * 255 + 32767) // 65535 for value in range(65536))

_MAX_BITMAP_PIXELS: Final = 16_000_000
"""What phones take; 48 MB."""


def normalise(image: Image.Image, orientation: int, bit_depth: int) -> Image.Image:
    """A canonical image in place of `image`, which is closed to free its memory.

    Args:
        orientation: EXIF's, 1 to 8.
        bit_depth: bits of a sample in the file; Pillow widens some without widening the transparent colour.
    """
    _fix_transparency(image, bit_depth)
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        canonical = image
    else:
        canonical = _flatten(image)
        image.close()
    if orientation in _TURNS:
        turned = canonical.transpose(_TURNS[orientation])
        canonical.close()
        canonical = turned
    canonical.info = {}  # else Pillow would write EXIF and colour profile along
    return canonical


def to_file(image: Image.Image) -> tuple[str, memoryview]:
    """The image as a file for the engine, and the file's kind. It is closed.

    It only travels to the engine: a bitmap costs a twentieth of a PNG's time (12 megapixels, 0.05 s and 1 s), and less
    to decode. Above some size its bytes would cost more memory than that is worth; then PNG in runs only, which on
    photographs is a third faster than zlib's level 1, and a fifth smaller.
    """
    buffer = BytesIO()
    kind = "BMP" if image.width * image.height <= _MAX_BITMAP_PIXELS else "PNG"
    if kind == "BMP":
        image.save(buffer, "BMP")
    else:
        image.save(buffer, "PNG", compress_level=1, compress_type=zlib.Z_RLE)
    image.close()
    return kind, buffer.getbuffer()


def _fix_transparency(image: Image.Image, bit_depth: int) -> None:
    """Bring the one transparent colour of a PNG (tRNS) to the range in which Pillow gives the pixels."""
    color = image.info.get("transparency")
    if isinstance(color, str):
        del image.info["transparency"]  # a text chunk of that name
    elif image.mode == "L" and isinstance(color, int) and bit_depth < 8:
        image.info["transparency"] = color * 255 // (2**bit_depth - 1)
    elif image.mode == "RGB" and isinstance(color, tuple) and bit_depth == 16:
        # Pillow keeps the high byte of each sample; two colours with the same high bytes cannot be told apart.
        image.info["transparency"] = tuple(sample >> 8 for sample in color)


def _flatten(image: Image.Image) -> Image.Image:
    opaque = not image.has_transparency_data
    grey = image.mode.startswith("I") or (opaque and image.mode in ("1", "L"))
    width, height = image.size
    flat = Image.new("L" if grey else "RGB", image.size, "white")
    rows = max(1, _BAND_PIXELS // width)
    for top in range(0, height, rows):
        band = image.crop((0, top, width, min(top + rows, height)))
        if band.mode.startswith("I"):
            _paste_16_bit(flat, band, top)
        elif opaque:
            flat.paste(band.convert(flat.mode), (0, top))
        else:
            band = band.convert("RGBA")
            flat.paste(band, (0, top), mask=band)
    return flat


def _paste_16_bit(flat: Image.Image, band: Image.Image, top: int) -> None:
    """Scaled, where Pillow would clip at 255."""
    hole = band.info.pop("transparency", None)
    wide = band.convert("I")
    flat.paste(wide.point(_16_BIT_GREY, "L"), (0, top))
    if isinstance(hole, int):
        mask = wide.point([255 * (value == hole) for value in range(65536)], "L")
        flat.paste(255, (0, top), mask=mask)
