"""Requests to vLLM's /tokenize and /detokenize."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StrictStr

from server.errors import InvalidRequestError
from server.schemas.chat import ImagePart, Message, Tool, engine_message, refuse_engine_fields
from server.schemas.engine_json import dump_json
from server.schemas.generation import TokenId
from server.schemas.parse import RequestBody


class TokenizeRequest(RequestBody):
    """Either a prompt or a conversation without images."""

    model: StrictStr | None = None
    prompt: StrictStr | None = None
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = None
    add_generation_prompt: bool | None = None
    add_special_tokens: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None

    def engine_body(self) -> bytes:
        """The engine's request as JSON."""
        if self.messages is None:
            return dump_json(self.sent)
        return dump_json({**self.sent, "messages": [engine_message(message, iter(())) for message in self.messages]})

    def check(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequestError("give either 'prompt' or 'messages'", param="prompt")
        refuse_engine_fields(self.messages or ())
        for turn, message in enumerate(self.messages or ()):
            for place, part in enumerate(message.content if isinstance(message.content, list) else ()):
                if isinstance(part, ImagePart):
                    # The engine would decode it unchecked, and count it at full size whatever its budget.
                    raise InvalidRequestError(
                        "images cannot be tokenized here; POST /v1/visual_tokens/count reports what they cost",
                        param=f"messages[{turn}].content[{place}]",
                    )
        if self.prompt is not None:
            for name in ("add_generation_prompt", "continue_final_message", "tools"):
                if name in self.sent:
                    raise InvalidRequestError(f"{name!r} goes with 'messages', not with 'prompt'", param=name)


class DetokenizeRequest(RequestBody):
    model: StrictStr | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]

    def engine_body(self) -> bytes:
        """The engine's request as JSON."""
        return dump_json(self.sent)
