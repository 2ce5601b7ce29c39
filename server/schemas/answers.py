"""The shapes of answers: the OpenAPI document shows them, and the gateway builds its own figures with them.

What vLLM adds to OpenAI's fields passes through beside them.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel

from server.budget import BudgetField
from vd_plugin.schedule import Budget


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class _Passed(BaseModel):
    # With what the engine adds.
    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)


class Error(_Answer):
    message: str
    """A sentence for the person who sent the request."""
    type: str
    param: str | None
    """The field of the request that is at fault, as a path."""
    code: str | None
    """A word that a program can act on."""


class ErrorBody(_Answer):
    """OpenAI's error object."""

    error: Error


class ImageTokens(_Answer):
    """One image."""

    budget: BudgetField
    """What was applied."""
    full: int = Field(ge=0)
    """Visual tokens of the stock model."""
    kept: int = Field(ge=0)
    """Visual tokens that a decoder layer holds, on average."""
    stages: list[int]
    """Visual tokens from the encoder's output on, and after each of the decoder's boundaries."""


class VisualTokens(_Answer):
    """All images of a request, in order of appearance."""

    images: int = Field(ge=0)
    full: int = Field(ge=0)
    kept: int = Field(ge=0)
    saved: int = Field(ge=0)
    """full - kept"""
    per_image: list[ImageTokens]


class PromptTokensDetails(_Passed):
    cached_tokens: int | None
    image_tokens: int
    """Visual tokens in the prompt, as the engine counted them."""
    text_tokens: int


class Usage(_Passed):
    prompt_tokens: int
    completion_tokens: int | None = None
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    visual_tokens: VisualTokens


class InputTokensDetails(_Passed):
    cached_tokens: int | None = None
    image_tokens: int
    text_tokens: int


class ResponseUsage(_Passed):
    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: InputTokensDetails
    visual_tokens: VisualTokens


class PresetCosts(_Answer):
    low: VisualTokens
    medium: VisualTokens
    high: VisualTokens
    full: VisualTokens


class VisualTokensCount(_Answer):
    """What a chat request would cost, without running the model."""

    object: str = Field(json_schema_extra={"const": "visual_tokens.count"})
    model: str | None
    requested: VisualTokens
    """With the budgets that the request asks for."""
    presets: PresetCosts
    """With each preset for all of its images."""


class ChatMessage(_Passed):
    role: str
    content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    reasoning: str | None = None


class ChatChoice(_Passed):
    index: int
    message: ChatMessage
    finish_reason: str | None = None
    logprobs: dict[str, Any] | None = None


class ChatCompletion(_Passed):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextChoice(_Passed):
    index: int
    text: str
    finish_reason: str | None = None
    logprobs: dict[str, Any] | None = None


class TextCompletion(_Passed):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class Response(_Passed):
    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: str
    output: list[dict[str, Any]]
    usage: ResponseUsage


class Tokens(_Passed):
    count: int
    max_model_len: int
    """The longest prompt and answer together."""
    tokens: list[int]
    token_strs: list[str] | None = None


class Text(_Passed):
    prompt: str


class BudgetCard(_Passed):
    """The budgets that a request may choose from."""

    default: Budget
    minimum: int
    presets: dict[str, Budget]


class Model(_Passed):
    id: str
    object: Literal["model"]
    created: int | None = None
    owned_by: str | None = None
    max_model_len: int | None = None
    visual_token_budget: BudgetCard


class ModelList(_Passed):
    object: Literal["list"]
    data: list[Model]


class Health(_Passed):
    status: Literal["ok"]
    version: str


class Ready(_Passed):
    status: Literal["ready"]


class Engines(RootModel[list["EngineTargets"]]):
    """What Prometheus expects of an HTTP service discovery."""


class EngineTargets(_Passed):
    targets: list[str] = Field(description="Names of engines.", examples=[["0", "1"]])
    labels: dict[str, str]


class Document(_Passed):
    """An OpenAPI document."""

    openapi: str = Field(examples=["3.1.0"])
    paths: dict[str, Any]
