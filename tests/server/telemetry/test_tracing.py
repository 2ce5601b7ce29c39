"""Spans of the gateway, read back from OpenTelemetry's own SDK."""

from __future__ import annotations

import sys

import httpx
import pytest
from asgi_transport import AsgiTransport
from fake_engine import FakeEngine
from gateway import make_app
from images import ask, image

from server.settings import Settings
from server.telemetry.tracing import HandOn, OtlpTracing, make_tracing

pytestmark = pytest.mark.anyio

sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="traces need the extra 'tracing'")

CHAT = "/v1/chat/completions"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


async def test_span_is_between_the_clients_and_the_engines(engine: FakeEngine) -> None:
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), sdk.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    app = make_app(Settings(), engine, tracing=OtlpTracing(provider))
    async with httpx.AsyncClient(transport=AsgiTransport(app), base_url="http://gateway") as client:
        await client.post(
            CHAT,
            json=ask(image(800, 600), visual_token_budget=160),
            headers={"traceparent": f"00-{TRACE}-{PARENT}-01"},
        )
        await client.get("/health")
        engine.refusal = (500, {})
        await client.post(CHAT, json=ask(image()))

    served, failed = exporter.get_finished_spans()
    assert f"{served.context.trace_id:032x}" == TRACE
    assert served.parent is not None
    assert f"{served.parent.span_id:016x}" == PARENT
    assert engine.headers[0]["traceparent"] == f"00-{TRACE}-{served.context.span_id:016x}-01"
    assert served.attributes is not None
    assert served.attributes["http.response.status_code"] == 200
    assert served.attributes["visiondrop.visual_tokens.kept"] == 160
    assert served.attributes["gen_ai.usage.output_tokens"] == 3
    assert served.status.is_unset
    assert failed.parent is None
    assert not failed.status.is_ok
    assert not failed.status.is_unset


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(make_tracing(Settings()), HandOn)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ValueError, match=r"visiondrop\[tracing\]"):
        make_tracing(Settings(tracing=True))


async def test_trace_context_reaches_the_engine(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    await client.post(CHAT, json=ask(), headers={"traceparent": parent, "tracestate": "a=1"})
    assert engine.headers[-1]["traceparent"] == parent
    assert engine.headers[-1]["tracestate"] == "a=1"
    await client.post(CHAT, json=ask(), headers={"traceparent": "nonsense", "tracestate": "a=1"})
    assert "traceparent" not in engine.headers[-1]
