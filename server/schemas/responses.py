"""A request to /v1/responses: stateless, messages only. vLLM keeps what it stores in memory for ever, so nothing is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final, Literal, TypeAlias, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, StrictStr, Tag

from server.budget import BudgetField, RequestedImage
from server.errors import InvalidRequestError
from server.schemas.chat import NO_EFFECT_IN_PARTS, ImageFields, PartFields, RefusalPart, content_tag, part_tag
from server.schemas.generation import INT32_MAX, Count, GenerationRequest, estimate_text_tokens
from server.schemas.refusals import NO_TOOLS
from vd_plugin.schedule import Budget

_STATELESS: Final = "this server keeps no responses; send the conversation itself as 'input'"
_LOGPROBS: Final = "message.output_text.logprobs"

UNSERVED_FIELDS: Final[Mapping[str, str]] = {
    "previous_response_id": _STATELESS,
    "previous_input_messages": _STATELESS,
    "prompt": "there are no stored prompts; send 'input' and 'instructions'",
    "conversation": _STATELESS,
    "max_tool_calls": NO_TOOLS,
    "functions": NO_TOOLS,
    "function_call": NO_TOOLS,
    "enable_response_messages": "what went into the model is not sent back",
}
"""Fields that OpenAI or vLLM has and this route does not, and why."""


class InputText(PartFields):
    type: Literal["input_text"]
    text: StrictStr


class OutputText(PartFields):
    """An earlier answer, sent back as history."""

    type: Literal["output_text"]
    text: StrictStr
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


def _no_file(value: object) -> None:
    if value is not None:
        raise ValueError("there are no files on this server; send the image itself as 'image_url'")


class InputImage(ImageFields):
    type: Literal["input_image"]
    image_url: StrictStr
    """A data URL (data:image/png;base64,...) or, where the server fetches images, an https: URL."""
    file_id: Annotated[None, BeforeValidator(_no_file)] = None


def _item_tag(item: Any) -> str | None:
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)
    return "<message>" if kind == "message" else None


InputPart: TypeAlias = Annotated[
    Annotated[InputText, Tag("<input_text>")]
    | Annotated[OutputText, Tag("<output_text>")]
    | Annotated[InputImage, Tag("<input_image>")]
    | Annotated[RefusalPart, Tag("<refusal>")],
    Discriminator(
        part_tag("input_text", "output_text", "input_image", "refusal"),
        custom_error_type="content_part",
        custom_error_message="a content part must be an object of type 'input_text', 'input_image' or 'output_text'; "
        "files, audio and video are not served",
    ),
]


class InputMessage(BaseModel):
    """One turn. `id`, `status` and `phase` come with earlier answers and change nothing."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Annotated[
        Annotated[StrictStr, Tag("<string>")] | Annotated[list[InputPart], Field(fail_fast=True), Tag("<parts>")],
        Discriminator(
            content_tag,
            custom_error_type="content",
            custom_error_message="content must be a string or a list of content parts",
        ),
    ]
    id: StrictStr | None = None
    status: StrictStr | None = None
    phase: StrictStr | None = None

    def texts(self) -> Iterator[str]:
        """Those of the content."""
        if isinstance(self.content, str):
            yield self.content
        else:
            for part in self.content:
                if isinstance(part, InputText | OutputText):
                    yield part.text
                elif isinstance(part, RefusalPart):
                    yield part.refusal


InputItem: TypeAlias = Annotated[
    Annotated[InputMessage, Tag("<message>")],
    Discriminator(
        _item_tag,
        custom_error_type="input_item",
        custom_error_message="only messages can be sent here; POST /v1/chat/completions has tools",
    ),
]


class TextFormat(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text", "json_object", "json_schema"]
    name: StrictStr | None = None
    description: StrictStr | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    """Changes nothing; it is sent back."""


class Reasoning(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    """Changes nothing: the name that `summary` had."""
    summary: Literal["auto", "concise", "detailed"] | None = None
    """Changes nothing; it is sent back."""


Includable: TypeAlias = Literal[
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
]


class ResponseStreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    include_obfuscation: bool | None = None
    """Changes nothing: events are never padded."""
    include_usage: Literal[True] | None = None
    """Changes nothing: the last event always has `usage`."""


class ResponsesRequest(GenerationRequest):
    """A request to /v1/responses."""

    text_fields: ClassVar = ("input", "instructions")
    takes_images: ClassVar = True
    withheld_fields: ClassVar = frozenset(
        # vLLM knows the others, and sends them back.
        {"include", "prompt_cache_options", "prompt_cache_retention", "safety_identifier", "stream_options"}
    )

    input: Annotated[
        Annotated[StrictStr, Tag("<string>")]
        | Annotated[list[InputItem], Field(min_length=1, fail_fast=True), Tag("<parts>")],
        Discriminator(
            content_tag, custom_error_type="input", custom_error_message="input must be a string or a list of messages"
        ),
    ]
    instructions: StrictStr | None = None
    background: Literal[False] | None = None
    include: Annotated[list[Includable], Field(fail_fast=True, max_length=len(get_args(Includable)))] | None = None
    """All but `message.output_text.logprobs` change nothing: there is nothing of that kind to include."""
    max_output_tokens: Count | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    stream_options: ResponseStreamOptions | None = None
    text: TextOptions | None = None
    tool_choice: Literal["auto", "none"] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=INT32_MAX)] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    visual_token_budget: BudgetField | None = None
    """For every image that has none of its own."""

    include_reasoning: bool | None = None

    def images(self) -> list[RequestedImage]:
        found = []
        for turn, place, part in self._image_parts():
            path = f"input[{turn}].content[{place}]"
            found.append(
                RequestedImage(path, f"{path}.image_url", part.image_url, part.visual_token_budget, part.detail)
            )
        return found

    def shared_budget(self) -> Budget | None:
        return self.visual_token_budget

    def text_tokens(self) -> int:
        return estimate_text_tokens(self._texts())

    @property
    def answer_field(self) -> str:
        return "max_output_tokens"

    @property
    def is_truncated(self) -> bool:
        return self.truncation == "auto"

    def certain_prompts(self) -> Iterator[int]:
        """What users say: templates may leave out the rest, and trim."""
        if isinstance(self.input, str):
            yield len(self.input.strip())
            return
        users = (message for message in self.input if message.role == "user")
        yield sum(len(text.strip()) for message in users for text in message.texts())

    def engine_fields(self, urls: Sequence[str]) -> Mapping[str, Any]:
        fields: dict[str, Any] = {"store": False}
        if _LOGPROBS in (self.include or ()):
            fields["include"] = [_LOGPROBS]
        if isinstance(self.input, list):
            left = iter(urls)
            fields["input"] = [_engine_turn(turn, left) for turn in self.sent["input"]]
        return fields

    @classmethod
    def refuse_fields(cls, data: Mapping[str, Any]) -> None:
        for name, reason in UNSERVED_FIELDS.items():
            if name in data:
                raise InvalidRequestError(f"{name!r} is not served: {reason}", param=name)
        for name, reason in (("store", _STATELESS), ("background", _STATELESS), ("tools", NO_TOOLS)):
            if data.get(name):
                raise InvalidRequestError(reason, param=name)
        super().refuse_fields(data)

    def _image_parts(self) -> Iterator[tuple[int, int, InputImage]]:
        for turn, message in enumerate(self.input if isinstance(self.input, list) else ()):
            if isinstance(message.content, list):
                for place, part in enumerate(message.content):
                    if isinstance(part, InputImage):
                        yield turn, place, part

    def _texts(self) -> Iterator[str]:
        if self.instructions is not None:
            yield self.instructions
        if isinstance(self.input, str):
            yield self.input
            return
        for message in self.input:
            yield from message.texts()


def _engine_turn(turn: Mapping[str, Any], urls: Iterator[str]) -> dict[str, Any]:
    """A turn as it was sent, with the next of `urls` for each image and without what changes nothing."""
    if not isinstance(turn["content"], list):
        return {**turn}
    return {**turn, "content": [_engine_part(part, urls) for part in turn["content"]]}


def _engine_part(part: Mapping[str, Any], urls: Iterator[str]) -> dict[str, Any]:
    if part["type"] == "input_image":
        return {"type": "input_image", "image_url": next(urls), "detail": "auto"}
    return {name: value for name, value in part.items() if name not in NO_EFFECT_IN_PARTS}
