"""Requests to vLLM's /tokenize and /detokenize."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StrictStr

from server.errors import InvalidRequestError
from server.generation_fields import TokenId
from server.request_body import RequestBody, dump_json, parse_body
from server.schemas import ImagePart, Message, Tool, refuse_engine_fields


class TokenizeRequest(RequestBody):
    """Either a prompt or a conversation without pictures."""

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
        return dump_json(self.sent)


class DetokenizeRequest(RequestBody):
    model: StrictStr | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]

    def engine_body(self) -> bytes:
        """The engine's request as JSON."""
        return dump_json(self.sent)


def parse_tokenize_request(body: bytes) -> TokenizeRequest:
    """Read a request body.

    Raises:
        InvalidRequestError: not JSON, a field of the wrong shape, both or neither of prompt and messages, or pictures.
    """
    request = parse_body(TokenizeRequest, body)
    if (request.prompt is None) == (request.messages is None):
        raise InvalidRequestError("give either 'prompt' or 'messages'", param="prompt")
    refuse_engine_fields(request.messages or ())
    for turn, message in enumerate(request.messages or ()):
        for place, part in enumerate(message.content if isinstance(message.content, list) else ()):
            if isinstance(part, ImagePart):
                # The engine would decode it unchecked, and count it at full size whatever its budget.
                raise InvalidRequestError(
                    "pictures cannot be tokenized here; POST /v1/visual_tokens/count tells what they cost",
                    param=f"messages[{turn}].content[{place}]",
                )
    if request.prompt is not None:
        for name in ("add_generation_prompt", "continue_final_message", "tools"):
            if name in request.sent:
                raise InvalidRequestError(f"{name!r} goes with 'messages', not with 'prompt'", param=name)
    return request


def parse_detokenize_request(body: bytes) -> DetokenizeRequest:
    """Read a request body.

    Raises:
        InvalidRequestError: not JSON, or a field of the wrong shape.
    """
    return parse_body(DetokenizeRequest, body)
