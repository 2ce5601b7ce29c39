"""Prometheus metrics. Every label has a fixed set of values, and every series exists from the start."""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest

from server.budget import CLASSES, budget_class, effective_budget
from server.record import RequestRecord
from server.version import package_version
from vd_plugin.schedule import RULE_VERSION

CHAT_ROUTE: Final = "/v1/chat/completions"
OTHER_ROUTE: Final = "other"

# From a cached answer of a tiny model to a long answer on a busy machine.
_SECONDS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_CHAT_CODES: Final = ("200", "400", "404", "413", "499", "500", "502", "503")
_IMAGE_CLASSES: Final = tuple(name for name in CLASSES if name != "none")


class Metrics:
    """The gateway's metrics on a registry of their own; one instance an app."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        build = Info("visiondrop_build", "What is running.", registry=self.registry)
        build.info({"version": package_version(), "rule_version": str(RULE_VERSION)})
        self._requests = self._counter("requests", "Requests by outcome.", "route", "code", "budget_class")
        self._images = self._counter("images", "Pictures that the engine took.", "budget_class")
        self._full = self._counter("visual_tokens_full", "Visual tokens of the stock model.", "budget_class")
        self._kept = self._counter("visual_tokens_kept", "Visual tokens a decoder layer held.", "budget_class")
        self._saved = self._counter("visual_tokens_saved", "Visual tokens saved: full - kept.", "budget_class")
        self._flops_saved = self._counter("prefill_flops_saved", "Prefill FLOPs saved in the decoder's layers.")
        self._mismatches = self._counter(
            "schedule_mismatch", "Requests whose prompt did not hold as many visual tokens as planned."
        )
        self._seconds = self._histogram("request_seconds", "Time from a chat request's arrival to its last byte.")
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "Time from a streaming request's arrival to its first token."
        )
        self.inflight = Gauge("visiondrop_inflight_requests", "Chat requests being served.", registry=self.registry)
        self.engine_up = Gauge("visiondrop_engine_up", "1 if the engine answers.", registry=self.registry)
        self._make_series()

    def observe(self, record: RequestRecord) -> None:
        """Count a request that has ended."""
        self._requests.labels(record.route, str(record.status), record.budget_class).inc()
        if record.route != CHAT_ROUTE:
            return
        if record.total_seconds is not None:
            self._seconds.observe(record.total_seconds)
        if record.first_token_seconds is not None:
            self._first_token.observe(record.first_token_seconds)
        if record.engine_answered:
            for schedule in record.schedules:
                label = budget_class(effective_budget(schedule))
                self._images.labels(label).inc()
                self._full.labels(label).inc(schedule.full)
                self._kept.labels(label).inc(schedule.kept)
                self._saved.labels(label).inc(schedule.saved)
            self._flops_saved.inc(record.prefill_flops_saved)
        if record.is_mismatch:
            self._mismatches.inc()

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"visiondrop_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"visiondrop_{name}", text, buckets=_SECONDS, registry=self.registry)

    def _make_series(self) -> None:
        for code in _CHAT_CODES:
            for label in CLASSES:
                self._requests.labels(CHAT_ROUTE, code, label)
        for counter in (self._images, self._full, self._kept, self._saved):
            for label in _IMAGE_CLASSES:
                counter.labels(label)
