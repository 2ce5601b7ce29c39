"""LangChain's ChatOpenAI against the gateway."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI


def model(here: SimpleNamespace, **options: Any) -> ChatOpenAI:
    defaults = {"base_url": here.base_url, "api_key": here.api_key, "model": here.model, "max_retries": 0}
    return ChatOpenAI(**(defaults | options))


def question(here: SimpleNamespace, **image: Any) -> list[HumanMessage]:
    picture = {"type": "image_url", "image_url": {"url": here.picture, **image}}
    return [HumanMessage([picture, {"type": "text", "text": "What is it?"}])]


def visual_tokens(answer: AIMessage) -> dict[str, Any]:
    found = answer.response_metadata["token_usage"]["visual_tokens"]
    assert isinstance(found, dict)
    return found


def test_plain_answer(here: SimpleNamespace) -> None:
    answer = model(here).invoke("Hello")
    assert answer.content == here.answer
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] > 0


def test_asynchronous_answer(here: SimpleNamespace) -> None:
    assert asyncio.run(model(here).ainvoke("Hello")).content == here.answer


def test_stream_with_usage(here: SimpleNamespace) -> None:
    whole = AIMessageChunk("")
    pieces = 0
    for chunk in model(here, stream_usage=True).stream(question(here)):
        whole += chunk
        pieces += bool(chunk.content)
    assert whole.content == here.answer
    assert pieces > 1
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["input_tokens"] > here.plans.high.placeholders


def test_budget_of_the_request(here: SimpleNamespace) -> None:
    answer = model(here, extra_body={"visual_token_budget": 320}).invoke(question(here))
    found = visual_tokens(answer)
    assert found["saved"] == here.plans.medium.saved
    assert [image["budget"] for image in found["per_image"]] == [320]


def test_detail_low(here: SimpleNamespace) -> None:
    assert visual_tokens(model(here).invoke(question(here, detail="low")))["kept"] == here.plans.low.kept


def test_budget_of_one_image(here: SimpleNamespace) -> None:
    answer = model(here).invoke(question(here, visual_token_budget=320))
    assert visual_tokens(answer)["kept"] == here.plans.medium.kept


def test_budget_in_a_header(here: SimpleNamespace) -> None:
    answer = model(here, default_headers={"X-Visual-Token-Budget": "low"}).invoke(question(here))
    assert visual_tokens(answer)["kept"] == here.plans.low.kept


def test_counts_in_headers(here: SimpleNamespace) -> None:
    headers = model(here, include_response_headers=True).invoke(question(here)).response_metadata["headers"]
    assert int(headers["x-visual-tokens-full"]) == here.plans.high.full
    assert int(headers["x-visual-tokens-saved"]) == here.plans.high.saved


@pytest.mark.parametrize("is_streamed", [False, True])
def test_tools_there_and_back(here: SimpleNamespace, is_streamed: bool) -> None:
    @tool
    def weather(city: str) -> str:
        """The weather of a city."""
        return f"rain in {city}"

    bound = model(here).bind_tools([weather])
    first: AIMessage
    if is_streamed:
        first = AIMessageChunk("")
        for chunk in bound.stream("How is the weather?"):
            first += chunk
    else:
        first = bound.invoke("How is the weather?")
    (call,) = first.tool_calls
    assert (call["name"], call["args"]) == ("weather", {"city": "Paris"})
    result = ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])
    assert bound.invoke([HumanMessage("How is the weather?"), first, result]).content == here.answer


def test_budget_that_is_too_small_is_a_bad_request(here: SimpleNamespace) -> None:
    with pytest.raises(openai.BadRequestError, match="31") as error:
        model(here, extra_body={"visual_token_budget": 31}).invoke(question(here))
    assert error.value.param == "visual_token_budget"


def test_a_budget_for_all_requests_goes_with_those_without_images(here: SimpleNamespace) -> None:
    always = model(here, extra_body={"visual_token_budget": 320}, default_headers={"X-Visual-Token-Budget": "low"})
    assert visual_tokens(always.invoke("Hello"))["images"] == 0
    assert visual_tokens(always.invoke(question(here)))["kept"] == here.plans.medium.kept


def test_options_without_effect(here: SimpleNamespace) -> None:
    more = {"prompt_cache_key": "k", "safety_identifier": "s", "modalities": ["text"]}
    answer = model(here, store=False, service_tier="auto", verbosity="low", model_kwargs=more).invoke("Hello")
    assert answer.content == here.answer


def test_an_image_as_a_string(here: SimpleNamespace) -> None:
    parts = [
        {"type": "image_url", "image_url": here.picture},
        {"type": "text", "text": "What is it?", "cache_control": {"type": "ephemeral"}},
    ]
    assert visual_tokens(model(here).invoke([HumanMessage(parts)]))["kept"] == here.plans.high.kept


def test_unknown_model_is_not_found(here: SimpleNamespace) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-0"):
        model(here, model="gpt-0").invoke("Hello")


def test_wrong_key_is_an_authentication_error(here: SimpleNamespace) -> None:
    with pytest.raises(openai.AuthenticationError):
        model(here, api_key="wrong").invoke("Hello")


def test_leaving_a_stream_frees_the_engine(
    here: SimpleNamespace, engine_sees_it_abandoned: Callable[[Callable[[], None]], bool]
) -> None:
    def abandon() -> None:
        stream = model(here).stream("Tell it slowly")
        assert next(stream).content
        stream.close()  # type: ignore[attr-defined]

    assert engine_sees_it_abandoned(abandon)
