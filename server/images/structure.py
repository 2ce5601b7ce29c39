"""What an image's file shows without decoding its pixels: whether it is whole, and whether it is a trap.

Readers walk a file's segments one by one, and slowly; a file of millions of empty ones, or a JPEG that paints the same
50 megapixels a million times over, holds a processor for hours. Such files are refused here, before any reader.
"""

from __future__ import annotations

import re
import struct
import zlib
from io import BytesIO
from typing import Final

from PIL import Image

MAX_SEGMENTS: Final = 50_000
"""PNG chunks or JPEG segments. A PNG of 20 MiB in pieces of 512 bytes has 40,000."""
MAX_JPEG_SCANS: Final = 100
"""A progressive JPEG has about 10; each scan costs a pass over all the pixels."""
_MAX_READS: Final = 400_000
"""Reads of one reader. A GIF of 20 MiB in pieces of 255 bytes takes 164,000."""
_MAX_JOINED_SEGMENTS: Final = 32
"""JPEG segments of one kind that Pillow joins one by one (EXIF) or takes apart (Photoshop's); real files have one."""
_MAX_JPEG_JUNK: Final = 1024
"""Bytes before or between segments, which readers skip one at a time."""

_PNG_START: Final = struct.Struct(">8xI4sIIBBBBB")
_PNG_CHUNK: Final = struct.Struct(">I4s")
_PNG_HARMLESS: Final = frozenset(
    (b"IDAT", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"cICP", b"sBIT", b"bKGD", b"pHYs", b"tIME", b"hIST")
)
"""Chunks that change nothing about the pixels as the engine reads them, wherever they stand."""
_PNG_KEYWORDS: Final = re.compile(rb"(?:transparency|exif|xmp|interlace|bbox|default_image|XML:|Raw profile)", re.I)
"""Keywords of text that Pillow takes for properties of the image."""
_MAX_DEFLATE_RATIO: Final = 1032

_JPEG_MARKER: Final = re.compile(rb"\xff([^\x00\xff])")
_JPEG_MARKER_IN_SCAN: Final = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")
_BARE: Final = frozenset((0x01, *range(0xD0, 0xD8)))
_SOI, _EOI, _SOS, _ADOBE, _COM = 0xD8, 0xD9, 0xDA, 0xEE, 0xFE
_JOINED: Final = {0xE1: b"Exif\0\0", 0xED: b"Photoshop 3.0\0"}
_FRAMES: Final = (0xC0, 0xC1, 0xC2)
"""Start of a frame: baseline, extended and progressive, in Huffman coding. The others are rarely readable."""


class BrokenImageError(ValueError):
    """A file that is damaged or a trap; the message ends a sentence that begins with its kind."""


class BoundedFile(BytesIO):
    """A GIF that a reader may not read for ever. The other kinds are walked beforehand; how Pillow takes a GIF of
    broken blocks apart is nothing to imitate.
    """

    _num_reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        """
        Raises:
            BrokenImageError: it has been read too often.
        """
        self._num_reads += 1
        if self._num_reads > _MAX_READS:
            raise BrokenImageError("has too many parts")
        return super().read(size)


def is_whole(data: bytes, kind: str) -> bool:
    """Whether a file is complete and of ordinary structure, so that it need not be decoded to be trusted.

    False says only that there is a doubt. The pixels themselves are not examined.

    Args:
        kind: Pillow's name of the format.

    Raises:
        BrokenImageError: damaged beyond doubt, or made to keep a reader busy.
    """
    if kind == "PNG":
        return _is_whole_png(data)
    if kind == "JPEG":
        return _is_whole_jpeg(data)
    # libwebp checks the chunks when the file is opened, but not that nothing follows them.
    return kind == "WEBP" and int.from_bytes(data[4:8], "little") + 8 == len(data)


def _is_whole_png(data: bytes) -> bool:
    if len(data) < _PNG_START.size:
        return False
    length, name, width, height, depth, colors, _, _, interlace = _PNG_START.unpack_from(data)
    ordinary = length == 13 and name == b"IHDR" and depth == 8 and colors in (0, 2) and interlace in (0, 1)
    num_pixel_bytes = 0
    start, seen_body = 8, False
    view = memoryview(data)
    for number in range(MAX_SEGMENTS):
        if start + 12 > len(data):
            return False
        length, name = _PNG_CHUNK.unpack_from(data, start)
        end = start + 12 + length
        if end > len(data):
            return False
        if zlib.crc32(view[start + 4 : end - 4]).to_bytes(4, "big") != data[end - 4 : end]:
            if name == b"IDAT":
                raise BrokenImageError("has a wrong checksum")
            ordinary = False
        if name == b"IEND":
            pixels = height * (1 + width * (1 if colors == 0 else 3))
            return ordinary and end == len(data) and num_pixel_bytes * _MAX_DEFLATE_RATIO >= pixels
        if name == b"IDAT":
            num_pixel_bytes += length
            seen_body = True
        elif name in (b"tEXt", b"zTXt", b"iTXt"):
            # Before the pixels Pillow reads text when it opens the file; afterwards only when it decodes.
            late = seen_body and name != b"tEXt"
            ordinary = ordinary and not late and not _PNG_KEYWORDS.match(data, start + 8)
        elif name != b"IHDR" or number > 0:
            ordinary = ordinary and (name in _PNG_HARMLESS or (name == b"eXIf" and not seen_body))
        start = end
    raise BrokenImageError("has too many chunks")


def _is_whole_jpeg(data: bytes) -> bool:
    """Walk all segments, those between scans included, and let the real decoder judge them.

    The decoder sees the file's own tables and scan headers with a frame of 8 x 8 pixels and no pixel data, which takes
    it no time, whatever the size of the image. (It takes missing pixel data for grey.)
    """
    probe = [b"\xff\xd8"]
    position, num_scans, num_junk, num_joined, ordinary, pattern = 2, 0, 0, 0, True, _JPEG_MARKER
    for _ in range(MAX_SEGMENTS):
        found = pattern.search(data, position)
        if pattern is _JPEG_MARKER:
            num_junk += (found.start() if found else len(data)) - position
            if num_junk > _MAX_JPEG_JUNK:
                raise BrokenImageError("has gaps between its segments")
        if found is None:
            return False
        marker, position = data[found.start() + 1], found.end()
        if marker == _EOI:
            return ordinary and not num_junk and position == len(data) and _decodes(b"".join((*probe, b"\xff\xd9")))
        if marker == _SOI or marker in _BARE:
            ordinary = False
            continue
        end = position + int.from_bytes(data[position : position + 2], "big")
        if end < position + 2:
            raise BrokenImageError("has a segment of impossible length")
        if end > len(data):
            return False
        segment = data[position - 2 : end]
        if marker in _FRAMES:
            ordinary = ordinary and len(segment) > 10 and segment[4] == 8
            segment = segment[:5] + b"\x00\x08\x00\x08" + segment[9:]
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xCC):
            ordinary = False
        if marker == _ADOBE or marker < 0xE0:
            probe.append(segment)
        elif marker > 0xEF and marker != _COM:
            ordinary = False
        num_joined += marker in _JOINED and segment[4:].startswith(_JOINED[marker])
        if num_joined > _MAX_JOINED_SEGMENTS:
            raise BrokenImageError("has too many segments")
        num_scans += marker == _SOS
        if num_scans > MAX_JPEG_SCANS:
            raise BrokenImageError("has too many scans")
        pattern = _JPEG_MARKER_IN_SCAN if marker == _SOS else _JPEG_MARKER
        position = end
    raise BrokenImageError("has too many segments")


def _decodes(jpeg: bytes) -> bool:
    try:
        Image.open(BytesIO(jpeg), formats=("JPEG",)).load()
    except Exception:
        # As everywhere, Pillow may raise anything; the whole file is decoded then, and the error reported.
        return False
    return True
