"""The request on the wire: OpenAI's chat completion, our field, and what is refused before the engine could see it.

What the gateway acts on is typed; other fields of OpenAI's and vLLM's API pass through to the engine, except those that
reach into its insides.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Final, Literal, TypeAlias

import pydantic_core
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    StrictStr,
    Tag,
    ValidationError,
    field_validator,
)

from server.errors import InvalidRequestError, from_validation
from vd_plugin.schedule import Budget, parse_budget

ENGINE_FIELDS: Final = frozenset(
    {
        "cache_salt",
        "chat_template",
        "chat_template_kwargs",
        "ec_transfer_params",
        "kv_transfer_params",
        "media_io_kwargs",
        "mm_payload",
        "mm_processor_kwargs",
        "priority",
        "request_id",
        "return_mm_kwargs",
        "session_id",
        "vllm_xargs",
    }
)
"""Fields of vLLM 0.32's request (`chat_completion/protocol.py`) that configure the engine rather than the answer."""


class TextPart(BaseModel):
    type: Literal["text"]
    text: StrictStr


class RefusalPart(BaseModel):
    """An assistant's earlier refusal, sent back as history."""

    type: Literal["refusal"]
    refusal: StrictStr


class ImageUrl(BaseModel):
    model_config = ConfigDict(extra="forbid")

    url: StrictStr
    detail: Literal["auto", "low", "high", "original", "full"] | None = None
    visual_token_budget: Budget | None = None

    @field_validator("visual_token_budget", mode="before")
    @classmethod
    def _parse_budget(cls, value: object) -> Budget | None:
        return None if value is None else parse_budget(value)


class ImagePart(BaseModel):
    # Above all `uuid`: it would let a client name entries of the engine's caches.
    model_config = ConfigDict(extra="forbid")

    type: Literal["image_url"]
    image_url: ImageUrl


def _part_tag(part: Any) -> str | None:
    kind = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    return f"<{kind}>" if kind in ("text", "refusal", "image_url") else None


def _content_tag(content: Any) -> str | None:
    return "<string>" if isinstance(content, str) else "<parts>" if isinstance(content, list) else None


Part: TypeAlias = Annotated[
    Annotated[TextPart, Tag("<text>")]
    | Annotated[RefusalPart, Tag("<refusal>")]
    | Annotated[ImagePart, Tag("<image_url>")],
    Discriminator(
        _part_tag,
        custom_error_type="content_part",
        custom_error_message="a content part must be an object of type 'text' or 'image_url'; "
        "video, audio and embeddings are not served",
    ),
]

Content: TypeAlias = Annotated[
    Annotated[StrictStr, Tag("<string>")] | Annotated[list[Part], Tag("<parts>")],
    Discriminator(
        _content_tag,
        custom_error_type="content",
        custom_error_message="content must be a string or a list of content parts",
    ),
]


class Message(BaseModel):
    """One turn. Fields that we do not act on (tool calls, names) pass through."""

    model_config = ConfigDict(extra="allow")

    role: StrictStr
    content: Content | None = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow")

    include_usage: StrictBool | None = None
    continuous_usage_stats: StrictBool | None = None


class ChatRequest(BaseModel):
    """A chat completion request; see `parse_chat_request`."""

    model_config = ConfigDict(extra="allow")

    model: StrictStr | None = None
    messages: Annotated[list[Message], Field(min_length=1)]
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    visual_token_budget: Budget | None = None

    @field_validator("visual_token_budget", mode="before")
    @classmethod
    def _parse_budget(cls, value: object) -> Budget | None:
        return None if value is None else parse_budget(value)

    def image_parts(self) -> Iterator[tuple[str, ImagePart]]:
        """Every picture in order of appearance, with the path of its URL in the request."""
        for turn, message in enumerate(self.messages):
            if isinstance(message.content, list):
                for place, part in enumerate(message.content):
                    if isinstance(part, ImagePart):
                        yield f"messages[{turn}].content[{place}].image_url", part


def parse_chat_request(body: bytes) -> ChatRequest:
    """Read a request body.

    Raises:
        InvalidRequestError: not JSON, a field of the wrong shape, or one that clients may not set.
    """
    try:
        data = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequestError(f"the request body is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise InvalidRequestError("the request body must be a JSON object")
    for name in sorted(ENGINE_FIELDS & data.keys()):
        # A client library that spells out its defaults sends null; that asks for nothing.
        if data.pop(name) is not None:
            raise InvalidRequestError(f"{name!r} cannot be set by a request to this server", param=name)
    try:
        return ChatRequest.model_validate(data)
    except ValidationError as error:
        raise from_validation(error) from None
