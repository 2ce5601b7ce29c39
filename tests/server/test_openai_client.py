"""OpenAI's own client against a real server of the gateway."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator

import openai
import pytest
import uvicorn
from fake_engine import GEOMETRY, MODEL, WORDS, FakeEngine
from gateway import make_app
from images import ask, image

from server.settings import Settings
from vd_plugin.schedule import resolve


@pytest.fixture
def client(engine: FakeEngine) -> Iterator[openai.OpenAI]:
    app = make_app(Settings(), engine)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as openai_client:
            yield openai_client
        server.should_exit = True
        thread.join(timeout=10)
        assert not thread.is_alive()


def test_budget_travels_in_extra_body_and_usage_comes_back(client: openai.OpenAI, engine: FakeEngine) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=ask(image(800, 600))["messages"], extra_body={"visual_token_budget": "low"}
    )
    assert answer.choices[0].message.content == "".join(WORDS)
    assert answer.usage is not None
    plan = resolve(GEOMETRY, 600, 800, 160)
    assert answer.usage.visual_tokens["saved"] == plan.saved  # type: ignore[attr-defined]
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert answer.usage.prompt_tokens_details.image_tokens == plan.num_placeholders  # type: ignore[attr-defined]


def test_stream_with_usage(client: openai.OpenAI) -> None:
    *chunks, last = client.chat.completions.create(
        model=MODEL,
        messages=ask(image())["messages"],
        stream=True,
        stream_options={"include_usage": True},
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "".join(WORDS)
    assert last.usage.visual_tokens["images"] == 1  # type: ignore[union-attr]


def test_errors_are_those_that_the_client_knows(client: openai.OpenAI, engine: FakeEngine) -> None:
    messages = ask(image())["messages"]
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model=MODEL, messages=messages, extra_body={"visual_token_budget": 31})
    assert error.value.param == "visual_token_budget"
    engine.error_after = (1, {"message": "no", "code": 500})
    with pytest.raises(openai.APIError, match="engine failed"):
        list(client.chat.completions.create(model=MODEL, messages=messages, stream=True))
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=MODEL, input="a")


def test_models_can_be_listed(client: openai.OpenAI) -> None:
    (model,) = client.models.list()
    assert model.id == MODEL


def test_closing_a_stream_frees_the_engine(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.hold = True
    stream = client.chat.completions.create(model=MODEL, messages=ask(image())["messages"], stream=True)
    next(iter(stream))
    assert not engine.closed.is_set()
    stream.close()
    for _ in range(200):
        if engine.closed.is_set():
            return
        threading.Event().wait(0.01)
    pytest.fail("the engine was not told within two seconds")
