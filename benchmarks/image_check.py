"""What checking an image costs the gateway: two canonical files of some megabytes, and a bomb.

Prints a table and, last, one line of JSON. Needs no engine.
"""

from __future__ import annotations

import json
import struct
import time
import zlib
from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from statistics import median

from PIL import Image

from server.errors import GatewayError
from server.images.check import check_image
from server.settings import Settings

REPEATS = 15


def encode(image: Image.Image, kind: str, **options: int) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int, height: int) -> Image.Image:
    return Image.merge("RGB", [Image.effect_noise((width, height), 60) for _ in range(3)])


def scene() -> bytes:
    smooth = Image.radial_gradient("L").resize((4000, 3000)).convert("RGB")
    return encode(Image.blend(smooth, noise(4000, 3000), 0.3), "JPEG", quality=82)


def bomb() -> bytes:
    """A PNG of 400 megapixels in some ten kilobytes."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    body = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(10_000_000), 9)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


FILES: dict[str, Callable[[], bytes]] = {
    "PNG, canonical": lambda: encode(noise(1000, 670), "PNG"),
    "JPEG, canonical": scene,
    "PNG, bomb": bomb,
}


def measure(data: bytes) -> float:
    """Median milliseconds."""
    url = f"data:image/png;base64,{b64encode(data).decode()}"
    taken = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        with suppress(GatewayError):
            check_image(url, Settings(), "here")
        taken.append(1000 * (time.perf_counter() - began))
    return median(taken)


def main() -> None:
    figures = {}
    print(f"{'file':<14}{'bytes':>12}{'check':>12}")
    for name, make in FILES.items():
        data = make()
        figures[name] = round(measure(data), 2)
        print(f"{name:<14}{len(data):>12,}{figures[name]:>9.2f} ms")
    print(json.dumps({"benchmark": "image_check", "milliseconds": figures}))


if __name__ == "__main__":
    main()
