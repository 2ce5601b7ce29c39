"""A request to /v1/responses: stateless, messages only. vLLM keeps what it stores in memory for ever, so nothing is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, StrictBool, StrictStr, Tag

from server.budget_field import BudgetField
from server.errors import InvalidRequestError
from server.generation_fields import INT32_MAX, Count, Stop, StructuredOutputs, TokenId
from server.picture_marker import refuse_markers
from server.request_body import RequestBody, Slots, dump_json, parse_body, read_object
from server.schemas import ImagePart, ImageUrl, PictureFields, RefusalPart, content_tag, part_tag

_STATELESS: Final = "this server keeps no responses; send the conversation itself as 'input'"
_NO_TOOLS: Final = "tools are not served on this route; POST /v1/chat/completions has them"

UNSERVED_FIELDS: Final[Mapping[str, str]] = {
    "previous_response_id": _STATELESS,
    "previous_input_messages": _STATELESS,
    "prompt": "there are no stored prompts; send 'input' and 'instructions'",
    "max_tool_calls": _NO_TOOLS,
    "enable_response_messages": "what went into the model is not sent back",
}
"""Fields that vLLM has and this route does not, and why."""


class InputText(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["input_text"]
    text: StrictStr


class OutputText(BaseModel):
    """An earlier answer, sent back as history."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["output_text"]
    text: StrictStr
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


def _no_file(value: object) -> None:
    if value is not None:
        raise ValueError("there are no files on this server; send the picture itself as 'image_url'")


class InputImage(PictureFields):
    type: Literal["input_image"]
    image_url: StrictStr
    """A data URL (data:image/png;base64,...) or, where the server fetches pictures, an https: URL."""
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
    model_config = ConfigDict(extra="forbid")

    format: TextFormat | None = None


class Reasoning(BaseModel):
    model_config = ConfigDict(extra="forbid")

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None


class ResponsesRequest(RequestBody):
    """A request to /v1/responses; see `parse_responses_request`."""

    input: Annotated[
        Annotated[StrictStr, Tag("<string>")]
        | Annotated[list[InputItem], Field(min_length=1, fail_fast=True), Tag("<parts>")],
        Discriminator(
            content_tag, custom_error_type="input", custom_error_message="input must be a string or a list of messages"
        ),
    ]
    model: StrictStr | None = None
    """As GET /v1/models names it; the served model if it is left out."""
    instructions: StrictStr | None = None
    background: Literal[False] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    include: Annotated[list[Literal["message.output_text.logprobs"]], Field(fail_fast=True)] | None = None
    logit_bias: Annotated[dict[Annotated[str, Field(pattern=r"^[0-9]+$")], float], Field(max_length=1024)] | None = None
    max_output_tokens: Count | None = None
    metadata: Annotated[dict[str, StrictStr], Field(max_length=16)] | None = None
    """Sent back with the response."""
    parallel_tool_calls: bool | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    prompt_cache_key: StrictStr | None = None
    """Accepted because OpenAI has it; changes nothing."""
    reasoning: Reasoning | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    """Nothing is stored."""
    stream: StrictBool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    text: TextOptions | None = None
    tool_choice: Literal["auto", "none"] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=INT32_MAX)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    user: StrictStr | None = None
    """Accepted because OpenAI has it; changes nothing."""
    visual_token_budget: BudgetField | None = None
    """For every picture that has none of its own."""

    ignore_eos: bool | None = None
    include_reasoning: bool | None = None
    include_stop_str_in_output: bool | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.001, le=1000)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    skip_special_tokens: bool | None = None
    stop: Stop | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024)] | None = None
    structured_outputs: StructuredOutputs | None = None
    top_k: Annotated[int, Field(ge=-1, le=INT32_MAX)] | None = None
    watermarking: bool | None = None

    def image_parts(self) -> Iterator[tuple[str, ImagePart]]:
        """Every picture in order of appearance, as a chat request would hold it, with the path of its URL."""
        for turn, place, part in self._pictures():
            url = ImageUrl(url=part.image_url, detail=part.detail, visual_token_budget=part.visual_token_budget)
            yield f"input[{turn}].content[{place}].image_url", ImagePart(type="image_url", image_url=url)

    def engine_body(self, urls: Sequence[str], budgets: Sequence[int | str]) -> bytes:
        """The engine's request as JSON.

        Args:
            urls: data URLs of the checked pictures, in order of appearance.
            budgets: what each of them gets.

        Raises:
            InvalidRequestError: a number in it is infinite.
        """
        payload = {name: value for name, value in self.sent.items() if name != "visual_token_budget"}
        payload["store"] = False
        slots = Slots()
        if urls:
            turns = [{**turn} for turn in self.sent["input"]]
            for (turn, place, _), url in zip(self._pictures(), urls, strict=True):
                content = [*turns[turn]["content"]]
                content[place] = {"type": "input_image", "image_url": slots.add(url), "detail": "auto"}
                turns[turn]["content"] = content
            payload["input"] = turns
            payload["mm_processor_kwargs"] = {"visual_token_budget": list(budgets)}
        return slots.fill(dump_json(payload))

    def _pictures(self) -> Iterator[tuple[int, int, InputImage]]:
        for turn, message in enumerate(self.input if isinstance(self.input, list) else ()):
            if isinstance(message.content, list):
                for place, part in enumerate(message.content):
                    if isinstance(part, InputImage):
                        yield turn, place, part


def parse_responses_request(body: bytes) -> ResponsesRequest:
    """Read a request body.

    Raises:
        InvalidRequestError: not JSON, a field of the wrong shape, or one that is not served here.
    """
    data = read_object(body)
    for name, reason in UNSERVED_FIELDS.items():
        if name in data:
            raise InvalidRequestError(f"{name!r} is not served: {reason}", param=name)
    for name, reason in (("store", _STATELESS), ("background", _STATELESS), ("tools", _NO_TOOLS)):
        if data.get(name):
            raise InvalidRequestError(reason, param=name)
    request = parse_body(ResponsesRequest, body)
    if any(True for _ in request.image_parts()):
        for name in ("input", "instructions"):
            refuse_markers(request.sent.get(name), name)
    return request
