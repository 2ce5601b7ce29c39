"""What happens to an image between the client and the engine."""

from __future__ import annotations

import base64
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO

import pytest
from bad_images import SIZE, ImageCase, bomb, image_cases, jpeg_of_scans, photo
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from images import data_url, decode, decode_as_engine, encode, png, png_chunk
from PIL import Image, ImageChops, ImageCms, ImageOps

from server.errors import GatewayError, InvalidRequestError, PayloadTooLargeError
from server.images.check import CheckedImage, check_image, check_image_bytes
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
def test_plain_images_go_on_byte_for_byte(kind: str, mode: str) -> None:
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
def test_other_images_become_plain(make: Callable[[], bytes], mode: str, left: object, right: object) -> None:
    checked = check(make())
    sent = decode(checked.url)
    assert (sent.format, sent.mode, sent.size) == ("BMP", mode, (40, 20))
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


@pytest.mark.parametrize(("width", "height"), [(8000, 8000), (10_000, 10_000), (20_000, 20_000)])
def test_too_many_pixels_are_refused_from_the_header(width: int, height: int) -> None:
    with pytest.raises(InvalidRequestError, match="pixels") as error:
        check(png(width, height, 8, 2, b""))
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
def test_files_that_are_no_images_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        check(data)


@pytest.mark.parametrize(
    "url", ["", "data:", "data:image/png,aGk=", "data:image/png;base64", "data:image/png;base64,a", "ftp://a/b", "é"]
)
def test_urls_that_are_no_data_urls_are_refused(url: str) -> None:
    with pytest.raises(GatewayError):
        check_image(url, Settings(), "here")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_does_not_cost_the_image() -> None:
    data = encode(Image.new("RGB", (20, 10), RED), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    assert check(data).width == 20


def test_colour_profiles_and_notes_do_not_travel_to_the_engine() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    sent = decode(check(encode(Image.new("RGB", (20, 10), RED).convert("P"), icc_profile=profile, exif=exif(6))).url)
    assert not {"icc_profile", "exif", "Comment"} & sent.info.keys()


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in image_cases()])
def test_every_case_of_the_corpus_has_its_outcome(case: ImageCase) -> None:
    if case.status == 200:
        checked = check_image(case.url, Settings(), "here")
        assert (checked.width, checked.height) == SIZE == decode_as_engine(checked.url).size
        return
    with pytest.raises(GatewayError) as error:
        check_image(case.url, Settings(), "here")
    assert (error.value.status, error.value.code, error.value.param) == (case.status, case.code, "here")
    assert "object at" not in error.value.message
    assert len(error.value.message) < 200


def difference(left: Image.Image, right: Image.Image) -> int:
    """The largest of all samples, in steps of 8 bits."""
    assert left.size == right.size
    return max(high for _, high in ImageChops.difference(left.convert("RGB"), right.convert("RGB")).getextrema())


def as_seen(data: bytes) -> Image.Image:
    """What a person sees: upright, on white."""
    image = ImageOps.exif_transpose(Image.open(BytesIO(data)))
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF"]),
    mode=st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"]),
    orientation=st.integers(0, 9),
    options=st.fixed_dictionaries(
        {}, optional={"progressive": st.just(True), "lossless": st.booleans(), "optimize": st.booleans()}
    ),
    tail=st.sampled_from([b"", b"\x00", b"tail" * 40]),
    as_text=st.booleans(),
)
def test_the_engine_sees_what_a_person_sees(
    kind: str, mode: str, orientation: int, options: dict[str, bool], tail: bytes, as_text: bool
) -> None:
    assume(mode not in ("LA", "P", "RGBA") if kind == "JPEG" else mode != "CMYK")
    image = photo(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.linear_gradient("L").resize(SIZE))
    data = encode(image, kind, **({} if kind == "GIF" else {"exif": exif(orientation)}), **options) + tail
    checked = check(data) if as_text else check_image_bytes(data, Settings(), "here")
    seen = decode_as_engine(checked.url)
    assert seen.size == (checked.width, checked.height)
    assert difference(seen, as_seen(data)) <= 1
    assert checked.num_bytes == len(data)
    upright = kind == "GIF" or orientation not in range(2, 9)
    plain = Image.open(BytesIO(data)).mode in ("L", "RGB") and kind != "GIF" and upright
    assert checked.passed_through == plain == (base64.b64decode(checked.url.partition(",")[2]) == data)


@pytest.mark.parametrize("interlace", [0, 1])
@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("hole", [False, True])
def test_grey_of_any_depth_is_scaled_and_its_hole_is_white(depth: int, hole: bool, interlace: int) -> None:
    top = 2**depth - 1
    values = [0, top // 3, top * 2 // 3, top]
    for value in values:
        # One pixel, which is the same with and without interlacing.
        row = b"\x00" + (value << (-depth % 8)).to_bytes(max(1, depth // 8), "big")
        chunks = [png_chunk(b"tRNS", values[0].to_bytes(2, "big"))] if hole else []
        seen = decode_as_engine(check(png(1, 1, depth, 0, row, *chunks, interlace=interlace)).url)
        expected = 255 if hole and value == values[0] else round(value * 255 / top)
        assert seen.getpixel((0, 0)) == (expected,) * 3


@pytest.mark.parametrize(("colors", "samples"), [(2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_of_colour_are_scaled(colors: int, samples: int) -> None:
    row = b"\x00" + b"\x40\x00" * (samples - (colors > 3)) + b"\xff\xff" * (colors > 3)
    assert decode_as_engine(check(png(1, 1, 16, colors, row)).url).getpixel((0, 0)) == (64, 64, 64)


def test_a_transparent_colour_of_sixteen_bits_is_white() -> None:
    row = b"\x00" + b"\x40\x40\x00\x00\x00\x00" + b"\x40\x40\x00\x00\xff\xff"
    seen = decode_as_engine(check(png(2, 1, 16, 2, row, png_chunk(b"tRNS", b"\x40\x40" + bytes(4)))).url)
    assert [seen.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (64, 0, 255)]


@pytest.mark.parametrize(
    "behind", [b"eXIf" + exif(6).tobytes()[6:], b'iTXtXML:com.adobe.xmp\x00\x00\x00\x00\x00tiff:Orientation="6"']
)
def test_an_orientation_behind_the_pixels_counts(behind: bytes) -> None:
    data = encode(halves("RGB", RED, "blue"))
    checked = check(data[:-12] + png_chunk(behind[:4], behind[4:]) + data[-12:])
    assert (checked.width, checked.height) == (20, 40)
    assert decode_as_engine(checked.url).getpixel((10, 5)) == RED


def test_an_orientation_in_xmp_counts_where_exif_has_none() -> None:
    data = encode(halves("RGB", RED, "blue"), "JPEG", xmp=b'<x tiff:Orientation="6"/>')
    checked = check(data)
    assert (checked.width, checked.height) == (20, 40) == decode_as_engine(checked.url).size


def test_a_large_preview_before_the_pixels_does_not_hide_the_header() -> None:
    data = encode(photo(), "JPEG")
    noise = bytes(65_000)
    data = data[:2] + (b"\xff\xe2" + (len(noise) + 2).to_bytes(2, "big") + noise) * 20 + data[2:]
    assert check(data).passed_through


def _photo_cd_and_png() -> bytes:
    return png(*SIZE, 8, 2, (b"\x00" + bytes(144)) * 36, png_chunk(b"prVt", bytes(2048 - 41) + b"PCD_" + bytes(2000)))


def _photo_cd_and_webp() -> bytes:
    data = encode(photo(), "WEBP", icc_profile=bytes(4000))
    return data[:2048] + b"PCD_" + data[2052:]


def _film_and_jpeg() -> bytes:
    """A JPEG whose first segment makes it an Autodesk animation of 10 x 10, too."""
    film = struct.pack("<HHH", 1, 10, 10).ljust(0x11AF - 2, b"\x00")
    data = encode(photo(), "JPEG")
    return data[:2] + b"\xff\xe0\x11\xaf" + film + data[2:]


@pytest.mark.parametrize("make", [_photo_cd_and_png, _photo_cd_and_webp, _film_and_jpeg])
def test_a_file_that_the_engine_takes_for_another_kind_is_written_anew(make: Callable[[], bytes]) -> None:
    with suppress(Exception):  # the engine may choke as well
        assert decode_as_engine(data_url(make())).size != SIZE
    checked = check(make())
    assert not checked.passed_through
    assert decode_as_engine(checked.url).size == (checked.width, checked.height) == SIZE


def test_a_jpeg_may_have_as_many_scans_as_real_ones_have() -> None:
    assert check(jpeg_of_scans(80)).passed_through
    with pytest.raises(InvalidRequestError, match="too many scans"):
        check(jpeg_of_scans(101))


_PEAK = """
import sys
from pathlib import Path
from server.errors import GatewayError
from server.images.check import check_image_bytes
from server.settings import Settings
data = sys.stdin.buffer.read()
peak = lambda: 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
before = peak()
try:
    fate = "passed" if check_image_bytes(data, Settings(), "here").passed_through else "normalised"
except GatewayError:
    fate = "refused"
print(fate, peak() - before)
"""


def peak_of(data: bytes) -> tuple[str, int]:
    """What became of an image in a process of its own, and how many bytes more the process held meanwhile."""
    done = subprocess.run([sys.executable, "-c", _PEAK], input=data, capture_output=True, check=True)
    fate, peak = done.stdout.split()
    return fate.decode(), int(peak)


reads_the_peak = pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")


@reads_the_peak
@pytest.mark.parametrize("mode", ["RGBA", "I;16", "CMYK"])
def test_normalising_takes_little_more_than_four_times_the_pixels(mode: str) -> None:
    data = encode(Image.new(mode, (5000, 3000)), "JPEG" if mode == "CMYK" else "PNG")
    fate, peak = peak_of(data)
    assert fate == "normalised"
    pixels = 3 * 5000 * 3000
    # A fifth copy would show; pages of two megabytes, which some machines give, do not.
    assert pixels / 3 < peak < 4.5 * pixels


@reads_the_peak
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_plain_image_is_never_held_as_pixels(kind: str) -> None:
    fate, peak = peak_of(encode(Image.new("RGB", (7000, 7000), RED), kind))
    assert fate == "passed"
    assert peak < 7000 * 7000 / 4


@reads_the_peak
def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    fate, peak = peak_of(bomb(20_000, 20_000))
    assert fate == "refused"
    assert peak < 20_000 * 20_000 / 40


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_exif_values_that_overlap_are_not_copied_each() -> None:
    size, number = 2_000_000, 100
    values = b"".join(struct.pack(">HHLL", 1000 + tag, 1, size, 0) for tag in range(number))
    exif = b"MM\0*\0\0\0\x08" + struct.pack(">H", number) + values + bytes(size)
    picture = png(1, 1, 8, 2, bytes(4), png_chunk(b"eXIf", exif))
    tracemalloc.start()
    try:
        check(picture)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10 * len(picture)
