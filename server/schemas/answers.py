"""The shapes of answers, for the OpenAPI document. What vLLM adds to OpenAI's fields passes through beside them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.schemas.usage import ResponseUsage, Usage
from vd_plugin.schedule import Budget


class Error(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    message: str
    """A sentence for the person who sent the request."""
    type: str
    param: str | None
    """The field of the request that is at fault, as a path."""
    code: str | None
    """A word that a program can act on."""


class ErrorBody(BaseModel):
    """OpenAI's error object."""

    model_config = ConfigDict(extra="forbid")

    error: Error


class _Passed(BaseModel):
    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)


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


class Document(_Passed):
    """An OpenAPI document."""

    openapi: str = Field(examples=["3.1.0"])
    paths: dict[str, Any]
