"""Images as base64 data URLs: read from the request, written for the engine."""

from __future__ import annotations

import binascii
from dataclasses import dataclass
from typing import Final

import pybase64

from server.errors import InvalidRequestError, PayloadTooLargeError

_WHITE_SPACE: Final = b" \t\r\n\f\v"
_STEP: Final = 3 * 1024 * 1024
"""Bytes encoded at a time; a multiple of three, so that the pieces join without padding."""


@dataclass(frozen=True, slots=True)
class DataUrl:
    """`data` is the file, `encoded` its base64 text in a form that the engine takes, `url` what the client sent."""

    data: bytes
    encoded: str
    url: str

    def as_kind(self, kind: str) -> str:
        """The same file under its true media type; the client's own string if that is right, to save a copy."""
        head = _head(kind)
        if self.url.startswith(head) and len(self.url) == len(head) + len(self.encoded):
            return self.url
        return head + self.encoded


def read_data_url(url: str, max_bytes: int, param: str) -> DataUrl:
    """Decode a data URL, as strictly as the engine does once white space is gone and padding is there.

    Raises:
        InvalidRequestError: not a data URL, or not base64.
        PayloadTooLargeError: more than `max_bytes` in the file.
    """
    head, comma, payload = url.strip().partition(",")
    head = head.lower().rstrip()
    if not head.startswith("data:") or not comma or not head.endswith(";base64"):
        raise InvalidRequestError(
            "the image must be a base64 data URL (data:image/png;base64,...)", param=param, code="invalid_image"
        )
    try:
        if _num_bytes(payload) <= max_bytes:
            return DataUrl(pybase64.b64decode(payload, validate=True), payload, url)
    except ValueError:
        pass  # most often for white space or for want of padding, and both are accepted
    try:
        encoded = payload.encode("ascii").translate(None, _WHITE_SPACE)
        check_num_bytes(_num_bytes(encoded), max_bytes, param)
        encoded += b"=" * (-len(encoded) % 4)
        return DataUrl(pybase64.b64decode(encoded, validate=True), encoded.decode("ascii"), url)
    except (UnicodeEncodeError, binascii.Error):
        raise InvalidRequestError(
            "the image's data URL is not valid base64 (A-Z, a-z, 0-9, + and /, padded with =)",
            param=param,
            code="invalid_image",
        ) from None


def check_num_bytes(num_bytes: int, max_bytes: int, param: str) -> None:
    """Raises PayloadTooLargeError for a file that is too large."""
    if num_bytes > max_bytes:
        raise PayloadTooLargeError(
            f"the image has {num_bytes} bytes; at most {max_bytes} are accepted", param=param, code="image_too_large"
        )


def write_data_url(kind: str, data: bytes | memoryview) -> str:
    """The data URL of an image's file; in pieces, since a large image would otherwise be held four times over."""
    url = bytearray(_head(kind), "ascii")
    for start in range(0, len(data), _STEP):
        url += pybase64.b64encode(data[start : start + _STEP])
    return url.decode("ascii")


def _head(kind: str) -> str:
    return f"data:image/{kind.lower()};base64,"


def _num_bytes(encoded: str | bytes) -> int:
    padding = encoded[-2:].count("=") if isinstance(encoded, str) else encoded[-2:].count(b"=")
    return len(encoded) * 3 // 4 - padding
