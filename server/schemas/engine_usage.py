"""What an engine reports of the tokens of a request. Checked, since headers, metrics and the log are made of it."""

from __future__ import annotations

from typing import Annotated, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from server.errors import EngineFailedError

_Count: TypeAlias = Annotated[int, Field(ge=0, lt=2**53)]
"""Metrics are floats, which hold these exactly."""


class _Checked(BaseModel):
    # What else vLLM reports is passed on unread.
    model_config = ConfigDict(strict=True, frozen=True)

    @classmethod
    def parse(cls, usage: object) -> Self:
        """
        Raises:
            EngineFailedError: it is not what an engine reports.
        """
        try:
            return cls.model_validate(usage)
        except ValidationError:
            raise EngineFailedError("the engine's usage cannot be read", code="engine_failed") from None


class PromptDetails(_Checked):
    cached_tokens: _Count | None = None
    multimodal_tokens: dict[str, _Count] | None = None


class EngineUsage(_Checked):
    """Of chat and text completions."""

    prompt_tokens: _Count
    completion_tokens: _Count
    total_tokens: _Count
    prompt_tokens_details: PromptDetails | None = None
    """None if the engine runs without --enable-prompt-tokens-details."""


class InputDetails(_Checked):
    cached_tokens: _Count | None = None


class ResponsesUsage(_Checked):
    """Of responses."""

    input_tokens: _Count
    output_tokens: _Count
    total_tokens: _Count
    input_tokens_details: InputDetails | None = None
