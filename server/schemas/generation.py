"""What requests for an answer have in common: fields, and what the pipeline (api/generate.py) needs to know of them.

Ranges are those that vLLM 0.32 checks. Where one is narrower it is because vLLM has none, and the number would reach a
32-bit tensor, overflow, or make one request as heavy as hundreds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StrictBool, StrictStr, Tag

from server.budget import RequestedImage
from server.errors import InvalidRequestError
from server.schemas.engine_json import Slots, dump_json
from server.schemas.image_marker import refuse_markers
from server.schemas.parse import RequestBody
from vd_plugin.schedule import Budget, Schedule
from vd_plugin.wire import BUDGET_KEY

INT32_MAX: Final = 2**31 - 1
MAX_CHOICES: Final = 128
"""OpenAI's bound of `n`; vLLM's own is 16384."""

STATELESS: Final = "this server keeps no answers; leave 'store' out, and send the conversation with each request"

_MAX_TOKEN_IDS: Final = 262_144
"""More than any tokenizer has."""
_MAX_PATTERN: Final = 1024
_BYTES_PER_TOKEN: Final = 4
"""A rule of thumb for English text; the exact count would take the model's tokenizer."""

NO_EFFECT_FIELDS: Final = frozenset(
    {
        "metadata",
        "modalities",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "verbosity",
    }
)
"""Fields of OpenAI's that are accepted, because clients send them, and change nothing here."""

TokenId: TypeAlias = Annotated[int, Field(ge=0, le=INT32_MAX)]
Count: TypeAlias = Annotated[int, Field(ge=0, le=INT32_MAX)]
NonEmpty: TypeAlias = Annotated[StrictStr, Field(min_length=1)]


def _string_or_list(value: Any) -> str | None:
    return "<string>" if isinstance(value, str) else "<list>" if isinstance(value, list) else None


Stop: TypeAlias = Annotated[
    Annotated[NonEmpty, Tag("<string>")] | Annotated[list[NonEmpty], Field(max_length=4), Tag("<list>")],
    Discriminator(
        _string_or_list, custom_error_type="stop", custom_error_message="must be a string or a list of strings"
    ),
]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    include_usage: StrictBool | None = None
    """Send a last chunk with `usage`."""
    continuous_usage_stats: StrictBool | None = None
    """With `include_usage`: send `usage` in every chunk."""
    include_obfuscation: bool | None = None
    """Changes nothing: events are never padded."""


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: dict[str, Any] | None = None


class StructuredOutputs(BaseModel):
    """vLLM's own way to constrain an answer: one of json, regex, choice, grammar, json_object, structural_tag."""

    model_config = ConfigDict(extra="forbid")

    json_: dict[str, Any] | StrictStr | None = Field(None, alias="json")
    regex: StrictStr | None = None
    choice: Annotated[list[StrictStr], Field(max_length=1024)] | None = None
    grammar: StrictStr | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: StrictStr | None = None
    structural_tag: StrictStr | None = None


class RepetitionDetection(BaseModel):
    """Ends an answer early that repeats itself."""

    model_config = ConfigDict(extra="forbid")

    max_pattern_size: Annotated[int, Field(ge=0, le=_MAX_PATTERN)] = 0
    min_pattern_size: Annotated[int, Field(ge=0, le=_MAX_PATTERN)] = 0
    min_count: Annotated[int, Field(ge=0, le=_MAX_PATTERN)] = 0


class GenerationRequest(RequestBody):
    """A request for an answer of the model. A route's own class adds its fields and knows what is in them."""

    text_fields: ClassVar[tuple[str, ...]]
    """The fields whose text reaches the prompt; the first is the one that holds the images, if the route has any."""
    withheld_fields: ClassVar = NO_EFFECT_FIELDS

    model: StrictStr | None = None
    """As GET /v1/models names it; the served model if it is left out."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[Annotated[str, Field(pattern=r"^[0-9]+$")], float], Field(max_length=1024)] | None = None
    """Token ids and what is added to their logits, -100 to 100."""
    metadata: Annotated[dict[str, StrictStr], Field(max_length=16)] | None = None
    """Changes nothing; /v1/responses sends it back."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    prompt_cache_key: StrictStr | None = None
    """Changes nothing."""
    prompt_cache_options: dict[str, Any] | None = None
    """Changes nothing."""
    prompt_cache_retention: StrictStr | None = None
    """Changes nothing."""
    safety_identifier: StrictStr | None = None
    """Changes nothing."""
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    """Changes nothing: there is one."""
    stop: Stop | None = None
    store: Literal[False] | None = None
    """Changes nothing: nothing is stored."""
    stream: StrictBool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    user: StrictStr | None = None
    """Changes nothing."""

    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.001, le=1000)] | None = None
    skip_special_tokens: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024)] | None = None
    structured_outputs: StructuredOutputs | None = None
    top_k: Annotated[int, Field(ge=-1, le=INT32_MAX)] | None = None
    watermarking: bool | None = None

    @property
    def include_usage(self) -> bool:
        """Whether the client gets usage at the end of its stream."""
        return True

    def images(self) -> Sequence[RequestedImage]:
        """Every image in order of appearance."""
        return ()

    def shared_budget(self) -> Budget | None:
        """The budget that the body gives to images without one of their own."""
        return None

    def text_tokens(self) -> int:
        """About how many tokens the text of the prompt has; at least 1."""
        raise NotImplementedError

    @property
    def num_prompts(self) -> int:
        return 1

    @property
    def num_choices(self) -> int:
        """Answers to each prompt."""
        return 1

    @property
    def answer_field(self) -> str:
        """The name of the field that bounds an answer's length."""
        raise NotImplementedError

    @property
    def answer_tokens(self) -> int | None:
        """The longest answer that is wanted; None if the request does not say."""
        found: int | None = getattr(self, self.answer_field)
        return found

    @property
    def is_truncated(self) -> bool:
        """Whether the engine shortens a prompt that is too long."""
        return False

    def certain_prompts(self) -> Iterable[int | list[int]]:
        """Of each prompt, the token ids or, as a number, the characters of text that surely reach the model."""
        raise NotImplementedError

    def check_schedules(self, schedules: Iterable[Schedule]) -> None:
        """Raises InvalidRequestError for fields that do not go with pruned images."""

    def engine_body(self, urls: Sequence[str] = (), budgets: Sequence[Budget] = ()) -> bytes:
        """The engine's request as JSON: the fields as they were sent, but for what the gateway decides.

        Args:
            urls: data URLs of the checked images, in order of appearance.
            budgets: what each of them gets.

        Raises:
            InvalidRequestError: a number in it is infinite.
        """
        slots = Slots()
        payload = {name: value for name, value in self.sent.items() if name not in {BUDGET_KEY, *self.withheld_fields}}
        payload |= self.engine_fields([slots.add(url) for url in urls])
        if budgets:
            payload["mm_processor_kwargs"] = {BUDGET_KEY: list(budgets)}
        return slots.fill(dump_json(payload))

    def engine_fields(self, urls: Sequence[str]) -> Mapping[str, Any]:
        """Fields that the engine gets in place of those that were sent; `urls` as for `engine_body`."""
        return {}

    @classmethod
    def refuse_fields(cls, data: Mapping[str, Any]) -> None:
        if data.get("store"):
            raise InvalidRequestError(STATELESS, param="store")
        super().refuse_fields(data)

    def check(self) -> None:
        if self.images():
            for name in self.text_fields:
                refuse_markers(self.sent.get(name), name)


class CompletionFields(GenerationRequest):
    """What a chat and a text completion have in common. OpenAI's fields first, then vLLM's."""

    max_tokens: Count | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    response_format: ResponseFormat | None = None
    stream_options: StreamOptions | None = None

    add_special_tokens: bool | None = None
    allowed_token_ids: (
        Annotated[list[TokenId], Field(min_length=1, max_length=_MAX_TOKEN_IDS, fail_fast=True)] | None
    ) = None
    bad_words: Annotated[list[NonEmpty], Field(max_length=128)] | None = None
    echo: bool | None = None
    # A prompt's length is raised to it: more would overflow.
    length_penalty: Annotated[float, Field(ge=-10, le=10)] | None = None
    logprob_token_ids: Annotated[list[TokenId], Field(max_length=128)] | None = None
    min_tokens: Count | None = None
    prompt_logprobs: Annotated[int, Field(ge=-1, le=INT32_MAX)] | None = None
    repetition_detection: RepetitionDetection | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    spaces_between_special_tokens: bool | None = None
    stream_interval: Annotated[int, Field(ge=1, le=INT32_MAX)] | None = None
    thinking_token_budget: Annotated[int, Field(ge=-1, le=INT32_MAX)] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=INT32_MAX)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    use_beam_search: bool | None = None

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def answer_field(self) -> str:
        return "max_tokens"

    @property
    def is_truncated(self) -> bool:
        return self.truncate_prompt_tokens is not None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def engine_fields(self, urls: Sequence[str]) -> Mapping[str, Any]:
        if not self.stream:
            return {}
        # Our own figures need the usage chunk; the relay takes it out if the client did not ask for it.
        continuous = self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)
        sent = self.sent.get("stream_options", {})
        return {"stream_options": {**sent, "include_usage": True, "continuous_usage_stats": continuous}}


def estimate_text_tokens(texts: Iterable[str]) -> int:
    """About how many tokens some texts have, rounded up; at least 1."""
    num_bytes = sum(len(text.encode(errors="surrogatepass")) for text in texts)
    return max(-(-num_bytes // _BYTES_PER_TOKEN), 1)
