"""A text completion request: OpenAI's fields and vLLM's. There are no images on this route."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Final, TypeAlias

from pydantic import Discriminator, Field, StrictStr, Tag

from server.budget import BudgetField
from server.errors import InvalidRequestError
from server.schemas.generation import INT32_MAX, NO_EFFECT_FIELDS, CompletionFields, TokenId, estimate_text_tokens

MAX_SEQUENCES: Final = 1024
"""Prompts times choices of one request; vLLM's own bound of prompts."""
_DEFAULT_ANSWER_TOKENS: Final = 16
"""OpenAI's default on this route, and vLLM's."""


def _prompt_tag(value: Any) -> str | None:
    if isinstance(value, str):
        return "<string>"
    if not isinstance(value, list) or not value:
        return None
    first = value[0]
    return "<strings>" if isinstance(first, str) else "<prompts>" if isinstance(first, list) else "<tokens>"


TokenIds: TypeAlias = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]

Prompt: TypeAlias = Annotated[
    Annotated[StrictStr, Field(min_length=1), Tag("<string>")]
    | Annotated[list[StrictStr], Field(min_length=1, max_length=MAX_SEQUENCES), Tag("<strings>")]
    | Annotated[TokenIds, Tag("<tokens>")]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_SEQUENCES), Tag("<prompts>")],
    Discriminator(
        _prompt_tag,
        custom_error_type="prompt",
        custom_error_message="must be a string, a list of strings, a list of token ids, or a list of such lists",
    ),
]


class CompletionRequest(CompletionFields):
    """A text completion request."""

    text_fields: ClassVar = ("prompt",)
    withheld_fields: ClassVar = NO_EFFECT_FIELDS | {"visual_token_budget"}

    prompt: Prompt
    logprobs: Annotated[int, Field(ge=-1, le=INT32_MAX)] | None = None
    visual_token_budget: BudgetField | None = None
    """Changes nothing: there are no images on this route."""

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt by itself."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]  # mypy does not narrow a list by its first item

    @property
    def num_prompts(self) -> int:
        return len(self.prompts)

    @property
    def answer_tokens(self) -> int | None:
        return _DEFAULT_ANSWER_TOKENS if self.max_tokens is None else self.max_tokens

    def certain_prompts(self) -> Iterator[int | list[int]]:
        yield from (len(prompt) if isinstance(prompt, str) else prompt for prompt in self.prompts)

    def text_tokens(self) -> int:
        ids = sum(len(prompt) for prompt in self.prompts if isinstance(prompt, list))
        return ids + estimate_text_tokens(prompt for prompt in self.prompts if isinstance(prompt, str))

    def check(self) -> None:
        if len(self.prompts) * (self.n or 1) > MAX_SEQUENCES:
            raise InvalidRequestError(f"n times the number of prompts may be at most {MAX_SEQUENCES}", param="n")
