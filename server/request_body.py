"""Bytes -> a typed request. Every route that takes JSON begins here."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Any, Final, TypeVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError

from server.engine_fields import part_refusal, refusal
from server.errors import GatewayError, InvalidRequestError, PayloadTooLargeError, from_validation

MAX_MEMBERS: Final = 100_000
"""Objects, lists and named values in a body. Each takes microseconds, in which nobody else is served, and up to a
kilobyte: 60 MB of empty messages would take half a minute and 4 GB."""
MAX_VALUES: Final = 4_000_000
"""Values that a body may list, such as token ids; they are lighter."""


class RequestBody(BaseModel):
    """A request's fields. Types are vLLM's, so that nothing is refused which the engine takes.

    Validation turns 1 into 1.0 where a field is a float; the engine gets what was sent (`sent`).
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    _sent: dict[str, Any] = PrivateAttr(default_factory=dict)

    @property
    def sent(self) -> Mapping[str, Any]:
        """The top-level fields as they came; without those that were null, which asks for nothing."""
        return self._sent


Body = TypeVar("Body", bound=RequestBody)


def parse_body(model: type[Body], body: bytes) -> Body:
    """Read a request body.

    Raises:
        InvalidRequestError: not JSON, an unknown field, or one of the wrong shape.
        PayloadTooLargeError: too many values.
    """
    data = read_object(body)
    for name in data:
        if name not in model.model_fields:
            raise InvalidRequestError(refusal(name, model.model_fields), param=name)
    try:
        request = model.model_validate(data)
    except ValidationError as error:
        raise explain(error) from None
    request._sent = data
    return request


def read_object(body: bytes) -> dict[str, Any]:
    """The JSON object of a body, without fields that are null.

    Raises:
        InvalidRequestError: it is something else.
        PayloadTooLargeError: it has too many values.
    """
    _check_number_of_values(body)
    try:
        data = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequestError(f"the request body is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise InvalidRequestError("the request body must be a JSON object")
    # A client library that spells out its defaults sends null.
    return {name: value for name, value in data.items() if value is not None}


def _check_number_of_values(body: bytes) -> None:
    # Those in texts count as well, which is no loss: a text with so many has more tokens than any model takes. Base64
    # has none of them.
    num_members = sum(map(body.count, (b"{", b"[", b":")))
    if num_members > MAX_MEMBERS or body.count(b",") > MAX_VALUES:
        raise PayloadTooLargeError(
            f"the request body has too many values: at most {MAX_MEMBERS} of the signs '{{', '[' and ':' together, "
            f"and {MAX_VALUES} commas, are accepted",
            code="too_many_values",
        )


def explain(error: ValidationError) -> GatewayError:
    """The first complaint of pydantic as a sentence, better than its own for fields that do not exist."""
    general = from_validation(error)
    first = error.errors(include_url=False, include_input=False)[0]
    if first["loc"][-1:] == ("[key]",):
        param = str(first["loc"][0])
        return InvalidRequestError(f"{param}: {first['loc'][-2]!r} is no token id", param=param)
    if first["type"] != "extra_forbidden":
        return general
    *above, unknown = first["loc"]
    inside = str(above[-1]) if above else ""
    if "content" in above:
        return InvalidRequestError(part_refusal(str(unknown), inside=inside), param=general.param)
    return InvalidRequestError(f"unknown field {unknown!r} in {inside!r}", param=general.param)


class Slots:
    """Stands in a payload for the data URLs of checked pictures (data_url.py).

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
