"""Bytes -> a typed request. Every route that takes JSON begins here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Final, Self

import pydantic_core
from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError

from server.errors import GatewayError, InvalidRequestError, PayloadTooLargeError, first_complaint
from server.schemas.refusals import part_refusal, refusal

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

    takes_images: ClassVar[bool] = False
    withheld_fields: ClassVar[frozenset[str]] = frozenset()
    """The fields that the engine does not get: they change nothing."""

    _sent: dict[str, Any] = PrivateAttr(default_factory=dict)

    @property
    def sent(self) -> Mapping[str, Any]:
        """The top-level fields as they came; without those that were null, which asks for nothing."""
        return self._sent

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Read a request body.

        Raises:
            InvalidRequestError: not JSON, an unknown field, one of the wrong shape, or one that clients may not set.
            PayloadTooLargeError: too many values.
        """
        data = _read_object(body)
        cls.refuse_fields(data)
        try:
            request = cls.model_validate(data)
        except ValidationError as error:
            raise _explain(error) from None
        request._sent = data
        request.check()
        return request

    @classmethod
    def refuse_fields(cls, data: Mapping[str, Any]) -> None:
        """Raises InvalidRequestError for a top-level field that is not served, before any is validated."""
        for name in data:
            if name not in cls.model_fields:
                reason = refusal(name, cls.model_fields, cls.withheld_fields, cls.takes_images)
                raise InvalidRequestError(reason, param=name)

    def check(self) -> None:
        """Raises InvalidRequestError for fields that are valid one by one, but not together."""


def _read_object(body: bytes) -> dict[str, Any]:
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
            f"the request body is too complex (limit: {MAX_MEMBERS:,} objects, lists and keys; {MAX_VALUES:,} values)",
            code="too_many_values",
        )


def _explain(error: ValidationError) -> GatewayError:
    """The first complaint of pydantic as a sentence, better than its own for fields that do not exist."""
    location, kind, reason = complaint = first_complaint(error)
    param = complaint.path
    if location[-1:] == ("[key]",):
        field = str(location[0])
        return InvalidRequestError(f"{field}: {location[-2]!r} is no token id", param=field)
    if kind == "value_error":
        return InvalidRequestError(reason, param=param)
    if kind != "extra_forbidden":
        return InvalidRequestError(f"{param or 'the request body'}: {reason}", param=param)
    *above, unknown = location
    inside = str(above[-1]) if above else ""
    if "content" in above:
        return InvalidRequestError(part_refusal(str(unknown), inside=inside), param=param)
    return InvalidRequestError(f"unknown field {unknown!r} in {inside!r}", param=param)
