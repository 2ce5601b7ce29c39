"""Traces over OTLP. Optional. Without it, a request's W3C trace context still reaches the engine.

Where spans go, and how many, is said by OpenTelemetry's own variables (OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_SERVICE_NAME,
OTEL_TRACES_SAMPLER, ...). vLLM adds its spans to the same trace when it runs with `--otlp-traces-endpoint`.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol

from starlette.datastructures import Headers

from server.settings import Settings
from server.telemetry.record import RequestRecord
from server.telemetry.trace_context import trace_headers

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider


class Tracing(Protocol):
    """What the gateway needs of a tracer."""

    def span(self, record: RequestRecord, headers: Headers) -> AbstractContextManager[None]:
        """Around a request; sets the record's `trace_headers`, which go to the engine."""

    def close(self) -> None:
        """Send what is left."""


def make_tracing(settings: Settings) -> Tracing:
    """
    Raises:
        ValueError: traces are enabled, and the packages for them are missing.
    """
    if not settings.tracing:
        return HandOn()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise ValueError("tracing needs OpenTelemetry's packages: pip install 'visiondrop[tracing]'") from None
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return OtlpTracing(provider)


class HandOn:
    """No spans of our own: what the client sent goes to the engine as it came."""

    @contextmanager
    def span(self, record: RequestRecord, headers: Headers) -> Generator[None, None, None]:
        record.trace_headers = trace_headers(headers)
        yield

    def close(self) -> None:
        pass


class OtlpTracing:
    """One span a request, as child of the client's if it sent one."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("visiondrop")

    @contextmanager
    def span(self, record: RequestRecord, headers: Headers) -> Generator[None, None, None]:
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        propagator = TraceContextTextMapPropagator()
        parent = propagator.extract(trace_headers(headers))
        with self._tracer.start_as_current_span(f"POST {record.route}", parent, SpanKind.SERVER) as span:
            carrier: dict[str, str] = {}
            propagator.inject(carrier)
            record.trace_headers = carrier
            yield
            span.set_attributes(_attributes(record))
            if record.status >= 500:
                span.set_status(Status(StatusCode.ERROR, record.failure))

    def close(self) -> None:
        self._provider.shutdown()


def _attributes(record: RequestRecord) -> dict[str, str | int | float]:
    """In the words of OpenTelemetry's conventions for HTTP and generative AI, where they have one."""
    values: dict[str, str | int | float | None] = {
        "http.route": record.route,
        "http.response.status_code": record.status,
        "gen_ai.request.model": record.model,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.completion_tokens,
        "visiondrop.request_id": record.request_id,
        "visiondrop.images": len(record.schedules),
        "visiondrop.visual_tokens.full": record.full,
        "visiondrop.visual_tokens.kept": record.kept,
        "visiondrop.queue_seconds": record.queue_seconds,
        "visiondrop.first_token_seconds": record.first_token_seconds,
    }
    return {name: value for name, value in values.items() if value is not None}
