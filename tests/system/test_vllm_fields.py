"""Our lists of request fields against the installed vLLM's own models: an upgrade that adds or drops one fails here.

Imports vLLM (about ten seconds), starts no engine.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
from pydantic import BaseModel

from server.schemas.chat import ChatRequest
from server.schemas.completions import CompletionRequest
from server.schemas.generation import GenerationRequest, RepetitionDetection, StructuredOutputs
from server.schemas.parse import RequestBody
from server.schemas.refusals import ENGINE_FIELDS, IDLE_FIELDS
from server.schemas.responses import UNSERVED_FIELDS, ResponsesRequest
from server.schemas.tokens import DetokenizeRequest, TokenizeRequest

pytestmark = [pytest.mark.engine, pytest.mark.slow]

CHAT = "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest"
COMPLETION = "vllm.entrypoints.openai.completion.protocol:CompletionRequest"
RESPONSES = "vllm.entrypoints.openai.responses.protocol:ResponsesRequest"
TOKENIZE = "vllm.entrypoints.serve.tokenize.protocol"

OURS = {"visual_token_budget"}


def load(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def served(path: str) -> set[str]:
    model = load(path)
    assert issubclass(model, BaseModel)
    return set(model.model_fields) - ENGINE_FIELDS - IDLE_FIELDS


def sent(ours: type[GenerationRequest]) -> set[str]:
    """The fields that the engine may get."""
    return set(ours.model_fields) - OURS - ours.withheld_fields


def test_every_field_of_a_chat_request_is_served_or_refused_on_purpose() -> None:
    assert sent(ChatRequest) == served(CHAT) - ChatRequest.withheld_fields


def test_every_field_of_a_completion_is_served_or_refused_on_purpose() -> None:
    assert sent(CompletionRequest) == served(COMPLETION) - CompletionRequest.withheld_fields


def test_every_field_of_a_response_is_served_or_refused_on_purpose() -> None:
    assert sent(ResponsesRequest) == served(RESPONSES) - UNSERVED_FIELDS.keys() - ResponsesRequest.withheld_fields
    assert not set(ResponsesRequest.model_fields) & UNSERVED_FIELDS.keys()


def test_every_field_of_token_requests_is_served_or_refused_on_purpose() -> None:
    prompts, chats = served(f"{TOKENIZE}:TokenizeCompletionRequest"), served(f"{TOKENIZE}:TokenizeChatRequest")
    assert set(TokenizeRequest.model_fields) == prompts | chats
    assert chats - prompts - {"messages"} == {"add_generation_prompt", "continue_final_message", "tools"}
    assert set(DetokenizeRequest.model_fields) == served(f"{TOKENIZE}:DetokenizeRequest")


def test_what_a_response_sends_back_is_taken_by_the_engine() -> None:
    fields = {
        "metadata": {"a": "b"},
        "prompt_cache_key": "k",
        "reasoning": {"effort": "low", "generate_summary": "auto", "summary": "auto"},
        "service_tier": "default",
        "text": {"verbosity": "low"},
        "user": "eve",
    }
    ResponsesRequest.model_validate({"input": "a", **fields})
    taken = load(RESPONSES).model_validate({"input": "a", **fields})
    assert (taken.reasoning.summary, taken.text.verbosity) == ("auto", "low")
    assert taken.extract_structured_outputs() is None


def test_what_is_refused_exists() -> None:
    everything = set().union(*(load(path).model_fields for path in (CHAT, COMPLETION, RESPONSES)))
    assert everything >= ENGINE_FIELDS | IDLE_FIELDS


def test_options_inside_fields_are_the_engines() -> None:
    import dataclasses

    for ours, path in (
        (StructuredOutputs, "vllm.sampling_params:StructuredOutputsParams"),
        (RepetitionDetection, "vllm.sampling_params:RepetitionDetectionParams"),
    ):
        names = {field.alias or name for name, field in ours.model_fields.items()}
        assert names == {field.name for field in dataclasses.fields(load(path)) if field.init}


CHOICES = {
    "temperature": [0, 1, 2, 2.5, -1],
    "top_p": [0, 0.5, 1, 1.5],
    "min_p": [0, 1, 2],
    "top_k": [-1, 0, 5, -2],
    "presence_penalty": [-2, 2, 3],
    "frequency_penalty": [-2, 2, -3],
    "stop": ["a", ["a"], ["a"] * 4, ["a"] * 5, [""], 5],
    "seed": [-(2**63), 2**63 - 1, 2**63],
    "n": [0, 1, 128],
    "min_tokens": [-1, 0],
    "prompt_logprobs": [-2, -1, 0],
    "truncate_prompt_tokens": [-2, -1, 5],
    "truncation_side": ["left", "middle"],
    "response_format": [{"type": "text"}, {"type": "xml"}, {"type": "json_object"}],
    "bad_words": [["a"], [""]],
    "logit_bias": [{"5": 1}, {"a": 1}],
    "stream_interval": [0, 1],
    "thinking_token_budget": [-2, -1, 3],
    "repetition_detection": [{"max_pattern_size": 2, "min_count": 2}, {"max_pattern_size": -1}],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in CHOICES.items() for value in values])
@pytest.mark.parametrize(
    ("ours", "path", "rest"),
    [
        (ChatRequest, CHAT, {"messages": [{"role": "user", "content": "a"}]}),
        (CompletionRequest, COMPLETION, {"prompt": "a"}),
    ],
    ids=["chat", "completion"],
)
def test_ranges_are_the_engines(ours: type[RequestBody], path: str, rest: Any, name: str, value: Any) -> None:
    """vLLM checks some of them where it makes its sampling parameters."""

    refusals = (ValueError, TypeError, load("vllm.exceptions:VLLMValidationError"))

    def taken(ask: Any) -> bool:
        try:
            ask()
        except refusals:
            return False
        return True

    body = {**rest, name: value}
    theirs = taken(lambda: load(path).model_validate(body).to_sampling_params(16, {}))
    assert taken(lambda: ours.model_validate(body)) == theirs
