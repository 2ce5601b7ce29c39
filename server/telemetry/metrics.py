"""Prometheus metrics. Every label has a fixed set of values, and every series exists from the start."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from server import paths
from server.budget import CLASSES, budget_class
from server.errors import REJECTION_REASONS, STATUSES
from server.telemetry.record import RequestRecord
from server.version import package_version
from vd_plugin.schedule import RULE_VERSION

# From a cached answer of a tiny model to a long answer on a busy machine.
_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_CODES: Final = ("200", *map(str, STATUSES))
_FIRST_TOKEN_SECONDS: Final = (
    *(0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1, 1.5, 2.5, 5, 10, 30, 60, 120, 300),
)
"""Finer: what a smaller budget gains is a few dozen milliseconds, and must be seen."""
_TOKEN_KINDS: Final = ("prompt", "completion", "visual_kept", "visual_saved")
_IMAGE_CLASSES: Final = tuple(name for name in CLASSES if name != "none")


class Metrics:
    """The gateway's metrics on a registry of their own; one instance an app.

    Args:
        key_names: the names of the API keys if each is to have series of its own.
    """

    def __init__(self, key_names: Iterable[str] = ()) -> None:
        self.registry = CollectorRegistry()
        disable_created_metrics()  # Prometheus makes nothing of them, and they double the number of series
        build = Info("visiondrop_build", "What is running.", registry=self.registry)
        build.info({"version": package_version(), "rule_version": str(RULE_VERSION)})
        self._requests = self._counter("requests", "Requests by outcome.", "route", "code", "budget_class")
        self._rejections = self._counter("rejections", "Requests rejected, by reason.", "reason")
        self._images = self._counter("images", "Images that an engine took.", "budget_class")
        self._full = self._counter("visual_tokens_full", "Visual tokens of the stock model.", "budget_class")
        self._kept = self._counter("visual_tokens_kept", "Visual tokens a decoder layer held.", "budget_class")
        self._saved = self._counter("visual_tokens_saved", "Visual tokens saved: full - kept.", "budget_class")
        self._flops_saved = self._counter("prefill_flops_saved", "Prefill FLOPs saved in the decoder's layers.")
        self._mismatches = self._counter(
            "schedule_mismatch", "Requests whose prompt did not hold as many visual tokens as planned."
        )
        self._seconds = self._histogram(
            "request_seconds", "Time from a request's arrival to its answer's last byte.", "budget_class"
        )
        self._first_token = self._histogram(
            "time_to_first_token_seconds",
            "Time from a streaming request's arrival to its first token.",
            "budget_class",
            buckets=_FIRST_TOKEN_SECONDS,
        )
        self._inter_token = self._histogram("inter_token_seconds", "Time between two parts of a streamed answer.")
        self._fetch = self._histogram("image_fetch_seconds", "Time to fetch an image from its URL.")
        self._decode = self._histogram(
            "image_decode_seconds", "Time to check and normalise an image, waiting for a thread included."
        )
        self._queue = self._histogram("queue_seconds", "Time in the queue before an engine.")
        self.inflight = self._gauge("inflight_requests", "Requests being served.")
        self._queue_depth = self._gauge("queue_depth", "Requests in the queue.")
        self._queue_limit = self._gauge("queue_limit", "Requests that the queue takes.")
        self._inflight_tokens = self._gauge("inflight_tokens", "Cost of the requests that the engines work on.")
        self._inflight_limit = self._gauge(
            "inflight_tokens_limit", "Cost that the engines which are up may work on at a time."
        )
        self._buffered = self._gauge("buffered_bytes", "Request data held in memory.")
        self._buffered_limit = self._gauge("buffered_bytes_limit", "Request data that may be held in memory.")
        self._engine_up = self._gauge("engine_up", "1 if the engine answers and makes progress.", "engine")
        self._engine_tokens = self._gauge(
            "engine_inflight_tokens", "Cost of the requests that this engine works on.", "engine"
        )
        self._keys = frozenset(key_names)
        if self._keys:
            self._key_requests = self._counter("key_requests", "Requests of a key, by outcome.", "key", "code")
            self._key_tokens = self._counter("key_tokens", "Tokens of a key, by kind.", "key", "kind")
            self._key_rejections = self._counter("key_rejections", "Requests of a key rejected.", "key", "reason")
            self._key_queue = self._histogram("key_queue_seconds", "Time of a key's requests in the queue.", "key")
        self._make_series()

    def watch_queue(self, depth: Callable[[], int], limit: int) -> None:
        """Read the queue's depth from here whenever metrics are requested."""
        self._queue_depth.set_function(depth)
        self._queue_limit.set(limit)

    def watch_inflight(self, tokens: Callable[[], int], limit: Callable[[], int]) -> None:
        """Likewise, the cost of what is being worked on, and how much that may be."""
        self._inflight_tokens.set_function(tokens)
        self._inflight_limit.set_function(limit)

    def watch_memory(self, num_bytes: Callable[[], int], limit: int) -> None:
        """Likewise, the request data in memory."""
        self._buffered.set_function(num_bytes)
        self._buffered_limit.set(limit)

    def watch_log(self, num_dropped_lines: Callable[[], int]) -> None:
        """Likewise, the lines of the log that nobody read."""
        self.registry.register(_DroppedLines(num_dropped_lines))

    def watch_engine(self, name: str, is_up: Callable[[], bool], tokens: Callable[[], int]) -> None:
        """Likewise, one engine's state and load."""
        self._engine_up.labels(name).set_function(is_up)
        self._engine_tokens.labels(name).set_function(tokens)

    def observe(self, record: RequestRecord, *, is_work: bool) -> None:
        """Count a request that has ended."""
        self._requests.labels(record.route, str(record.status), record.budget_class).inc()
        # A scrape of an engine that is down, or a probe while none is up, turns no client away.
        if record.rejection is not None and (is_work or record.status in (401, 403, 429)):
            self._rejections.labels(record.rejection).inc()
        if not is_work:
            return
        if record.total_seconds is not None:
            self._seconds.labels(record.budget_class).observe(record.total_seconds)
        if record.first_token_seconds is not None:
            self._first_token.labels(record.budget_class).observe(record.first_token_seconds)
        if record.queue_seconds is not None:
            self._queue.observe(record.queue_seconds)
        for histogram, times in (
            (self._inter_token, record.inter_token_seconds),
            (self._fetch, record.image_fetch_seconds),
            (self._decode, record.image_decode_seconds),
        ):
            for seconds in times:
                histogram.observe(seconds)
        if record.engine_answered:
            for schedule in record.schedules:
                label = budget_class(schedule.effective_budget)
                self._images.labels(label).inc()
                self._full.labels(label).inc(schedule.full)
                self._kept.labels(label).inc(schedule.kept)
                self._saved.labels(label).inc(schedule.saved)
            self._flops_saved.inc(record.prefill_flops_saved)
        if record.is_mismatch:
            self._mismatches.inc()
        if record.key_name in self._keys:
            self._observe_key(record.key_name, record)

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)

    def _observe_key(self, key: str, record: RequestRecord) -> None:
        self._key_requests.labels(key, str(record.status)).inc()
        if record.rejection is not None:
            self._key_rejections.labels(key, record.rejection).inc()
        if record.queue_seconds is not None:
            self._key_queue.labels(key).observe(record.queue_seconds)
        if record.engine_answered:
            self._key_tokens.labels(key, "visual_kept").inc(record.kept)
            self._key_tokens.labels(key, "visual_saved").inc(record.saved)
        self._key_tokens.labels(key, "prompt").inc(record.prompt_tokens or 0)
        self._key_tokens.labels(key, "completion").inc(record.completion_tokens or 0)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"visiondrop_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"visiondrop_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, *labels: str, buckets: Sequence[float] = _SECONDS) -> Histogram:
        return Histogram(f"visiondrop_{name}", text, labels, buckets=buckets, registry=self.registry)

    def _make_series(self) -> None:
        for route in paths.WORK:
            for code in _CODES:
                for label in CLASSES if route in paths.IMAGES else ("none",):
                    self._requests.labels(route, code, label)
        for reason in REJECTION_REASONS:
            self._rejections.labels(reason)
        for counter in (self._images, self._full, self._kept, self._saved):
            for label in _IMAGE_CLASSES:
                counter.labels(label)
        for histogram in (self._seconds, self._first_token):
            for label in CLASSES:
                histogram.labels(label)
        for key in self._keys:
            self._key_requests.labels(key, "200")
            self._key_queue.labels(key)
            for reason in REJECTION_REASONS:
                self._key_rejections.labels(key, reason)
            for kind in _TOKEN_KINDS:
                self._key_tokens.labels(key, kind)


class _DroppedLines(Collector):
    def __init__(self, count: Callable[[], int]) -> None:
        self._count = count

    def collect(self) -> Iterable[CounterMetricFamily]:
        yield CounterMetricFamily(
            "visiondrop_log_lines_dropped", "Lines of the log dropped because nobody read them.", value=self._count()
        )
