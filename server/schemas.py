"""A chat completion request: OpenAI's fields, vLLM's, and ours.

Every field is honoured or refused (engine_fields.py); the values go to the engine as they came.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StrictStr, Tag

from server.budget_field import BudgetField
from server.engine_fields import message_refusal
from server.errors import InvalidRequestError
from server.generation_fields import INT32_MAX, Count, GenerationBody
from server.picture_marker import refuse_markers
from server.request_body import parse_body


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: StrictStr


class RefusalPart(BaseModel):
    """An assistant's earlier refusal, sent back as history."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["refusal"]
    refusal: StrictStr


class PictureFields(BaseModel):
    """What any route's picture may say of its cost."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    detail: Literal["auto", "low", "high", "original", "full"] | None = None
    """OpenAI's word for how closely to look; `visual_token_budget` goes before it."""
    visual_token_budget: BudgetField | None = None
    """For this picture alone."""


class ImageUrl(PictureFields):
    url: StrictStr
    """A data URL (data:image/png;base64,...) or, where the server fetches pictures, an https: URL."""


class ImagePart(BaseModel):
    # Above all `uuid`: it would let a client name entries of the engine's caches.
    model_config = ConfigDict(extra="forbid")

    type: Literal["image_url"]
    image_url: ImageUrl


def part_tag(*kinds: str) -> Callable[[Any], str | None]:
    """The discriminator of content parts, by their `type`."""

    def tag(part: Any) -> str | None:
        kind = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
        return f"<{kind}>" if kind in kinds else None

    return tag


def content_tag(content: Any) -> str | None:
    """The discriminator of a message's content."""
    return "<string>" if isinstance(content, str) else "<parts>" if isinstance(content, list) else None


Part: TypeAlias = Annotated[
    Annotated[TextPart, Tag("<text>")]
    | Annotated[RefusalPart, Tag("<refusal>")]
    | Annotated[ImagePart, Tag("<image_url>")],
    Discriminator(
        part_tag("text", "refusal", "image_url"),
        custom_error_type="content_part",
        custom_error_message="a content part must be an object of type 'text' or 'image_url'; "
        "video, audio and embeddings are not served",
    ),
]

Content: TypeAlias = Annotated[
    Annotated[StrictStr, Tag("<string>")] | Annotated[list[Part], Field(fail_fast=True), Tag("<parts>")],
    Discriminator(
        content_tag,
        custom_error_type="content",
        custom_error_message="content must be a string or a list of content parts",
    ),
]


class Message(BaseModel):
    """One turn. Fields that we do not act on (tool calls, names) pass through."""

    model_config = ConfigDict(extra="allow")

    role: StrictStr
    content: Content | None = None
    name: StrictStr | None = None
    tool_calls: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    tool_call_id: StrictStr | None = None
    reasoning: StrictStr | None = None


class FunctionDefinition(BaseModel):
    model_config = ConfigDict(extra="allow")

    name: StrictStr
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: Literal["function"] = "function"
    function: FunctionDefinition


class NamedFunction(BaseModel):
    name: StrictStr


class NamedTool(BaseModel):
    type: Literal["function"] = "function"
    function: NamedFunction


def _tool_choice_tag(value: Any) -> str | None:
    return "<word>" if value in ("none", "auto", "required") else "<named>" if isinstance(value, dict) else None


ToolChoice: TypeAlias = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<word>")] | Annotated[NamedTool, Tag("<named>")],
    Discriminator(
        _tool_choice_tag,
        custom_error_type="tool_choice",
        custom_error_message="must be 'none', 'auto', 'required' or a named function",
    ),
]


class ChatFields(GenerationBody):
    """What a chat request may hold beside its messages."""

    logprobs: bool | None = None
    max_completion_tokens: Count | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    tool_choice: ToolChoice | None = None
    tools: Annotated[list[Tool], Field(min_length=1, max_length=1024)] | None = None
    top_logprobs: Annotated[int, Field(ge=-1, le=INT32_MAX)] | None = None

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: Annotated[list[dict[str, StrictStr]], Field(fail_fast=True)] | None = None
    include_reasoning: bool | None = None
    return_prompt_text: bool | None = None


class ChatRequest(ChatFields):
    """A chat completion request; see `parse_chat_request`."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    visual_token_budget: BudgetField | None = None
    """For every picture that has none of its own."""

    def image_parts(self) -> Iterator[tuple[str, ImagePart]]:
        """Every picture in order of appearance, with the path of its URL in the request."""
        for turn, message in enumerate(self.messages):
            if isinstance(message.content, list):
                for place, part in enumerate(message.content):
                    if isinstance(part, ImagePart):
                        yield f"messages[{turn}].content[{place}].image_url.url", part


def refuse_engine_fields(messages: Sequence[Message]) -> None:
    """
    Raises:
        InvalidRequestError: a message has a budget, another server's knob, or what configures the engine.
    """
    for turn, message in enumerate(messages):
        for name, value in (message.model_extra or {}).items():
            reason = message_refusal(name)
            if value is not None and reason is not None:
                raise InvalidRequestError(reason, param=f"messages[{turn}].{name}")


def parse_chat_request(body: bytes) -> ChatRequest:
    """Read a request body.

    Raises:
        InvalidRequestError: not JSON, a field of the wrong shape, or one that clients may not set.
    """
    request = parse_body(ChatRequest, body)
    refuse_engine_fields(request.messages)
    if any(True for _ in request.image_parts()):
        for name in ("messages", "tools", "documents"):
            refuse_markers(request.sent.get(name), name)
    return request
