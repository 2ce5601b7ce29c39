"""LiteLLM against the gateway, as it is used for any server that speaks OpenAI's language."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import litellm
import pytest

litellm.telemetry = False

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
WEATHER = [{"role": "user", "content": "How is the weather?"}]


def options(here: SimpleNamespace, messages: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {
        "model": f"openai/{more.pop('model', here.model)}",
        "api_base": here.base_url,
        "api_key": here.api_key,
        "max_retries": 0,
        "messages": messages,
        **more,
    }


def complete(here: SimpleNamespace, messages: list[dict[str, Any]], **more: Any) -> Any:
    return litellm.completion(**options(here, messages, **more))


def say(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def question(here: SimpleNamespace, **image: Any) -> list[dict[str, Any]]:
    picture = {"type": "image_url", "image_url": {"url": here.picture, **image}}
    return [{"role": "user", "content": [picture, {"type": "text", "text": "What is it?"}]}]


def test_plain_answer(here: SimpleNamespace) -> None:
    answer = complete(here, say("Hello"))
    assert answer.choices[0].message.content == here.answer
    assert answer.usage.completion_tokens > 0


def test_asynchronous_answer(here: SimpleNamespace) -> None:
    answer = asyncio.run(litellm.acompletion(**options(here, say("Hello"))))
    assert answer.choices[0].message.content == here.answer


def test_stream_with_usage(here: SimpleNamespace) -> None:
    chunks = list(complete(here, question(here), stream=True, stream_options={"include_usage": True}))
    texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert "".join(texts) == here.answer
    assert len(texts) > 1
    (usage,) = [chunk.usage for chunk in chunks if getattr(chunk, "usage", None)]
    assert usage.prompt_tokens > here.plans.high.placeholders


def test_budget_of_the_request(here: SimpleNamespace) -> None:
    found = complete(here, question(here), extra_body={"visual_token_budget": 320}).usage.visual_tokens
    assert found["saved"] == here.plans.medium.saved
    assert [image["budget"] for image in found["per_image"]] == [320]


def test_detail_low(here: SimpleNamespace) -> None:
    assert complete(here, question(here, detail="low")).usage.visual_tokens["kept"] == here.plans.low.kept


def test_budget_of_one_image(here: SimpleNamespace) -> None:
    answer = complete(here, question(here, visual_token_budget=320))
    assert answer.usage.visual_tokens["kept"] == here.plans.medium.kept


def test_budget_in_a_header(here: SimpleNamespace) -> None:
    answer = complete(here, question(here), extra_headers={"X-Visual-Token-Budget": "low"})
    assert answer.usage.visual_tokens["kept"] == here.plans.low.kept


def test_counts_in_headers(here: SimpleNamespace) -> None:
    headers = complete(here, question(here))._hidden_params["additional_headers"]
    assert int(headers["llm_provider-x-visual-tokens-full"]) == here.plans.high.full
    assert int(headers["llm_provider-x-visual-tokens-saved"]) == here.plans.high.saved


def test_tools_there_and_back(here: SimpleNamespace) -> None:
    message = complete(here, WEATHER, tools=TOOLS).choices[0].message
    (call,) = message.tool_calls
    assert (call.function.name, call.function.arguments) == ("weather", here.tool_arguments)
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    answer = complete(here, [*WEATHER, message.model_dump(), result], tools=TOOLS)
    assert answer.choices[0].message.content == here.answer


def test_streamed_tool_call_comes_together(here: SimpleNamespace) -> None:
    chunks = list(complete(here, WEATHER, tools=TOOLS, stream=True))
    (call,) = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments) == ("weather", here.tool_arguments)


def test_budget_that_is_too_small_is_a_bad_request(here: SimpleNamespace) -> None:
    with pytest.raises(litellm.BadRequestError, match="31") as error:
        complete(here, question(here), extra_body={"visual_token_budget": 31})
    assert error.value.status_code == 400


def test_a_budget_for_all_requests_goes_with_those_without_images(here: SimpleNamespace) -> None:
    assert complete(here, say("Hello"), extra_body={"visual_token_budget": 320}).usage.visual_tokens["images"] == 0


def test_options_without_effect(here: SimpleNamespace) -> None:
    messages = question(here, format="image/png")
    messages[0]["content"][1]["cache_control"] = {"type": "ephemeral"}
    more = {"prompt_cache_key": "k", "safety_identifier": "s", "modalities": ["text"], "service_tier": "auto"}
    answer = complete(here, messages, store=False, user="eve", **more)
    assert answer.usage.visual_tokens["kept"] == here.plans.high.kept


def test_unknown_model_is_not_found(here: SimpleNamespace) -> None:
    with pytest.raises(litellm.NotFoundError, match="gpt-0"):
        complete(here, say("Hello"), model="gpt-0")


def test_wrong_key_is_an_authentication_error(here: SimpleNamespace) -> None:
    with pytest.raises(litellm.AuthenticationError):
        complete(here, say("Hello"), api_key="wrong")


def test_leaving_a_stream_frees_the_engine(
    here: SimpleNamespace, engine_sees_it_abandoned: Callable[[Callable[[], None]], bool]
) -> None:
    def abandon() -> None:
        stream = complete(here, say("Tell it slowly"), stream=True)
        assert next(stream).choices[0].delta.content
        stream.completion_stream.close()

    assert engine_sees_it_abandoned(abandon)
