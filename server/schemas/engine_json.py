"""Requests as JSON for the engine; the data URLs of images are put in last."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Any

from server.errors import InvalidRequestError


class Slots:
    """Stands in a payload for the data URLs of checked images (images/data_url.py).

    They are megabytes that need no escaping, and are put in when the rest is JSON.
    """

    def __init__(self) -> None:
        self._mark = secrets.token_hex(16)  # nobody's text can hold it
        self._urls: list[str] = []

    def add(self, url: str) -> str:
        """What stands in the payload for `url`. In the order in which they will appear in the JSON."""
        self._urls.append(url)
        return self._mark

    def fill(self, data: bytes) -> bytes:
        """The JSON with the URLs in their places."""
        first, *rest = data.split(self._mark.encode())
        pieces = [first]
        for url, piece in zip(self._urls, rest, strict=True):
            pieces += (url.encode("ascii"), piece)
        return b"".join(pieces)


def dump_json(payload: Mapping[str, Any]) -> bytes:
    """JSON for the engine.

    Raises:
        InvalidRequestError: a number is infinite, or has thousands of digits.
    """
    try:
        return json.dumps(payload, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except ValueError:
        raise InvalidRequestError("the request has a number that is too large") from None
