"""The dashboard of the gateway: traffic, errors, queue, saturation, keys."""

from __future__ import annotations

from typing import Final

from grafana_foundation_sdk.builders.dashboard import Dashboard

from deploy.grafana.frame import frame, with_row
from deploy.grafana.panels import NO_LIMIT, AnyPanel, Limits, Query, number, series, states
from deploy.grafana.queries import quantile, rate, ratio, select, total

_REQUESTS: Final = "visiondrop_requests_total"
_WORK: Final = 'route=~"/v1/(chat/completions|completions|responses|visual_tokens/count)|/tokenize|/detokenize"'
"""Without probes, metrics and unknown paths."""
_FAILED: Final = 'code=~"500|502"'
"""Failures of gateway or engine. A 503 is a rejection, and has panels of its own."""
_SATURATION: Final = Limits(0.8, 0.95)
_ALERTS: Final = 'sum by (alertname, severity) (ALERTS{alertname=~"VisionDrop.*", alertstate="firing"})'
_NUM_ALERTS: Final = 'count(ALERTS{alertname=~"VisionDrop.*", alertstate="firing"}) or vector(0)'
"""Alerts have the labels of what they are about, which need not be a job or an instance."""


def gateway() -> Dashboard:
    board = frame(
        "visiondrop-gateway",
        "VisionDrop / Gateway",
        "Requests, errors, the queue, and how near the gateway is to its limits.",
        _REQUESTS,
    )
    board = with_row(board, "Now", _now())
    board = with_row(board, "Traffic", _traffic())
    board = with_row(board, "Queue and saturation", _saturation())
    board = with_row(board, "Images", _images())
    return with_row(board, "API keys (with VISIONDROP_KEY_METRICS=true)", _keys())


def _now() -> list[AnyPanel]:
    return [
        number("Requests", "Requests a second that ask for work.", "reqps", rate(_REQUESTS, _WORK), limits=NO_LIMIT),
        number(
            "Failed share",
            "Requests that failed in gateway or engine (500, 502), of all.",
            "percentunit",
            ratio(rate(_REQUESTS, _WORK, _FAILED), rate(_REQUESTS, _WORK)),
            limits=Limits(0.005, 0.02),
        ),
        number(
            "Rejections",
            "Requests a second that were rejected: key, rate, queue, memory, shutdown or engine.",
            "reqps",
            rate("visiondrop_rejections_total"),
            limits=Limits(0.1, 1),
        ),
        number(
            "In the queue",
            "Requests that wait for an engine.",
            "short",
            total("visiondrop_queue_depth"),
            limits=Limits(32, 200),
        ),
        number(
            "Engines up",
            "Engines that answer and make progress, of all.",
            "percentunit",
            f"avg({select('visiondrop_engine_up')})",
            limits=Limits(1, 0.5, falling=True),
        ),
        number(
            "Alerts firing",
            "VisionDrop's alerts that fire now; what to do: docs/runbook.md.",
            "short",
            _NUM_ALERTS,
            limits=Limits(1, 1),
        ),
    ]


def _traffic() -> list[AnyPanel]:
    seconds, first, between = (
        f"visiondrop_{name}_seconds" for name in ("request", "time_to_first_token", "inter_token")
    )
    return [
        series(
            "Requests by status",
            "Requests a second by outcome. A stream that broke off counts with the status of its error; 499 is a "
            "client that left.",
            "reqps",
            Query(f"{rate(_REQUESTS, _WORK, by='code')} > 0", "{{code}}"),
            limits=NO_LIMIT,
            stacked=True,
        ),
        series(
            "Requests by route",
            "Requests a second.",
            "reqps",
            Query(f"{rate(_REQUESTS, _WORK, by='route')} > 0", "{{route}}"),
            limits=NO_LIMIT,
            stacked=True,
        ),
        series(
            "Failed and refused share",
            "Failed: 500 and 502. Refused: the client's fault (4xx, without 429 and 499).",
            "percentunit",
            Query(ratio(rate(_REQUESTS, _WORK, _FAILED), rate(_REQUESTS, _WORK)), "failed"),
            Query(
                ratio(rate(_REQUESTS, _WORK, 'code=~"4..", code!~"429|499"'), rate(_REQUESTS, _WORK)),
                "refused",
            ),
            limits=Limits(0.005, 0.02),
        ),
        series(
            "Time to first token",
            "Of streams, from arrival.",
            "s",
            *(Query(quantile(share, first), f"p{100 * share:g}") for share in (0.5, 0.95, 0.99)),
            limits=Limits(1, 2.5),
        ),
        series(
            "Whole request",
            "From arrival to the answer's last byte.",
            "s",
            *(Query(quantile(share, seconds), f"p{100 * share:g}") for share in (0.5, 0.95, 0.99)),
            limits=Limits(30, 120),
        ),
        series(
            "Between two parts of a stream",
            "The time that a reader waits for the next word.",
            "s",
            *(Query(quantile(share, between), f"p{100 * share:g}") for share in (0.5, 0.95)),
            limits=Limits(0.1, 0.5),
        ),
    ]


def _saturation() -> list[AnyPanel]:
    return [
        series(
            "Queue",
            "Requests that wait for an engine, and how many may.",
            "short",
            Query(total("visiondrop_queue_depth"), "waiting"),
            Query(total("visiondrop_queue_limit"), "limit"),
            limits=Limits(128, 230),
        ),
        series(
            "Time in the queue",
            "Of requests that were admitted.",
            "s",
            *(Query(quantile(share, "visiondrop_queue_seconds"), f"p{100 * share:g}") for share in (0.5, 0.95)),
            limits=Limits(1, 10),
        ),
        series(
            "Rejections by reason",
            "Requests a second. queue_full and queue_timeout: more load than the engines carry. memory_full: "
            "MAX_BUFFERED_BYTES. invalid_api_key: somebody guesses, or a key was removed.",
            "reqps",
            Query(f"{rate('visiondrop_rejections_total', by='reason')} > 0", "{{reason}}"),
            limits=Limits(0.1, 1),
            stacked=True,
        ),
        series(
            "Saturation",
            "Used share of each limit: 1 is full. Tokens: MAX_INFLIGHT_TOKENS of the engines that are up. Memory: "
            "MAX_BUFFERED_BYTES. Queue: MAX_QUEUED_REQUESTS.",
            "percentunit",
            *(
                Query(ratio(total(f"visiondrop_{used}"), total(f"visiondrop_{limit}")), name)
                for used, limit, name in (
                    ("inflight_tokens", "inflight_tokens_limit", "tokens"),
                    ("buffered_bytes", "buffered_bytes_limit", "memory"),
                    ("queue_depth", "queue_limit", "queue"),
                )
            ),
            limits=_SATURATION,
            maximum=1,
        ),
        series(
            "Tokens in the engines",
            "Cost (text and kept visual tokens) of the requests that each engine works on.",
            "short",
            Query(total("visiondrop_engine_inflight_tokens", by="instance, engine"), "{{instance}} engine {{engine}}"),
            Query(total("visiondrop_inflight_tokens_limit"), "limit of all"),
            limits=NO_LIMIT,
        ),
        series(
            "Requests in the gateway",
            "Requests being received, waiting, or being answered.",
            "short",
            Query(total("visiondrop_inflight_requests"), "requests"),
            limits=Limits(1000, 4000),
        ),
        states(
            "Engines",
            "Whether each engine answers and makes progress.",
            Query(f"min by (instance, engine) ({select('visiondrop_engine_up')})", "{{instance}} engine {{engine}}"),
        ),
        series(
            "Alerts firing",
            "By name and severity; what to do: docs/runbook.md.",
            "short",
            Query(_ALERTS, "{{alertname}} ({{severity}})"),
            limits=Limits(1, 1),
            stacked=True,
        ),
        states(
            "Version",
            "The versions of the gateway and of the budget rule that run.",
            Query(
                f"max by (version, rule_version) ({select('visiondrop_build_info')})",
                "{{version}}, budget rule {{rule_version}}",
            ),
        ),
    ]


def _images() -> list[AnyPanel]:
    fetch, decode = (f"visiondrop_image_{name}_seconds" for name in ("fetch", "decode"))
    return [
        series(
            "Fetching an image",
            "Time to fetch an image from its URL, redirects included.",
            "s",
            *(Query(quantile(share, fetch), f"p{100 * share:g}") for share in (0.5, 0.95)),
            limits=Limits(2, 8),
            width=12,
        ),
        series(
            "Decoding an image",
            "Time to check and normalise an image, waiting for a thread included. Long waits: raise IMAGE_THREADS.",
            "s",
            *(Query(quantile(share, decode), f"p{100 * share:g}") for share in (0.5, 0.95)),
            limits=Limits(0.25, 1),
            width=12,
        ),
    ]


def _keys() -> list[AnyPanel]:
    return [
        series(
            "Requests by key",
            "Requests a second.",
            "reqps",
            Query(rate("visiondrop_key_requests_total", by="key"), "{{key}}"),
            limits=NO_LIMIT,
            stacked=True,
        ),
        series(
            "Requests rejected by key",
            "Requests a second that met a rate (429) or an overload (503).",
            "reqps",
            Query(rate("visiondrop_key_requests_total", 'code=~"429|503"', by="key, code"), "{{key}} {{code}}"),
            limits=Limits(0.1, 1),
        ),
        series(
            "Tokens by key",
            "Tokens a second: prompt (with kept visual tokens), completion, and visual tokens saved.",
            "cps",
            Query(rate("visiondrop_key_tokens_total", 'kind!="visual_kept"', by="key, kind"), "{{key}} {{kind}}"),
            limits=NO_LIMIT,
        ),
    ]
