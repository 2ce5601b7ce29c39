"""What an engine's answer becomes."""

from __future__ import annotations

import httpx
import pytest
from asgi_transport import AsgiTransport
from fake_engine import FakeEngine

from server.engine.client import EngineCall, HttpEngineClient
from server.errors import EngineDrainingError, EngineMismatchError, OverloadedError

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


async def test_trace_context_travels_to_the_engine() -> None:
    seen: list[httpx.Headers] = []

    def reply(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers)
        return httpx.Response(200, json={})

    client = HttpEngineClient(httpx.MockTransport(reply))
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    await client.complete(EngineCall("/v1/chat/completions", b"{}", "req-1", headers={"traceparent": trace}))
    assert (seen[0]["traceparent"], seen[0]["x-request-id"]) == (trace, "req-1")
    await client.aclose()
