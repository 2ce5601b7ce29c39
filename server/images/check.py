"""An image in a request: checked, its size known, converted where the engine would misread it.

The engine decodes trustingly (a 48 KB PNG of 400 megapixels is an HTTP 500 there, 16-bit grey turns white, an animation
silently loses all frames but one), so everything is decided here:

1. decode the base64 text, as strictly as the engine             (data_url.py)
2. refuse traps, by the file's structure                      (structure.py)
3. read the header: size, kind, colours, orientation, frames     (Pillow)
4. a canonical image (8-bit grey or RGB, upright, one frame) in a whole file is passed on byte for byte, undecoded
5. any other is decoded; what is not canonical is normalised     (pixels.py) and sent as a bitmap or PNG

Damage inside the compressed pixels of a canonical image, with nothing missing and all checksums right, is found by the
engine only; it answers 400. Colour profiles are ignored, as the engine ignores them.

These functions block; the caller runs them in a thread. Pillow lets go of the interpreter lock while it decodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from typing import Final

from PIL import ExifTags, Image, ImageFile

from server.errors import GatewayError, InvalidRequestError
from server.images.data_url import DataUrl, check_num_bytes, read_data_url, write_data_url
from server.images.pixels import normalise, to_file
from server.images.structure import BoundedFile, BrokenImageError, is_whole
from server.settings import Settings

_TURNED: Final = range(2, 9)
"""EXIF orientations that change the image; 1 is upright, others are invalid and ignored by every reader."""

_ENGINE_ORDER: Final = ("FLI", "GBR", "IM", "IMT", "IPTC", "JPEG", "PCD", "PNG", "SPIDER", "TGA", "WEBP")
"""The engine tries its formats by name (vllm/multimodal/image.py), and some are recognised by next to nothing. A file
that is a JPEG, PNG or WebP here must not be another one there; these are those that could come first."""


@dataclass(frozen=True, slots=True)
class CheckedImage:
    """An image within the limits.

    `url` is what the engine gets; height and width as the model sees them, turned upright. `num_bytes` is the size of
    the file as it came, and with `passed_through` the engine gets that file.
    """

    height: int
    width: int
    url: str
    num_bytes: int = 0
    passed_through: bool = False


class DecodingNeededError(Exception):
    """An image that has to be decoded, and has too many pixels for the caller."""

    def __init__(self, num_pixels: int) -> None:
        self.num_pixels = num_pixels


def check_image(url: str, settings: Settings, param: str, *, most_decoded: int | None = None) -> CheckedImage:
    """Take an image from its data URL.

    Args:
        param: path of the URL in the request, for the error object.
        most_decoded: pixels; an image with more is not decoded. None for no limit.

    Raises:
        DecodingNeededError: only decoding the image would show what it is.
        InvalidRequestError: not a data URL, not an image, broken, animated, or with too many pixels.
        PayloadTooLargeError: too many bytes.
    """
    source = read_data_url(url, settings.max_image_bytes, param)
    return _check(source.data, source, settings, param, most_decoded)


def check_image_bytes(data: bytes, settings: Settings, param: str, *, most_decoded: int | None = None) -> CheckedImage:
    """Take an image from its file. Arguments and errors as for `check_image`."""
    check_num_bytes(len(data), settings.max_image_bytes, param)
    return _check(data, None, settings, param, most_decoded)


def _check(
    data: bytes, source: DataUrl | None, settings: Settings, param: str, most_decoded: int | None
) -> CheckedImage:
    kind = _sniff(data)
    if kind is None:
        what = "is not a JPEG, PNG, WebP or GIF file" if data else "is empty"
        raise InvalidRequestError(f"the image {what}", param=param, code="invalid_image")
    try:
        whole = is_whole(data, kind)
        image = _open(data, kind)
        _check_size(image, settings, param)
        _check_single(image, param)
        passes = whole and _is_canonical(image, _orientation(image)) and _is_kind_for_engine(data)
        if not passes:
            num_pixels = image.width * image.height
            if most_decoded is not None and num_pixels > most_decoded:
                raise DecodingNeededError(num_pixels)
            # Anew, since what Pillow has read of the orientation so far it would not read again.
            image = _open(data, kind)
            image.load()
            orientation = _orientation(image)
            passes = _is_canonical(image, orientation) and _is_kind_for_engine(data)
        if passes:
            url = source.as_kind(kind) if source else write_data_url(kind, data)
            return CheckedImage(image.height, image.width, url, len(data), passed_through=True)
        canonical = normalise(image, orientation or 1, data[24] if kind == "PNG" else 8)
        height, width = canonical.height, canonical.width
        return CheckedImage(height, width, write_data_url(*to_file(canonical)), len(data), passed_through=False)
    except (GatewayError, DecodingNeededError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InvalidRequestError("the image has too many pixels", param=param, code="image_too_large") from None
    except Exception as error:
        # Pillow's readers raise almost anything on a broken file (OSError, SyntaxError, struct.error, IndexError, ...),
        # in words for programmers.
        reason = str(error) if isinstance(error, BrokenImageError) else "is broken, incomplete or of an unusual kind"
        raise InvalidRequestError(
            f"the image cannot be decoded: its {kind} file ({len(data)} bytes) {reason}",
            param=param,
            code="invalid_image",
        ) from None


def _open(data: bytes, kind: str) -> ImageFile.ImageFile:
    return Image.open(BoundedFile(data) if kind == "GIF" else BytesIO(data), formats=(kind,))


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


def _is_kind_for_engine(data: bytes) -> bool:
    try:
        return Image.open(BytesIO(data), formats=_ENGINE_ORDER).format in ("JPEG", "MPO", "PNG", "WEBP")
    except Exception:
        # A reader that comes first chokes on the file; it would do so in the engine.
        return False


def _check_size(image: Image.Image, settings: Settings, param: str) -> None:
    """From the header alone: nothing has been decoded yet."""
    width, height = image.size
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


def _check_single(image: Image.Image, param: str) -> None:
    # MPO is what some cameras write: a JPEG followed by previews of the same scene. Its first frame is the image.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise InvalidRequestError("the image is animated; send a single frame", param=param, code="invalid_image")


def _is_canonical(image: Image.Image, orientation: int | None) -> bool:
    return (
        image.mode in ("L", "RGB")
        and image.format in ("JPEG", "MPO", "PNG", "WEBP")
        and not image.has_transparency_data
        and orientation == 1
    )


def _orientation(image: Image.Image) -> int | None:
    """1 for upright, 2..8 for turned, None if the EXIF block is broken (the image is then taken as it is)."""
    try:
        # Not the PNG reader's own method, which decodes the pixels to find a block behind them.
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:
        # As for the pixels: a broken block can raise anything, and here it need not cost the image.
        return None
    return value if value in _TURNED else 1
