"""The generating pipeline as a client sees it, before a fake engine."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from asgi_transport import AsgiTransport
from fake_engine import GEOMETRY, MODEL, TEXT_TOKENS, WORDS, FakeEngine, images_of, sse_data
from gateway import assert_error, make_app
from images import ask, data_url, encode, image
from metric_text import metric, metrics_of
from PIL import Image

from server.engine.client import HttpEngineClient
from server.settings import Settings
from vd_plugin.schedule import FULL, Budget, resolve

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}

ENGINE_FIELDS = {
    "mm_processor_kwargs": {"visual_token_budget": 32},
    "media_io_kwargs": {},
    "vllm_xargs": {"a": 1},
    "chat_template": "{{ messages }}",
    "chat_template_kwargs": {},
    "priority": 0,
    "kv_transfer_params": {},
    "ec_transfer_params": {},
    "cache_salt": "a",
    "request_id": "a",
}

URL = "messages[0].content[0].image_url.url"


@pytest.mark.parametrize(
    ("asked", "budget"),
    [(None, 640), ("low", 160), ("medium", 320), ("high", 640), ("full", "full"), (32, 32), (10**30, "full")],
)
async def test_budget_reaches_the_engine_and_its_savings_the_client(
    client: httpx.AsyncClient, engine: FakeEngine, asked: Any, budget: Budget
) -> None:
    response = await client.post(CHAT, json=ask(image(800, 600), visual_token_budget=asked))

    assert response.status_code == 200, response.text
    assert engine.bodies[0]["mm_processor_kwargs"] == {"visual_token_budget": [budget]}
    assert "visual_token_budget" not in engine.bodies[0]
    plan = resolve(GEOMETRY, 600, 800, budget)
    usage = response.json()["usage"]
    assert usage["prompt_tokens_details"] == {
        "cached_tokens": 3,
        "image_tokens": plan.num_placeholders,
        "text_tokens": TEXT_TOKENS,
    }
    per_image = [{"budget": budget, "full": plan.full, "kept": plan.kept, "stages": list(plan.rows)}]
    assert usage["visual_tokens"] == {
        "images": 1,
        "full": plan.full,
        "kept": plan.kept,
        "saved": plan.full - plan.kept,
        "per_image": per_image,
    }
    assert response.headers["x-visual-tokens-full"] == str(plan.full)
    assert response.headers["x-visual-tokens-kept"] == str(plan.kept)
    assert response.headers["x-visual-tokens-saved"] == str(plan.saved)


async def test_images_of_all_turns_are_planned_in_order_of_appearance(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    sizes = [(336, 336), (1008, 336), (40, 30)]
    body = ask(image(*sizes[0]), image(*sizes[1]))
    body["messages"] += [{"role": "assistant", "content": "Two."}, *ask(image(*sizes[2]))["messages"]]

    usage = (await client.post(CHAT, json={**body, "visual_token_budget": 1500})).json()["usage"]

    plans = [resolve(GEOMETRY, height, width, 1500) for width, height in sizes]
    assert [item.size for item in images_of(engine.bodies[0])] == sizes
    budgets = [FULL if plan.is_full else 1500 for plan in plans]
    assert len(set(budgets)) == 2, "the case should mix pruned and full pictures"
    assert engine.bodies[0]["mm_processor_kwargs"]["visual_token_budget"] == budgets
    assert [item["full"] for item in usage["visual_tokens"]["per_image"]] == [plan.full for plan in plans]
    assert usage["visual_tokens"]["saved"] == sum(plan.saved for plan in plans)


async def test_two_budgets_in_headers_are_refused(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    headers = [("X-Visual-Token-Budget", "64"), ("X-Visual-Token-Budget", "0")]
    response = await client.post(CHAT, json=ask(image()), headers=headers)
    assert_error(response, 400, "X-Visual-Token-Budget", "64, 0")
    assert not engine.bodies


async def test_text_only_requests_carry_no_budget(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    response = await client.post(CHAT, json=body)

    assert "mm_processor_kwargs" not in engine.bodies[0]
    usage = response.json()["usage"]
    assert usage["visual_tokens"] == {"images": 0, "full": 0, "kept": 0, "saved": 0, "per_image": []}
    assert usage["prompt_tokens_details"] == {"cached_tokens": 3, "image_tokens": 0, "text_tokens": TEXT_TOKENS}


async def test_other_fields_pass_through(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    message = {"role": "user", "content": "Hi", "name": "Eve"}
    fields = {"temperature": 0.5, "max_tokens": 7, "logit_bias": {"1": 2}, "min_p": 0.1, "seed": 1, "stop": ["a"]}
    await client.post(CHAT, json={"model": MODEL, "messages": [message], **fields, "priority": None})

    assert engine.bodies[0] == {"model": MODEL, "messages": [message], **fields}


@pytest.mark.parametrize("value", [0, 31, -1, 1.5, 640.0, True, False, "lots", "640", [], {}])
async def test_unusable_budgets_are_refused(client: httpx.AsyncClient, engine: FakeEngine, value: Any) -> None:
    response = await client.post(CHAT, json=ask(image(), visual_token_budget=value))
    assert_error(response, 400, "visual_token_budget", "at least 32", "'low'", "'full'")
    assert not engine.bodies


@pytest.mark.parametrize("name", ENGINE_FIELDS)
async def test_fields_that_reach_into_the_engine_are_refused(
    client: httpx.AsyncClient, engine: FakeEngine, name: str
) -> None:
    response = await client.post(CHAT, json=ask(image(), **{name: ENGINE_FIELDS[name]}))
    assert_error(response, 400, name)
    assert not engine.bodies


async def test_prompt_logprobs_are_refused_for_pruned_images_only(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    response = await client.post(CHAT, json=ask(image(), prompt_logprobs=1, visual_token_budget=64))
    assert_error(response, 400, "prompt_logprobs", "full")
    assert not engine.bodies
    response = await client.post(CHAT, json=ask(image(), prompt_logprobs=1, visual_token_budget="full"))
    assert response.status_code == 200


def _parts(*parts: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": list(parts)}]}).encode()


def _image_part(url: str, **fields: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}, **fields}


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (b"{", None, "not valid JSON"),
        (b"[]", None, "JSON object"),
        (b'{"messages": [], "a": NaN}', None, "not valid JSON"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', None, "not valid JSON"),
        (b"[" * 100_000, None, "not valid JSON"),
        (b'{"messages": [{"role": "user", "content": "a"}], "top_p": 1e999}', "top_p", "less than"),
        (b'{"messages": [{"role": "user", "content": "a", "x": 1e999}]}', None, "too large"),
        (b"{}", "messages", "required"),
        (b'{"messages": []}', "messages", "at least 1"),
        (b'{"messages": [{"content": "a"}]}', "messages[0].role", "required"),
        (b'{"messages": [{"role": "user", "content": 1}]}', "messages[0].content", "string or a list"),
        (b'{"messages": [{"role": "user", "content": "a"}], "stream": 1}', "stream", "boolean"),
        (_parts("a"), "messages[0].content[0]", "'image_url'"),
        (_parts({"type": "video_url", "video_url": {"url": "a"}}), "messages[0].content[0]", "video"),
        (_parts({"type": "input_audio", "input_audio": {}}), "messages[0].content[0]", "audio"),
        (_parts({"type": "image_embeds", "image_embeds": "a"}), "messages[0].content[0]", "embeddings"),
        (_parts(_image_part("data:image/png;base64,", uuid="a")), "messages[0].content[0].uuid", "not permitted"),
        (_parts({"type": "image_url", "image_url": "a"}), "messages[0].content[0].image_url", ""),
        (_parts(_image_part("http://example.org/a.png")), URL, "http"),
        (_parts(_image_part("file:///etc/passwd")), URL, "data URL"),
        (_parts(_image_part("data:image/png;base64,!!!")), URL, "base64"),
        (_parts(_image_part("data:image/png;base64,aGVsbG8=")), URL, "not a JPEG"),
        (_parts(_image_part(data_url(encode(Image.new("RGB", (64, 64)))[:60]))), URL, "cannot be decoded"),
    ],
)
async def test_bad_requests_get_a_sentence(
    client: httpx.AsyncClient, engine: FakeEngine, body: bytes, param: str | None, words: str
) -> None:
    assert_error(await client.post(CHAT, content=body, headers=JSON), 400, param, words)
    assert not engine.bodies
    assert (await client.post(CHAT, json=ask(image()))).status_code == 200, "the server should go on serving"


async def test_limits_are_settings(engine: FakeEngine) -> None:
    settings = Settings(max_images_per_request=2, max_image_pixels=10_000, max_image_bytes=2000, max_body_bytes=20_000)
    app = make_app(settings, engine)
    async with httpx.AsyncClient(transport=AsgiTransport(app), base_url="http://gateway") as client:
        assert_error(await client.post(CHAT, json=ask(*[image()] * 3)), 400, "messages", "at most 2")
        assert_error(await client.post(CHAT, json=ask(image(101, 100))), 400, URL, "at most 10000")
        noise = encode(Image.effect_noise((90, 90), 50))
        assert_error(await client.post(CHAT, json=ask(data_url(noise))), 413, URL, "at most 2000")
        assert_error(await client.post(CHAT, content=b" " * 20_001, headers=JSON), 413, None, "20000")
        assert (await client.post(CHAT, json=ask(image(100, 100), image()))).status_code == 200


async def test_unreachable_engine_is_503() -> None:
    app = make_app(Settings(), HttpEngineClient.at("unix:/nowhere/engine.sock"))
    async with httpx.AsyncClient(transport=AsgiTransport(app), base_url="http://gateway") as client:
        assert_error(await client.post(CHAT, json=ask(image())), 503, None, "no engine is ready")
        assert_error(await client.get("/ready"), 503, None)
        assert_error(await client.get("/v1/models"), 503, None)
        assert (await client.get("/health")).status_code == 200
        text = await metrics_of(client)
        assert metric(text, 'visiondrop_engine_up{engine="0"}') == 0
        assert metric(text, f'visiondrop_requests_total{{budget_class="none",code="503",route="{CHAT}"}}') == 1


async def test_stream_relays_words_and_ends_with_usage_if_asked(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    body = ask(image(800, 600), stream=True, stream_options={"include_usage": True}, visual_token_budget="low")
    async with client.stream("POST", CHAT, json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-visual-tokens-kept"] == str(resolve(GEOMETRY, 600, 800, 160).kept)
        *events, done = await sse_data(response.aiter_bytes())

    assert done == "[DONE]"
    *chunks, last = [json.loads(event) for event in events]
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == "".join(WORDS)
    assert last["choices"] == []
    plain = (await client.post(CHAT, json=ask(image(800, 600), visual_token_budget="low"))).json()
    assert last["usage"] == plain["usage"]
    assert last["usage"]["visual_tokens"]["per_image"][0]["budget"] == 160


@pytest.mark.parametrize("options", [{}, {"stream_options": {"continuous_usage_stats": True}}])
async def test_stream_without_include_usage_has_none(
    client: httpx.AsyncClient, engine: FakeEngine, options: dict[str, Any]
) -> None:
    async with client.stream("POST", CHAT, json=ask(image(), stream=True, **options)) as response:
        *events, _ = await sse_data(response.aiter_bytes())
    assert engine.bodies[0]["stream_options"]["include_usage"] is True
    assert len(events) == len(WORDS)
    assert not any("usage" in json.loads(event) for event in events)


async def test_continuous_usage_is_in_our_shape_in_every_chunk(client: httpx.AsyncClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    async with client.stream("POST", CHAT, json=ask(image(), stream=True, stream_options=options)) as response:
        *events, _ = await sse_data(response.aiter_bytes())
    assert len(events) == len(WORDS) + 1
    assert all(json.loads(event)["usage"]["visual_tokens"]["images"] == 1 for event in events)


@pytest.mark.parametrize("geometry", [None, {"geometry": {"rule_version": 2}, "plugin_version": "9"}, {"geometry": 1}])
async def test_engine_that_does_not_fit_is_refused(
    client: httpx.AsyncClient, engine: FakeEngine, geometry: dict[str, Any] | None
) -> None:
    engine.geometry = geometry
    assert_error(await client.get("/ready"), 503, None, "the engine")
    response = await client.post(CHAT, json=ask(image()))
    assert_error(response, 503, None, "the engine")
    assert response.json()["error"]["code"] == "engine_mismatch"
    assert 1 <= int(response.headers["retry-after"]) <= 120
    assert metric(await metrics_of(client), 'visiondrop_rejections_total{reason="engine_down"}') == 1, (
        "a probe is nobody turned away"
    )
    assert not engine.bodies


async def test_default_budget_is_a_setting(engine: FakeEngine) -> None:
    app = make_app(Settings(default_budget="medium"), engine)
    async with httpx.AsyncClient(transport=AsgiTransport(app), base_url="http://gateway") as client:
        await client.post(CHAT, json=ask(image(800, 600)))
    assert engine.bodies[0]["mm_processor_kwargs"] == {"visual_token_budget": [320]}
