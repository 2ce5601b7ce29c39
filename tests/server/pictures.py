"""Pictures for the gateway's tests, as bytes and as data URLs."""

from __future__ import annotations

import base64
from io import BytesIO
from typing import Any

from PIL import Image


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def data_url(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def decode(url: str) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(url.partition(",")[2])))


def picture(width: int = 100, height: int = 50, color: str = "red") -> str:
    """A plain RGB picture."""
    return data_url(encode(Image.new("RGB", (width, height), color)))


def ask(*urls: str, **fields: Any) -> dict[str, Any]:
    """A chat request about some pictures."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}], **fields}
