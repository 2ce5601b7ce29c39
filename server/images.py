"""A picture in a request: read from its data URL, checked, its size known.

The engine decodes trustingly (a 48 KB PNG of 400 megapixels is an HTTP 500 there, 16-bit grey turns white, an animation
silently loses all frames but one), so everything is decided here: a plain picture (8-bit grey or RGB, upright, one
frame) goes on byte for byte, any other is brought to that form and sent as PNG.

These functions block; the caller runs them in a thread. Pillow lets go of the interpreter lock while it decodes.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from io import BytesIO
from typing import Final

from PIL import ExifTags, Image, ImageOps

from server.errors import InvalidRequestError, PayloadTooLargeError
from server.settings import Settings

_WHITE_SPACE: Final = b" \t\r\n\f\v"
_16_BIT_TO_8_BIT: Final = 255 / 65535
_TURNED: Final = range(2, 9)
"""EXIF orientations that change the picture; 1 is upright, others are invalid and ignored by every reader."""


@dataclass(frozen=True, slots=True)
class CheckedImage:
    """A picture that decodes and is within the limits. `url` is what the engine gets; sizes as the model sees them."""

    height: int
    width: int
    url: str


def check_image(url: str, settings: Settings, param: str) -> CheckedImage:
    """Take a picture from its data URL.

    Args:
        param: path of the URL in the request, for the error object.

    Raises:
        InvalidRequestError: not a data URL, not a picture, broken, animated, or with too many pixels.
        PayloadTooLargeError: too many bytes.
    """
    data = _read_data_url(url, settings.max_image_bytes, param)
    kind = _sniff(data)
    if kind is None:
        raise InvalidRequestError("the image is not a JPEG, PNG, WebP or GIF file", param=param, code="invalid_image")
    try:
        picture = Image.open(BytesIO(data), formats=(kind,))
        _check_size(picture, settings, param)
        _check_single(picture, param)
        picture.load()
        upright = None if _is_plain(picture) else _normalise(picture)
    except InvalidRequestError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InvalidRequestError("the image has too many pixels", param=param, code="image_too_large") from None
    except Exception as error:
        # Pillow's readers raise almost anything on a broken file: OSError, SyntaxError, struct.error, IndexError, ...
        reason = str(error) or type(error).__name__
        raise InvalidRequestError(
            f"the image cannot be decoded ({kind}, {len(data)} bytes): {reason}", param=param, code="invalid_image"
        ) from None
    if upright is None:
        return CheckedImage(picture.height, picture.width, _data_url(data, kind))
    return CheckedImage(upright.height, upright.width, _data_url(_to_png(upright), "PNG"))


def _read_data_url(url: str, max_bytes: int, param: str) -> bytes:
    url = url.strip()
    scheme = url[:8].lower()
    if scheme.startswith(("http://", "https://")):
        raise InvalidRequestError(
            "this server does not fetch images yet; send the image itself as a data URL (data:image/png;base64,...)",
            param=param,
        )
    head, comma, payload = url.partition(",")
    if not scheme.startswith("data:") or not comma or not head.lower().rstrip().endswith(";base64"):
        raise InvalidRequestError("the image must be a base64 data URL (data:image/png;base64,...)", param=param)
    try:
        encoded = payload.encode("ascii").translate(None, _WHITE_SPACE)
        num_bytes = len(encoded) * 3 // 4 - encoded.count(b"=", -2)
        if num_bytes > max_bytes:
            raise PayloadTooLargeError(
                f"the image has {num_bytes} bytes; at most {max_bytes} are accepted",
                param=param,
                code="image_too_large",
            )
        return base64.b64decode(encoded + b"=" * (-len(encoded) % 4), validate=True)
    except (UnicodeEncodeError, binascii.Error):
        raise InvalidRequestError("the image's data URL is not valid base64", param=param) from None


def _sniff(data: bytes) -> str | None:
    """Pillow's name of the file's format, from its first bytes; the media type in the URL is often wrong."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    return None


def _check_size(picture: Image.Image, settings: Settings, param: str) -> None:
    """From the header alone: nothing has been decoded yet."""
    width, height = picture.size
    if width * height > settings.max_image_pixels:
        raise InvalidRequestError(
            f"the image has {width} x {height} pixels; at most {settings.max_image_pixels} in all are accepted",
            param=param,
            code="image_too_large",
        )
    if min(width, height) < 1 or max(width, height) > settings.max_image_aspect_ratio * min(width, height):
        raise InvalidRequestError(
            f"the image has {width} x {height} pixels; one side may be at most "
            f"{settings.max_image_aspect_ratio:g} times the other",
            param=param,
            code="invalid_image",
        )


def _check_single(picture: Image.Image, param: str) -> None:
    # MPO is what some cameras write: a JPEG followed by previews of the same scene. Its first frame is the picture.
    if picture.format != "MPO" and getattr(picture, "n_frames", 1) > 1:
        raise InvalidRequestError(
            "the image is animated; send the frame that is meant", param=param, code="invalid_image"
        )


def _is_plain(picture: Image.Image) -> bool:
    return (
        picture.mode in ("L", "RGB")
        and picture.format in ("JPEG", "PNG", "WEBP")
        and not picture.has_transparency_data
        and _orientation(picture) == 1
    )


def _orientation(picture: Image.Image) -> int | None:
    """1 for upright, 2..8 for turned, None if the EXIF block is broken (the picture is then taken as it is)."""
    try:
        value = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        # As for the pixels: a broken block can raise anything, and here it need not cost the picture.
        return None
    return value if value in _TURNED else 1


def _normalise(picture: Image.Image) -> Image.Image:
    """8-bit grey or RGB, upright, transparency on white."""
    image = picture
    if _orientation(picture) in _TURNED:
        image = ImageOps.exif_transpose(picture)
    if image.mode.startswith("I"):
        # Pillow clips at 255 where it converts to 8 bits. A transparent colour (tRNS) of 16-bit grey is ignored.
        image = image.convert("I").point(lambda value: value * _16_BIT_TO_8_BIT + 0.5).convert("L")
        image.info.pop("transparency", None)
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, "white")
        opaque.alpha_composite(image.convert("RGBA"))
        return opaque.convert("RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _to_png(image: Image.Image) -> bytes:
    image.info = {}  # else Pillow would write EXIF and colour profile along
    buffer = BytesIO()
    image.save(buffer, "PNG", compress_level=1)  # it only travels to the engine
    return buffer.getvalue()


def _data_url(data: bytes, kind: str) -> str:
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode('ascii')}"
