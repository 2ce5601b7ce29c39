"""Images for the gateway's tests, as bytes and as data URLs."""

from __future__ import annotations

import base64
import struct
import zlib
from contextlib import suppress
from io import BytesIO
from typing import Any

import pybase64
from PIL import Image, ImageOps


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def data_url(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def decode(url: str) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(url.partition(",")[2])))


def decode_as_engine(url: str) -> Image.Image:
    """What vLLM 0.32 makes of a data URL: `_load_data_url`, `open_image`, `normalize_image`, `convert_image_mode`."""
    head, _, payload = url[5:].partition(",")
    assert url[:5].lower() == "data:"
    assert head.rpartition(";")[2] == "base64"
    Image.init()
    formats = sorted(Image.OPEN)  # it leaves out some of them, none of which matters here
    image: Image.Image = Image.open(BytesIO(pybase64.b64decode(payload, validate=True)), formats=formats)
    with suppress(Exception):
        image = ImageOps.exif_transpose(image)
    image.load()
    if image.mode != "RGB" and ("A" in image.mode or "transparency" in image.info):
        image = image.convert("RGBA")
        opaque = Image.new("RGB", image.size, "white")
        opaque.paste(image, mask=image.split()[3])
        return opaque
    return image.convert("RGB")


def image(width: int = 100, height: int = 50, color: str = "red") -> str:
    """A plain RGB image."""
    return data_url(encode(Image.new("RGB", (width, height), color)))


def png_chunk(name: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, depth: int, colors: int, rows: bytes, *chunks: bytes, interlace: int = 0) -> bytes:
    """A PNG from its header's numbers and its rows, each with a filter byte before it; more chunks before the pixels.

    Nothing is checked, so that wrong files can be made, too.
    """
    header = struct.pack(">IIBBBBB", width, height, depth, colors, 0, 0, interlace)
    body = (*chunks, png_chunk(b"IDAT", zlib.compress(rows, 9)), png_chunk(b"IEND"))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + b"".join(body)


def ask(*urls: str, **fields: Any) -> dict[str, Any]:
    """A chat request about some images."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}], **fields}
