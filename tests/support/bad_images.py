"""Images as clients should not send them, and some that look wrong but are right, with what must come of each."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import quote

from images import data_url, encode, png, png_chunk
from PIL import Image

SIZE = (48, 36)
"""Of every accepted image."""


@dataclass(frozen=True, slots=True)
class ImageCase:
    """`status` 200 means that the image is accepted, and has SIZE; `code` is the error's."""

    name: str
    url: str
    status: int = 400
    code: str | None = "invalid_image"


def image_cases() -> Iterator[ImageCase]:
    """All cases; the same bytes at every call."""
    yield from _not_images()
    yield from _damaged()
    yield from _traps()
    yield from _unusual()
    yield from _urls()


def photo(mode: str = "RGB") -> Image.Image:
    """An image with something in it."""
    channel = Image.radial_gradient("L").resize(SIZE)
    return Image.merge("RGB", (channel, channel.rotate(180), Image.linear_gradient("L").resize(SIZE))).convert(mode)


def jpeg_of_scans(num_scans: int, width: int = 48, height: int = 36) -> bytes:
    """A progressive JPEG that goes over its pixels again and again."""
    data = encode(Image.new("L", (width, height), 128), "JPEG", progressive=True)
    last = data[data.rfind(b"\xff\xda") : -2]
    return data[:-2] + last * num_scans + b"\xff\xd9"


def _bad(name: str, data: bytes, code: str = "invalid_image", status: int = 400) -> ImageCase:
    return ImageCase(name, data_url(data), status, code)


def _good(name: str, data: bytes) -> ImageCase:
    return ImageCase(name, data_url(data), 200, None)


def _not_images() -> Iterator[ImageCase]:
    for name, data in {
        "nothing": b"",
        "one byte": b"\xff",
        "zeros": bytes(1000),
        "text": b"hello",
        "HTML": b"<!doctype html><html><body>404</body></html>",
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "PDF": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n",
        "AVIF header": b"\x00\x00\x00\x20ftypavif\x00\x00\x00\x00avifmif1miafMA1B",
        "HEIC header": b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic",
        "ZIP": b"PK\x03\x04" + bytes(60),
        "WAV": b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(24),
    }.items():
        yield _bad(name, data)
    for kind in ("BMP", "TIFF", "ICO", "PPM"):
        yield _bad(kind, encode(photo(), kind))
    yield _bad("floating-point TIFF", encode(photo("F"), "TIFF"))


def _damaged() -> Iterator[ImageCase]:
    for kind in ("JPEG", "PNG", "WEBP", "GIF"):
        data = encode(photo(), kind)
        for num_bytes in (4, 12, 30, len(data) // 2, len(data) * 9 // 10):
            yield _bad(f"{kind} cut to {num_bytes} bytes", data[:num_bytes])
        yield _bad(f"{kind} zeroed in the middle", data[:20] + bytes(len(data) - 20))
    data = encode(photo())
    yield _bad("PNG with a wrong header checksum", data[:29] + bytes([data[29] ^ 1]) + data[30:])
    yield _bad("PNG with a flipped bit in its header", data[:17] + bytes([data[17] ^ 1]) + data[18:])
    yield _bad("PNG with a flipped bit in its pixels", data[:80] + bytes([data[80] ^ 1]) + data[81:])
    text = png_chunk(b"zTXt", b"Comment\x00\x07no such compression")
    yield _bad("PNG with a broken text behind its pixels", data[:-12] + text + data[-12:])
    yield _bad("PNG of bit depth 3", png(8, 8, 3, 0, bytes(32)))
    yield _bad("PNG of an unknown colour type", png(8, 8, 8, 5, bytes(80)))
    yield _bad("PNG without pixels", data[:33] + png_chunk(b"IEND"))
    yield _bad("PNG with too few pixels", png(1000, 1000, 8, 2, bytes(100)))
    jpeg = encode(photo(), "JPEG")
    frame = jpeg.find(b"\xff\xc0")
    yield _bad("JPEG without its last byte", jpeg[:-1])
    yield _bad("JPEG of 12 bits", jpeg[: frame + 4] + b"\x0c" + jpeg[frame + 5 :])
    yield _bad("JPEG of a lossless frame", jpeg[: frame + 1] + b"\xc3" + jpeg[frame + 2 :])
    yield _bad("JPEG without quantisation tables", jpeg.replace(b"\xff\xdb", b"\xff\xed"))
    yield _bad("JPEG without pixels", jpeg[:frame] + b"\xff\xd9")
    yield _bad("JPEG with two frames", jpeg[:-2] + jpeg[frame:])
    yield _bad("WebP of a wrong kind", encode(photo(), "WEBP").replace(b"VP8 ", b"VP9 "))


def _traps() -> Iterator[ImageCase]:
    yield _bad("PNG of 400 megapixels in 48 KB", bomb(20_000, 20_000), "image_too_large")
    yield _bad("PNG of 64 megapixels", png(8000, 8000, 8, 2, b""), "image_too_large")
    yield _bad("PNG of 2^31 by 2^31", png(2**31 - 1, 2**31 - 1, 8, 2, b""), "image_too_large")
    yield _bad("PNG of 40 megapixels without pixels", png(8000, 5000, 8, 2, b""))
    gif = b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0)
    yield _bad("GIF of 4 gigapixels", gif + b"\x08\x01\x00\x00;", "image_too_large")
    webp = b"VP8 \x0a\x00\x00\x00\x00\x00\x00\x9d\x01\x2a" + struct.pack("<HH", 16383, 16383)
    yield _bad("WebP of 268 megapixels", b"RIFF\x16\x00\x00\x00WEBP" + webp, "image_too_large")
    yield _bad("too many bytes", encode(photo(), "JPEG") + bytes(20 * 1024 * 1024), "image_too_large", 413)
    yield _bad("1 by 100,000", encode(Image.new("L", (1, 100_000))))
    yield _bad("100,000 by 1", encode(Image.new("L", (100_000, 1))))
    yield _bad("no width", png(0, 10, 8, 2, b""))
    yield _bad("no height", png(10, 0, 8, 2, b""))
    jpeg = encode(photo(), "JPEG")
    yield _bad("JPEG of 100,000 scans", jpeg_of_scans(100_000))
    yield _bad("JPEG of a million empty segments", b"\xff\xd8" + b"\xff\xfe\x00\x02" * 1_000_000)
    exif = b"\xff\xe1\x01\x98Exif\0\0" + bytes(400)
    yield _bad("JPEG of 40,000 EXIF blocks", jpeg[:2] + exif * 40_000 + jpeg[2:])
    resources = b"\xff\xed\xff\xffPhotoshop 3.0\0" + (b"8BIM\0\1" + bytes(6)) * 5460
    yield _bad("JPEG of a million Photoshop resources", jpeg[:2] + resources[: 2 + 0xFFFF] * 300 + jpeg[2:])
    plain = encode(photo("L"), "GIF")
    yield _bad("GIF of three million empty comments", plain[:781] + b"!\xfe\0" * 3_000_000 + plain[781:])
    pieces = b"!\xfe" + b"\x01c" * 1_000_000 + b"\0"
    yield _bad("GIF of a comment in a million pieces", plain[:781] + pieces + plain[781:])
    yield _bad("GIF of a gap", plain[:781] + bytes(10_000_000) + plain[781:])
    yield _bad("GIF of a gap behind its picture", plain[:-1] + bytes(10_000_000))
    yield _bad("JPEG of a gap", b"\xff\xd8\xff" + bytes(4_000_000))
    yield _bad("JPEG of a segment without length", b"\xff\xd8" + b"\xff\xfe\x00\x00" * 1_000_000)
    yield _bad("PNG of a million empty chunks", png(*SIZE, 8, 2, b"", png_chunk(b"prVt") * 1_000_000))
    text = png_chunk(b"zTXt", b"Comment\x00\x00" + zlib.compress(bytes(50_000_000)))
    yield _bad("PNG of a text that unpacks to 50 MB", png(*SIZE, 8, 2, b"", text))
    frames = [Image.new("RGB", SIZE, color) for color in ("red", "blue")]
    for kind in ("GIF", "PNG", "WEBP"):
        yield _bad(f"animated {kind}", encode(frames[0], kind, save_all=True, append_images=frames[1:]))


def _unusual() -> Iterator[ImageCase]:
    for kind in ("JPEG", "PNG", "WEBP", "GIF"):
        yield _good(kind, encode(photo(), kind))
    for mode in ("1", "L", "LA", "P", "RGBA", "I;16"):
        yield _good(
            f"PNG of mode {mode}", encode(photo("L").convert("I").convert(mode) if mode == "I;16" else photo(mode))
        )
    yield _good("PNG of 16-bit RGB", png(*SIZE, 16, 2, (b"\x00" + bytes(48 * 6)) * 36))
    yield _good("PNG of a palette with a hole", encode(photo("P"), transparency=3))
    yield _good("PNG of one frame in an animation", encode(photo(), save_all=True))
    yield _good("PNG without its end", encode(photo())[:-12])
    yield _good("PNG with something behind it", encode(photo()) + bytes(100))
    yield _good("PNG with a text named transparency", _after_header(encode(photo("L")), b"tEXt", b"transparency\x00no"))
    yield _good("CMYK JPEG", encode(photo("CMYK"), "JPEG"))
    yield _good("grey JPEG", encode(photo("L"), "JPEG"))
    yield _good("progressive JPEG", encode(photo(), "JPEG", progressive=True))
    yield _good("JPEG with something behind it", encode(photo(), "JPEG") + b"a film" * 100)
    yield _good("JPEG with previews", encode(photo(), "MPO", save_all=True, append_images=[photo()]))
    yield _good("WebP with alpha", encode(photo("RGBA"), "WEBP"))
    yield _good("lossless WebP", encode(photo(), "WEBP", lossless=True))
    yield _good("GIF with a hole", encode(photo("P"), "GIF", transparency=3))
    exif = Image.Exif()
    exif[0x0112] = 6
    yield _good("JPEG on its side", encode(photo().rotate(90, expand=True), "JPEG", exif=exif))


def _urls() -> Iterator[ImageCase]:
    data = encode(photo())
    text = base64.b64encode(data).decode()
    lines = base64.encodebytes(data).decode()
    assert text.endswith("=")
    assert "/" in text
    for name, url in {
        "wrong media type": f"data:image/jpeg;base64,{text}",
        "media type of another world": f"data:application/octet-stream;base64,{text}",
        "no media type": f"data:;base64,{text}",
        "parameters": f"data:image/png;charset=utf-8;name=a.png;base64,{text}",
        "upper case": f"DATA:IMAGE/PNG;BASE64,{text}",
        "base64 in lines": f"data:image/png;base64,{lines}",
        "white space around": f" \n data:image/png;base64,{text}\r\n",
        "no padding": f"data:image/png;base64,{text.rstrip('=')}",
    }.items():
        yield ImageCase(name, url, 200, None)
    for name, url in {
        "no URL": "",
        "no comma": "data:image/png;base64",
        "only data": "data:",
        "empty data": "data:,",
        "empty base64": "data:image/png;base64,",
        "not base64": f"data:image/png,{text}",
        "another encoding": f"data:image/png;base32,{text}",
        "raw base64": text,
        "bad letters": "data:image/png;base64,!!!",
        "letters of another script": "data:image/png;base64,картинка",
        "a lone letter": f"data:image/png;base64,{text.rstrip('=')}AAA"[:31],
        "too much padding": f"data:image/png;base64,{text}=",
        "padding inside": f"data:image/png;base64,{text[:20]}=={text[20:]}",
        "URL-safe base64": f"data:image/png;base64,{text.replace('/', '_').replace('+', '-')}",
        "percent-encoded": f"data:image/png;base64,{quote(text, safe='')}",
        "percent-encoded head": f"data:image%2Fpng%3Bbase64,{text}",
        "a data URL in a data URL": f"data:image/png;base64,data:image/png;base64,{text}",
        "a data URL as a picture": data_url(data_url(data).encode()),
        "file": "file:///etc/passwd",
        "ftp": "ftp://example.org/a.png",
        "blob": "blob:https://example.org/1",
        "a NUL": f"data:image/png;base64,\x00{text}",
    }.items():
        yield ImageCase(name, url)


def bomb(width: int, height: int) -> bytes:
    """48 KB that unpack to 48 MB, behind a header that claims more."""
    return png(width, height, 8, 2, bytes(48 * 1024 * 1024))


def _after_header(data: bytes, name: bytes, body: bytes) -> bytes:
    return data[:33] + png_chunk(name, body) + data[33:]
