"""What a chat request may hold: every field is honoured or refused, and values are left as they came."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from images import ask, image

from server.errors import InvalidRequestError
from server.schemas.chat import NO_EFFECT_IN_PARTS, ChatRequest
from server.schemas.generation import NO_EFFECT_FIELDS


def parse(body: dict[str, Any]) -> ChatRequest:
    return ChatRequest.parse(json.dumps(body).encode())


def text(content: Any = "Hi", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], **fields}


def refusal(body: dict[str, Any]) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        parse(body)
    return caught.value


@pytest.mark.parametrize(
    "name", ["options", "web_search_options", "topP", *(f"{name}s" for name in sorted(NO_EFFECT_FIELDS))]
)
def test_nobody_is_sent_to_what_is_another_thing_or_has_no_effect(name: str) -> None:
    assert refusal(text(**{name: 1})).message == f"unknown field {name!r}"


def image_part(**fields: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": image(), **fields}}


FIELDS = {
    "temperature": 1,
    "top_p": 1,
    "logit_bias": {"3": 1},
    "n": 2,
    "seed": -1,
    "stop": ["a", "b"],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}, "x": 1}}],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
    "structured_outputs": {"json": {"type": "object"}},
    "stream_options": {"include_usage": True, "include_obfuscation": False},
    "repetition_detection": {"max_pattern_size": 2, "min_count": 2},
    "user": "eve",
}


def test_values_are_left_as_they_were_sent() -> None:
    request = parse(text(**FIELDS))
    assert json.dumps({name: request.sent[name] for name in FIELDS}) == json.dumps(FIELDS)


NO_EFFECT = {
    "metadata": {"run": "7"},
    "modalities": ["text"],
    "prediction": {"type": "content", "content": "A red square."},
    "prompt_cache_key": "k",
    "prompt_cache_options": {"mode": "explicit", "ttl": "30m"},
    "prompt_cache_retention": "24h",
    "safety_identifier": "s",
    "service_tier": "auto",
    "store": False,
    "user": "eve",
    "verbosity": "low",
}


@pytest.mark.parametrize("name", sorted(NO_EFFECT_FIELDS))
def test_what_has_no_effect_is_accepted_and_kept_from_the_engine(name: str) -> None:
    body = text(seed=1)
    assert parse({**body, name: NO_EFFECT[name]}).engine_body() == parse(body).engine_body()


PART_NO_EFFECT = {
    "cache_control": {"type": "ephemeral"},
    "format": "image/png",
    "mime_type": "image/png",
    "name": "square.png",
    "prompt_cache_breakpoint": {"mode": "explicit"},
}


@pytest.mark.parametrize("name", sorted(NO_EFFECT_IN_PARTS))
def test_what_has_no_effect_in_a_part_is_accepted_and_kept_from_the_engine(name: str) -> None:
    more = {name: PART_NO_EFFECT[name]}
    words = {"type": "text", "text": "a"}
    plain = parse(text([image_part(), words, image_part()]))
    marked = parse(text([image_part(**more), {**words, **more}, {**image_part(), **more}]))
    urls = [image(), image(color="blue")]
    assert marked.images() == plain.images()
    assert marked.engine_body(urls, [160, 160]) == plain.engine_body(urls, [160, 160])


def test_the_documentation_lists_what_has_no_effect() -> None:
    page = (Path(__file__).parents[3] / "docs" / "api.md").read_text()
    section = page.partition("### Accepted without effect")[2].partition("\n## ")[0]
    assert [name for name in sorted(NO_EFFECT_FIELDS | NO_EFFECT_IN_PARTS) if f"`{name}`" not in section] == []


def test_an_image_may_be_its_url_alone() -> None:
    request = parse(text([{"type": "image_url", "image_url": image()}, image_part()]))
    alone, object_ = request.images()
    assert alone.url == object_.url
    assert alone.url_path == "messages[0].content[0].image_url"
    assert object_.url_path == "messages[0].content[1].image_url.url"
    sent = json.loads(request.engine_body(["data:a", "data:b"], [160, 160]))["messages"][0]["content"]
    assert [part["image_url"] for part in sent] == [{"url": "data:a"}, {"url": "data:b"}]


def test_null_asks_for_nothing() -> None:
    nulls = {"use_beam_search": None, "tool_choice": None, "cache_salt": None, "min_pixels": None, "stop": None}
    assert set(parse(text(**nulls)).sent) == {"messages"}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("min_pixels", 3, "'visual_token_budget'"),
        ("max_soft_tokens", 280, "'visual_token_budget'"),
        ("detail", "low", "'visual_token_budget'"),
        ("temprature", 1, "did you mean 'temperature'"),
        ("visual_tokens_budget", 64, "did you mean 'visual_token_budget'"),
        ("num_predict", 3, "use 'max_completion_tokens'"),
        ("n_predict", 3, "use 'max_completion_tokens'"),
        ("store", True, "keeps no answers"),
        ("functions", [], "use 'tools'"),
        ("function_call", "auto", "use 'tool_choice'"),
        ("guided_json", {}, "use 'structured_outputs.json'"),
        ("guided_regex", "a", "use 'structured_outputs.regex'"),
        ("guided_choice", ["a"], "use 'structured_outputs.choice'"),
        ("guided_grammar", "a", "use 'structured_outputs.grammar'"),
        ("guided_decoding_backend", "a", "use 'structured_outputs'"),
        ("max_output_tokens", 3, "use 'max_completion_tokens'"),
        ("max_new_tokens", 3, "use 'max_completion_tokens'"),
        ("input", "a", "use 'messages'"),
        ("prompt", "a", "use 'messages'"),
        ("instructions", "a", "use 'messages'"),
        ("reasoning", {"effort": "low"}, "use 'reasoning_effort'"),
        ("text", {}, "use 'response_format'"),
        ("stop_sequences", ["a"], "use 'stop'"),
        ("audio", {"voice": "alloy", "format": "wav"}, "unknown field 'audio'"),
        ("web_search_options", {}, "unknown field 'web_search_options'"),
        ("moderation", {"model": "m"}, "unknown field 'moderation'"),
        ("chat_template", "a", "cannot be set"),
        ("mm_processor_kwargs", {}, "cannot be set"),
        ("routed_experts_prompt_start", 1, "cannot be set"),
        ("return_token_offsets", True, "no effect"),
        ("mm_payload", "none", "no effect"),
        ("sent", 1, "unknown field"),
        ("_sent", {}, "unknown field"),
    ],
)
def test_unknown_fields_are_named(name: str, value: Any, words: str) -> None:
    error = refusal(text(**{name: value}))
    assert error.param == name
    assert words in error.message


@pytest.mark.parametrize(
    ("part", "param", "words"),
    [
        ({**image_part(), "uuid": "a"}, "messages[0].content[0].uuid", "caches"),
        ({**image_part(), "image_embeds": "a"}, "messages[0].content[0].image_embeds", "embeddings"),
        ({**image_part(), "detail": "low"}, "messages[0].content[0].detail", "inside 'image_url'"),
        (image_part(max_pixels=3), "messages[0].content[0].image_url.max_pixels", "visual_token_budget"),
        (image_part(uuid="a"), "messages[0].content[0].image_url.uuid", "caches"),
        (image_part(detail="fine"), "messages[0].content[0].image_url.detail", "'original'"),
        (
            image_part(visual_token_budget=31),
            "messages[0].content[0].image_url.visual_token_budget",
            "at least 32",
        ),
        ({"type": "text", "text": "a", "min_pixels": 1}, "messages[0].content[0].min_pixels", "not permitted"),
    ],
)
def test_a_part_holds_nothing_foreign(part: dict[str, Any], param: str, words: str) -> None:
    error = refusal(text([part]))
    assert error.param == param
    assert words in error.message


@pytest.mark.parametrize("detail", ["auto", "low", "high", "original", "full", None])
def test_a_image_has_a_budget_and_a_detail_of_its_own(detail: str | None) -> None:
    request = parse(text([image_part(detail=detail, visual_token_budget="low"), image_part()]))
    first, second = request.images()
    assert (first.detail, first.budget) == (detail, 160)
    assert (second.detail, second.budget) == (None, None)


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop": 5}, "stop"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"tools": []}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": ["auto"]}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"structured_outputs": {"json": {}, "yaml": 1}}, "structured_outputs.yaml"),
        ({"stream_options": {"x": 1}}, "stream_options.x"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"bad_words": [""]}, "bad_words[0]"),
        ({"repetition_penalty": 1e300}, "repetition_penalty"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"modalities": ["audio"]}, "modalities[0]"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"verbosity": "chatty"}, "verbosity"),
    ],
)
def test_values_out_of_range_are_refused_with_their_path(field: dict[str, Any], param: str) -> None:
    assert refusal(text(**field)).param == param


@pytest.mark.parametrize(
    "name", ["visual_token_budget", "min_pixels", "detail", "mm_processor_kwargs", "uuid", "image_embeds"]
)
def test_budgets_and_knobs_beside_a_messages_content_are_refused(name: str) -> None:
    message = {"role": "user", "content": [image_part()]}
    assert refusal({"messages": [message, {**message, name: "low"}]}).param == f"messages[1].{name}"
    parse({"messages": [{**message, name: None, "reasoning_content": "hm"}]})


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (text([{"type": "text", "text": "see <image>"}, image_part()]), "messages[0].content[0].text"),
        (
            text([{"type": "text", "text": "<ima"}, {"type": "text", "text": "ge>"}, image_part()]),
            "messages[0].content",
        ),
        (
            {"messages": [{"role": "assistant", "content": "<image>"}, *ask(image())["messages"]]},
            "messages[0].content",
        ),
        (
            ask(image(), tools=[{"type": "function", "function": {"name": "f", "description": "an <image>"}}]),
            "tools[0].function.description",
        ),
        (
            ask(image(), tools=[{"type": "function", "function": {"name": "f", "parameters": {"<image>": {}}}}]),
            "tools[0].function.parameters",
        ),
        (ask(image(), documents=[{"title": "<image>"}]), "documents[0].title"),
    ],
)
def test_text_may_not_stand_for_a_image(body: dict[str, Any], param: str) -> None:
    error = refusal(body)
    assert error.param == param
    assert "'<image>'" in error.message


def test_the_marker_is_text_where_there_are_no_images() -> None:
    assert parse(text("What does <image> mean in SVG?")).messages


def test_the_message_of_an_answer_can_be_sent_back() -> None:
    """As OpenAI's client dumps it, nulls included."""
    said = {"role": "assistant", "content": "A", "refusal": None, "annotations": None, "audio": None, "reasoning": None}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    called = {"role": "assistant", "content": None, "tool_calls": [call], "function_call": None}
    result = {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "4"}]}
    messages = [{"role": "user", "content": "x"}, said, called, result]
    request = parse({"messages": messages})
    assert [message.model_dump(exclude_unset=True) for message in request.messages] == messages


@pytest.mark.parametrize("role", ["user", "system", "developer", "tool", "assistant"])
@pytest.mark.parametrize("message", [{"content": None}, {}])
def test_only_an_assistants_message_may_be_without_content(role: str, message: dict[str, Any]) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}, {"role": role, **message}]}
    if role == "assistant":
        parse(body)
        return
    error = refusal(body)
    assert error.param == "messages[1].content"
    assert error.message.startswith("content must be a string or a list of content parts")
