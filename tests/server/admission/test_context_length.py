"""What is surely too long is refused at once, in vLLM's words; what only might be goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from server.admission.context_length import LONGEST_TRUNCATED_TOKENS, ContextLength
from server.admission.load import UNLIMITED_ANSWER_TOKENS, Load, load_of
from server.errors import InvalidRequestError
from server.schemas.chat import ChatRequest
from server.schemas.completions import CompletionRequest
from server.schemas.generation import GenerationRequest
from server.schemas.responses import ResponsesRequest

CONTEXT = ContextLength(max_model_len=100, max_chars_per_token=4)
MOST = "x" * 400


def chat(content: Any, role: str = "user", **fields: Any) -> GenerationRequest:
    return ChatRequest.parse(json.dumps({"messages": [{"role": role, "content": content}], **fields}).encode())


def completion(prompt: Any, **fields: Any) -> GenerationRequest:
    return CompletionRequest.parse(json.dumps({"prompt": prompt, **fields}).encode())


def response(content: Any, **fields: Any) -> GenerationRequest:
    return ResponsesRequest.parse(json.dumps({"input": content, **fields}).encode())


def refusal(body: GenerationRequest, visual_tokens: int = 0, context: ContextLength = CONTEXT) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        context.check(body, visual_tokens)
    error = caught.value
    assert (error.status, error.code, error.reason) == (400, "context_length_exceeded", "too_long")
    return error


TEXT_PARTS = [{"type": "text", "text": MOST}, {"type": "text", "text": "y"}]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (chat(MOST + "y"), "messages"),
        (chat(TEXT_PARTS), "messages"),
        (completion(MOST + "y"), "prompt"),
        (completion(["short", MOST + "y"]), "prompt"),
        (response(MOST + "y"), "input"),
        (response([{"role": "user", "content": [{"type": "input_text", "text": MOST + "y"}]}]), "input"),
    ],
)
def test_text_that_no_tokenizer_fits_is_refused_in_the_engines_words(body: GenerationRequest, param: str) -> None:
    error = refusal(body)
    assert error.param == param
    assert error.message == (
        "This model's maximum context length is 100 tokens. However, your prompt contains 401 characters (more than "
        "400 characters, which is the upper bound for 100 input tokens). Please reduce the length of the input prompt."
    )


@pytest.mark.parametrize(
    "body",
    [
        chat(MOST),
        chat(f"  {MOST}\n" + " " * 1000),  # a template may trim it
        chat(MOST * 2, role="system"),  # or leave it out
        chat(MOST * 2, truncate_prompt_tokens=50),
        completion([MOST, MOST]),
        response(MOST * 2, truncation="auto"),
        response("short", instructions=MOST * 2),
    ],
)
def test_what_might_fit_goes_on(body: GenerationRequest) -> None:
    CONTEXT.check(body)


def test_token_ids_are_counted() -> None:
    CONTEXT.check(completion([7] * 100))
    for prompt in ([7] * 101, [[7], [7] * 101]):
        assert refusal(completion(prompt)).message == (
            "This model's maximum context length is 100 tokens. However, your prompt contains 101 input tokens, which "
            "exceeds this limit even without any output tokens. Please reduce the length of the input prompt."
        )


def test_visual_tokens_count_with_the_least_that_the_text_can_be() -> None:
    CONTEXT.check(chat("x" * 40), visual_tokens=90)
    error = refusal(chat("x" * 40), visual_tokens=91)
    assert "contains at least 101 input tokens" in error.message
    refusal(chat(""), visual_tokens=101)


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (chat("a", max_tokens=101), "max_tokens"),
        (chat("a", max_tokens=1, max_completion_tokens=101), "max_completion_tokens"),
        (completion("a", max_tokens=101), "max_tokens"),
        (response("a", max_output_tokens=101), "max_output_tokens"),
    ],
)
def test_answer_that_is_longer_than_any_is_refused(body: GenerationRequest, name: str) -> None:
    error = refusal(body)
    assert error.param == name
    assert error.message == (
        f"{name}=101 cannot be greater than max_model_len=100. Please request fewer output tokens."
    )


def test_prompt_and_answer_are_not_added_since_the_engine_shortens_the_answer() -> None:
    CONTEXT.check(chat(MOST, max_tokens=100))


def test_engine_that_does_not_know_its_tokenizer_counts_what_is_certain() -> None:
    context = ContextLength(100)
    context.check(chat(MOST * 100))
    refusal(chat("a"), visual_tokens=101, context=context)


def test_answer_without_a_limit_counts_no_less_than_one_with_a_usual_limit() -> None:
    assert load_of(chat("hi"), 0, None).work >= load_of(chat("hi", max_tokens=1000), 0, None).work
    assert load_of(chat("hi"), 0, 100) == load_of(chat("hi", max_tokens=100), 0, 100)


@pytest.mark.parametrize(
    ("body", "visual_tokens", "load"),
    [
        (chat("x" * 40), 0, Load(10, 1, UNLIMITED_ANSWER_TOKENS)),
        (chat("x" * 40, max_tokens=7), 30, Load(40, 1, 7)),
        (chat("x" * 40, max_tokens=7, n=3), 30, Load(120, 3, 21)),
        (completion([[1] * 10, [1] * 20], max_tokens=7, n=2), 0, Load(62, 4, 28)),
        (completion("x" * 40), 0, Load(10, 1, 16)),
        (completion("x" * 40, max_tokens=None), 0, Load(10, 1, 16)),
        (chat("x" * 100_000, max_tokens=5000), 0, Load(2000, 1, 2000)),
        (response("x" * 40, max_output_tokens=7), 0, Load(10, 1, 7)),
    ],
)
def test_load_counts_every_answer_and_nothing_beyond_the_context(
    body: GenerationRequest, visual_tokens: int, load: Load
) -> None:
    assert load_of(body, visual_tokens, 2000) == load


@pytest.mark.parametrize(
    ("make", "param"),
    [
        (lambda text: chat(text, truncate_prompt_tokens=50), "messages"),
        (lambda text: chat(text, role="system", truncate_prompt_tokens=50), "messages"),
        (lambda text: completion(text, truncate_prompt_tokens=-1), "prompt"),
        (lambda text: response(text, truncation="auto"), "input"),
    ],
)
def test_a_text_to_be_truncated_must_not_hold_up_the_tokenizer(
    make: Callable[[str], GenerationRequest], param: str
) -> None:
    longest = "x" * (4 * LONGEST_TRUNCATED_TOKENS)
    CONTEXT.check(make(longest[:-64]))
    error = refusal(make(longest + "x" * 64))
    assert error.param == param
    assert "is too long to be truncated" in error.message
    ContextLength(2 * LONGEST_TRUNCATED_TOKENS, 4).check(make(longest + "x" * 64))
