"""What an engine's answer becomes."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest
from asgi_transport import AsgiTransport
from fake_engine import FakeEngine

from server.engine.client import EngineCall, HttpEngineClient
from server.engine.relay import relay_events
from server.errors import EngineDrainingError, EngineFailedError, EngineMismatchError, OverloadedError
from server.telemetry.record import RequestRecord

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("sent", "told"), [(None, "5"), ("7", "7"), ("0", "1"), ("9" * 400, "120"), ("-3", "5"), ("²", "5"), ("soon", "5")]
)
async def test_overloaded_engine_says_when_to_come_again(sent: str | None, told: str) -> None:
    headers = {} if sent is None else {"Retry-After": sent.encode()}
    engine = httpx.MockTransport(lambda _: httpx.Response(503, headers=headers, content=b"nonsense"))
    client = HttpEngineClient(engine)
    for ask in (client.complete, client.open_stream):
        with pytest.raises(OverloadedError) as error:
            await ask(EngineCall("/v1/chat/completions", b"{}", "req-1"))
        assert error.value.headers() == {"Retry-After": told}
    await client.aclose()


@pytest.mark.parametrize(
    ("answer", "healthy"),
    [
        (httpx.Response(200), True),
        (httpx.Response(503), False),
        (httpx.ConnectError("refused"), False),
        (httpx.ConnectTimeout("nobody"), False),
        (httpx.ReadTimeout("slow"), None),
        (httpx.RemoteProtocolError("what?"), None),
    ],
)
async def test_health_that_is_not_told_is_not_known(answer: httpx.Response | Exception, healthy: bool | None) -> None:
    def reply(_: httpx.Request) -> httpx.Response:
        if isinstance(answer, Exception):
            raise answer
        return answer

    client = HttpEngineClient(httpx.MockTransport(reply))
    assert await client.probe_health() is healthy
    assert await client.is_healthy() is (healthy is True)
    await client.aclose()


async def test_engine_that_is_being_stopped_is_told_from_a_dead_and_from_a_busy_one(engine: FakeEngine) -> None:
    client = HttpEngineClient(AsgiTransport(engine))
    await client.geometry()
    engine.is_draining = True
    with pytest.raises(EngineDrainingError):
        await client.probe_health()
    assert not await client.is_healthy()
    for ask in (client.complete, client.open_stream):
        with pytest.raises(EngineDrainingError) as error:
            await ask(EngineCall("/v1/chat/completions", b"{}", "req-1"))
        assert (error.value.status, error.value.reason, error.value.code) == (503, "engine_down", "engine_draining")
        assert int(error.value.headers()["Retry-After"]) >= 1
    engine.geometry = None
    with pytest.raises(EngineMismatchError):
        await client.geometry()  # what comes back may be another engine
    await client.aclose()


@pytest.mark.parametrize(
    "body",
    [b"", b"what?", b"[1]", b"null", b'{"a": NaN}', b'{"a": 1e', b"[" * 100_000, b'{"a":' * 100_000,
     b'{"choices": 3}', b'{"choices": {"0": 1}}', b'{"choices": [1]}', b"\xff{}",
     *(b'{"choices": [{%b}]}' % field
       for field in (b'"a": 1e999', b'"a": [-1e999]', b'"a": "\\ud83d"', b'"\\uDE00": 1'))],
)  # fmt: skip
async def test_answer_that_cannot_be_read_is_the_engines_failure(body: bytes) -> None:
    def reply(request: httpx.Request) -> httpx.Response:
        return httpx.Response(
            200, content=body if request.url.path == "/v1/completions" else b"data: " + body + b"\n\n"
        )

    client = HttpEngineClient(httpx.MockTransport(reply))
    with pytest.raises(EngineFailedError, match="cannot be read"):
        await client.complete(EngineCall("/v1/completions", b"{}", "req-1"))
    source = await client.open_stream(EngineCall("/v1/chat/completions", b"{}", "req-1"))
    events = [event async for event in relay_events(source, RequestRecord("req-1", "/"), include_usage=True)]
    assert b"cannot be read" in events[-1]
    assert len(events) == 1
    await client.aclose()


@pytest.mark.parametrize("choices", [{}, {"choices": None}, {"choices": []}])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_answer_without_choices_is_the_engines_failure(path: str, choices: dict[str, Any]) -> None:
    answer = {"id": "a", "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}, **choices}
    client = HttpEngineClient(httpx.MockTransport(lambda _: httpx.Response(200, json=answer)))
    with pytest.raises(EngineFailedError, match="cannot be read"):
        await client.complete(EngineCall(path, b"{}", "req-1"))
    for other in ("/v1/responses", "/tokenize"):
        assert await client.complete(EngineCall(other, b"{}", "req-1"))
    await client.aclose()


async def test_any_text_can_be_read() -> None:
    sent = '{"choices": [{"text": "\\ud83d\\ude00 \\u00e9 \\\\ud83d \N{GRINNING FACE}", "x": 1e308}]}'.encode()
    client = HttpEngineClient(httpx.MockTransport(lambda _: httpx.Response(200, content=sent)))
    answer = await client.complete(EngineCall("/v1/completions", b"{}", "req-1"))
    assert answer == {"choices": [{"text": "\N{GRINNING FACE} é \\ud83d \N{GRINNING FACE}", "x": 1e308}]}
    await client.aclose()


async def test_trace_context_travels_to_the_engine() -> None:
    seen: list[httpx.Headers] = []

    def reply(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers)
        return httpx.Response(200, json={"choices": [{"index": 0}]})

    client = HttpEngineClient(httpx.MockTransport(reply))
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    await client.complete(EngineCall("/v1/chat/completions", b"{}", "req-1", headers={"traceparent": trace}))
    assert (seen[0]["traceparent"], seen[0]["x-request-id"]) == (trace, "req-1")
    await client.aclose()


@pytest.mark.parametrize(
    "url",
    ["unix:/run/engine.sock", "http://127.0.0.1:8000", "http://engine", "https://[::1]:8000/", " http://engine:1 ",
     "http://proxy/engine-0"],
)  # fmt: skip
def test_engine_can_be_at(url: str) -> None:
    assert HttpEngineClient.at(url)


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        *((url, "is http://HOST:PORT or unix:/PATH; got")
          for url in ("localhost:8000", "http://", "http://:8000", "http://a:b", "http://a:99999", "http://a b:1",
                      "http://a:1,http://b:1", "http://[::1:1", "http://a\x00:1", "ftp://a", "")),
        ("http://a:1/v1", "no /v1: give http://a:1"),
        ("http://a:1/x/v1/", "no /v1: give http://a:1/x"),
        ("http://user:secret@a:1", "no user, no query and no /v1: give http://a:1"),
        ("http://a:1/?b=c", "no query"),
        ("unix:/" + "x" * 107, "at most 107 bytes"),
    ],
)  # fmt: skip
def test_url_that_can_be_no_engine_is_refused_with_a_sentence(url: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)) as error:
        HttpEngineClient.at(url)
    assert "secret" not in str(error.value)
