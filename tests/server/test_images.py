"""What happens to a picture between the client and the engine."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Callable

import pytest
from pictures import data_url, decode, encode
from PIL import Image, ImageCms

from server.errors import GatewayError, InvalidRequestError, PayloadTooLargeError
from server.images import CheckedImage, check_image
from server.settings import Settings

RED = (255, 0, 0)


def check(data: bytes, settings: Settings | None = None) -> CheckedImage:
    return check_image(data_url(data), settings or Settings(), "here")


def halves(mode: str, left: object, right: object, width: int = 40, height: int = 20) -> Image.Image:
    image = Image.new(mode, (width, height), right)  # type: ignore[arg-type]
    image.paste(left, (0, 0, width // 2, height))  # type: ignore[arg-type]
    return image


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = orientation
    return block


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_plain_pictures_go_on_byte_for_byte(kind: str, mode: str) -> None:
    data = encode(Image.new(mode, (30, 20), 200 if mode == "L" else (200, 10, 10)), kind)
    checked = check_image(data_url(data, "image/x-wrong"), Settings(), "here")
    assert base64.b64decode(checked.url.partition(",")[2]) == data
    assert checked.url.startswith(f"data:image/{kind.lower()};base64,")
    assert (checked.height, checked.width) == (20, 30)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", [0, 1, 3, 6, 8, 9])
def test_exif_orientation_is_applied_exactly_once(kind: str, orientation: int) -> None:
    data = encode(halves("RGB", RED, "blue"), kind, exif=exif(orientation))
    checked = check(data)
    sent = decode(checked.url)
    turned = orientation in (6, 8)
    assert (checked.width, checked.height) == sent.size == ((20, 40) if turned else (40, 20))
    red_at = {3: (35, 10), 6: (10, 5), 8: (10, 35)}.get(orientation, (5, 10))
    red, _, blue = sent.convert("RGB").getpixel(red_at)  # type: ignore[misc]
    assert red > 200 > 50 > blue
    if orientation in (3, 6, 8):
        assert sent.getexif().get(0x0112, 1) == 1, "the engine would turn it once more"
    else:
        assert base64.b64decode(checked.url.partition(",")[2]) == data


def _grey_16() -> bytes:
    image = Image.new("I;16", (40, 20), 128 * 257)
    return encode(image)


def _palette_with_hole() -> bytes:
    image = halves("RGB", RED, "blue").convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
    return encode(image, transparency=image.getpixel((30, 5)))


@pytest.mark.parametrize(
    ("make", "mode", "left", "right"),
    [
        (lambda: encode(halves("RGBA", (*RED, 255), (0, 0, 0, 0))), "RGB", RED, (255, 255, 255)),
        (lambda: encode(halves("LA", (10, 255), (10, 0))), "RGB", (10, 10, 10), (255, 255, 255)),
        (lambda: encode(halves("RGB", RED, "blue"), transparency=(0, 0, 255)), "RGB", RED, (255, 255, 255)),
        (_palette_with_hole, "RGB", RED, (255, 255, 255)),
        (lambda: encode(halves("RGB", RED, "blue").convert("P")), "RGB", RED, (0, 0, 255)),
        (lambda: encode(halves("RGB", RED, "blue").convert("P"), "GIF"), "RGB", RED, (0, 0, 255)),
        (lambda: encode(halves("1", 1, 0)), "L", 255, 0),
        (_grey_16, "L", 128, 128),
        (lambda: encode(halves("RGBA", (*RED, 255), (0, 0, 0, 0)), "WEBP", lossless=True), "RGB", RED, (255,) * 3),
        (lambda: encode(Image.new("CMYK", (40, 20), (0, 0, 0, 0)), "JPEG"), "RGB", (255,) * 3, (255,) * 3),
    ],
)
def test_other_pictures_become_plain(make: Callable[[], bytes], mode: str, left: object, right: object) -> None:
    checked = check(make())
    sent = decode(checked.url)
    assert (sent.format, sent.mode, sent.size) == ("PNG", mode, (40, 20))
    assert not sent.has_transparency_data
    assert (sent.getpixel((5, 5)), sent.getpixel((35, 5))) == (left, right)


def test_white_space_and_missing_padding_in_a_data_url_are_accepted() -> None:
    data = encode(Image.new("RGB", (31, 20), "red"))
    text = base64.encodebytes(data).decode().rstrip("=\n").replace("\n", " \r\n\t")
    checked = check_image(f" DATA:image/png;Base64,{text}\n", Settings(), "here")
    assert base64.b64decode(checked.url.partition(",")[2]) == data


def _animation(kind: str) -> bytes:
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    return encode(frames[0], kind, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations_are_refused(kind: str) -> None:
    with pytest.raises(InvalidRequestError, match="animated"):
        check(_animation(kind))


def test_previews_in_a_camera_file_do_not_make_it_an_animation() -> None:
    checked = check(_animation("MPO"))
    red, _, blue = decode(checked.url).getpixel((5, 5))  # type: ignore[misc]
    assert red > 200 > 50 > blue


def _bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises much and whose body holds nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(8000, 8000), (10_000, 10_000), (20_000, 20_000)])
def test_too_many_pixels_are_refused_from_the_header(width: int, height: int) -> None:
    with pytest.raises(InvalidRequestError, match="pixels") as error:
        check(_bomb(width, height))
    assert error.value.code == "image_too_large"


def test_limits_hold_to_the_pixel_and_the_byte() -> None:
    data = encode(Image.new("RGB", (100, 50)))
    assert check(data, Settings(max_image_pixels=5000, max_image_bytes=len(data)))
    with pytest.raises(InvalidRequestError, match="at most 4999"):
        check(data, Settings(max_image_pixels=4999))
    with pytest.raises(PayloadTooLargeError, match=f"{len(data)} bytes"):
        check(data, Settings(max_image_bytes=len(data) - 1))


def test_extreme_shapes_are_refused() -> None:
    assert check(encode(Image.new("RGB", (100, 1))))
    with pytest.raises(InvalidRequestError, match="100 times"):
        check(encode(Image.new("RGB", (101, 1))))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_truncated_and_corrupt_files_are_refused(kind: str) -> None:
    data = encode(Image.effect_noise((64, 64), 80).convert("L"), kind)
    for broken in (data[: len(data) // 2], data[:40], data[:20] + bytes(len(data) - 20)):
        with pytest.raises(InvalidRequestError) as error:
            check(broken)
        assert error.value.param == "here"
        assert error.value.code == "invalid_image"


@pytest.mark.parametrize("data", [b"", b"hello", b"<svg/>", b"BM" + bytes(60), b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"])
def test_files_that_are_no_pictures_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        check(data)


@pytest.mark.parametrize(
    "url", ["", "data:", "data:image/png,aGk=", "data:image/png;base64", "data:image/png;base64,a", "ftp://a/b", "é"]
)
def test_urls_that_are_no_data_urls_are_refused(url: str) -> None:
    with pytest.raises(GatewayError):
        check_image(url, Settings(), "here")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_does_not_cost_the_picture() -> None:
    data = encode(Image.new("RGB", (20, 10), RED), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    assert check(data).width == 20


def test_colour_profiles_and_notes_do_not_travel_to_the_engine() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    sent = decode(check(encode(Image.new("RGB", (20, 10), RED).convert("P"), icc_profile=profile, exif=exif(6))).url)
    assert not {"icc_profile", "exif", "Comment"} & sent.info.keys()
