"""The shape of `usage` and of the figures about pictures, for the OpenAPI document; record.py fills it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from server.budget import BudgetField


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class ImageTokens(_Answer):
    """One picture."""

    budget: BudgetField
    """What was applied."""
    full: int = Field(ge=0)
    """Visual tokens of the stock model."""
    kept: int = Field(ge=0)
    """Visual tokens that a decoder layer holds, on average."""
    stages: list[int]
    """Visual tokens from the encoder's output on, and after each of the decoder's boundaries."""


class VisualTokens(_Answer):
    """All pictures of a request, in order of appearance."""

    images: int = Field(ge=0)
    full: int = Field(ge=0)
    kept: int = Field(ge=0)
    saved: int = Field(ge=0)
    """full - kept"""
    per_image: list[ImageTokens]


class PromptTokensDetails(BaseModel):
    # The engine's own details come along.
    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    cached_tokens: int | None
    image_tokens: int
    """Visual tokens in the prompt, as the engine counted them."""
    text_tokens: int


class Usage(BaseModel):
    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    prompt_tokens: int
    completion_tokens: int | None = None
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    visual_tokens: VisualTokens


class InputTokensDetails(BaseModel):
    model_config = ConfigDict(extra="allow")

    cached_tokens: int | None = None
    image_tokens: int
    text_tokens: int


class ResponseUsage(BaseModel):
    model_config = ConfigDict(extra="allow")

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
    """With each preset for all of its pictures."""
