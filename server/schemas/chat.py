"""A chat completion request: OpenAI's fields, vLLM's, and ours.

Every field is honoured or refused (refusals.py); the values go to the engine as they came.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final, Literal, TypeAlias

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StrictStr,
    Tag,
    ValidationInfo,
    field_validator,
)

from server.budget import BudgetField, RequestedImage
from server.errors import InvalidRequestError
from server.schemas.generation import INT32_MAX, CompletionFields, Count, estimate_text_tokens
from server.schemas.refusals import message_refusal
from vd_plugin.schedule import Budget, Schedule


class PartFields(BaseModel):
    """What clients add to content parts for other servers; it changes nothing, and the engine does not get it."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    cache_control: dict[str, Any] | None = None
    """Changes nothing; likewise the next four."""
    format: StrictStr | None = None
    mime_type: StrictStr | None = None
    name: StrictStr | None = None
    prompt_cache_breakpoint: dict[str, Any] | None = None


NO_EFFECT_IN_PARTS: Final = frozenset(PartFields.model_fields)


class TextPart(PartFields):
    type: Literal["text"]
    text: StrictStr


class RefusalPart(PartFields):
    """An assistant's earlier refusal, sent back as history."""

    type: Literal["refusal"]
    refusal: StrictStr


class ImageFields(PartFields):
    """What a request may set for one image, on any route."""

    detail: Literal["auto", "low", "high", "original", "full"] | None = None
    """OpenAI's level of detail; `visual_token_budget` takes precedence."""
    visual_token_budget: BudgetField | None = None
    """For this image alone."""


class ImageUrl(ImageFields):
    url: StrictStr
    """A data URL (data:image/png;base64,...) or, where the server fetches images, an https: URL."""


def _with_url(value: Any) -> Any:
    return {"url": value} if isinstance(value, str) else value


class ImagePart(PartFields):
    """An image. Unknown fields are refused, above all `uuid`: it would name entries of the engine's caches."""

    type: Literal["image_url"]
    image_url: Annotated[ImageUrl, BeforeValidator(_with_url, json_schema_input_type=ImageUrl | StrictStr)]
    """A string is the `url` alone."""


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
    content: Annotated[Content | None, Field(validate_default=True)] = None
    name: StrictStr | None = None
    tool_calls: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    tool_call_id: StrictStr | None = None
    reasoning: StrictStr | None = None

    @field_validator("content")
    @classmethod
    def _check_content(cls, content: Content | None, info: ValidationInfo) -> Content | None:
        if content is None and info.data.get("role") != "assistant":
            raise ValueError(
                "content must be a string or a list of content parts; only an assistant's message may be without it"
            )
        return content

    def texts(self) -> Iterator[str]:
        """Those of the content."""
        if isinstance(self.content, str):
            yield self.content
            return
        for part in self.content or ():
            if isinstance(part, TextPart):
                yield part.text
            elif isinstance(part, RefusalPart):
                yield part.refusal


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


class ChatFields(CompletionFields):
    """What a chat request may hold beside its messages."""

    logprobs: bool | None = None
    max_completion_tokens: Count | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    """Changes nothing: answers are text."""
    parallel_tool_calls: bool | None = None
    prediction: dict[str, Any] | None = None
    """Changes nothing."""
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    tool_choice: ToolChoice | None = None
    tools: Annotated[list[Tool], Field(min_length=1, max_length=1024)] | None = None
    top_logprobs: Annotated[int, Field(ge=-1, le=INT32_MAX)] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    """Changes nothing."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: Annotated[list[dict[str, StrictStr]], Field(fail_fast=True)] | None = None
    include_reasoning: bool | None = None
    return_prompt_text: bool | None = None


class ChatRequest(ChatFields):
    """A chat completion request."""

    text_fields: ClassVar = ("messages", "tools", "documents")
    takes_images: ClassVar = True

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    visual_token_budget: BudgetField | None = None
    """For every image that has none of its own."""

    def images(self) -> list[RequestedImage]:
        found = []
        for turn, message in enumerate(self.messages):
            for place, part in enumerate(message.content if isinstance(message.content, list) else ()):
                if isinstance(part, ImagePart):
                    path, image = f"messages[{turn}].content[{place}].image_url", part.image_url
                    is_string = isinstance(self.sent["messages"][turn]["content"][place]["image_url"], str)
                    url_path = path if is_string else f"{path}.url"
                    found.append(RequestedImage(path, url_path, image.url, image.visual_token_budget, image.detail))
        return found

    def shared_budget(self) -> Budget | None:
        return self.visual_token_budget

    def text_tokens(self) -> int:
        return estimate_text_tokens(self._texts())

    @property
    def answer_field(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    def certain_prompts(self) -> Iterable[int]:
        """What users say: templates may leave out the rest, and trim."""
        yield sum(len(text.strip()) for message in self.messages if message.role == "user" for text in message.texts())

    def check_schedules(self, schedules: Iterable[Schedule]) -> None:
        """Log-probabilities of a prompt exist for every token of it, and pruned ones are gone."""
        # vLLM takes `echo` as a request for them.
        name = "prompt_logprobs" if self.prompt_logprobs is not None else "echo" if self.echo else None
        if name is not None and not all(schedule.is_full for schedule in schedules):
            raise InvalidRequestError(
                f"{name} is not available for pruned images: set visual_token_budget to 'full'", param=name
            )

    def engine_fields(self, urls: Sequence[str]) -> Mapping[str, Any]:
        left = iter(urls)
        messages = [engine_message(message, left) for message in self.messages]
        return {**super().engine_fields(urls), "messages": messages}

    def check(self) -> None:
        refuse_engine_fields(self.messages)
        super().check()

    def _texts(self) -> Iterator[str]:
        """All that the template may write into the prompt."""
        for message, sent in zip(self.messages, self.sent["messages"], strict=True):
            yield from message.texts()
            if rest := {name: value for name, value in sent.items() if name not in ("role", "content")}:
                yield json.dumps(rest, ensure_ascii=False)
        for name in ("tools", "documents"):
            if name in self.sent:
                yield json.dumps(self.sent[name], ensure_ascii=False)


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


def engine_message(message: Message, urls: Iterator[str]) -> dict[str, Any]:
    """A message for the engine; `urls` stand in the places of its images."""
    body = message.model_dump(exclude_unset=True, exclude={"content"})
    if isinstance(message.content, list):
        body["content"] = [
            {"type": "image_url", "image_url": {"url": next(urls)}}
            if isinstance(part, ImagePart)
            else part.model_dump(exclude={*NO_EFFECT_IN_PARTS})
            for part in message.content
        ]
    else:
        body["content"] = message.content
    return body
