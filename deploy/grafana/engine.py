"""The dashboard of the engines: vLLM's own metrics.

Their names are those of vLLM 0.32 (vllm/v1/metrics). Each series also has vLLM's label `engine`: the data-parallel
rank.
"""

from __future__ import annotations

from typing import Final

from grafana_foundation_sdk.builders.dashboard import Dashboard

from deploy.grafana.frame import frame, with_row
from deploy.grafana.panels import NO_LIMIT, AnyPanel, Limits, Query, number, series
from deploy.grafana.queries import mean, quantile, rate, ratio, select, total

_KV: Final = "vllm:kv_cache_usage_perc"
_STEPS: Final = "vllm:iteration_tokens_total"
"""A histogram of the tokens in a step, in spite of its name."""
_BY: Final = "instance, engine"
_NAME: Final = "{{instance}} rank {{engine}}"


def engine() -> Dashboard:
    board = frame(
        "visiondrop-engine",
        "VisionDrop / Engine",
        "vLLM's own metrics: KV cache, load, caches, the time of a step.",
        _KV,
    )
    board = with_row(board, "Now", _now())
    board = with_row(board, "KV cache and load", _load())
    board = with_row(board, "Caches", _caches())
    return with_row(board, "Time", _time())


def _hit_share(cache: str, by: str = "") -> str:
    return ratio(rate(f"vllm:{cache}_cache_hits_total", by=by), rate(f"vllm:{cache}_cache_queries_total", by=by))


def _now() -> list[AnyPanel]:
    return [
        number(
            "KV cache in use",
            "The fullest engine's share of KV blocks in use.",
            "percentunit",
            f"max({select(_KV)})",
            limits=Limits(0.85, 0.97),
        ),
        number("Running", "Requests in the batch.", "short", total("vllm:num_requests_running"), limits=NO_LIMIT),
        number(
            "Waiting",
            "Requests that wait inside vLLM. Should stay near 0, because the gateway's queue comes before it: if not, "
            "MAX_INFLIGHT_TOKENS is too large.",
            "short",
            total("vllm:num_requests_waiting"),
            limits=Limits(4, 32),
        ),
        number(
            "Preemptions",
            "Requests a second that lost their KV blocks to others and are computed again.",
            "cps",
            rate("vllm:num_preemptions_total"),
            limits=Limits(0.01, 0.5),
        ),
        number(
            "Prompt tokens",
            "Tokens a second, after pruning at the encoder.",
            "cps",
            rate("vllm:prompt_tokens_total"),
            limits=NO_LIMIT,
        ),
        number(
            "Generated tokens",
            "Tokens a second.",
            "cps",
            rate("vllm:generation_tokens_total"),
            limits=NO_LIMIT,
        ),
    ]


def _load() -> list[AnyPanel]:
    return [
        series(
            "KV cache in use",
            "Share of KV blocks. Pruned images hold fewer of them in the deeper groups of layers.",
            "percentunit",
            Query(f"max by ({_BY}) ({select(_KV)})", _NAME),
            limits=Limits(0.85, 0.97),
            maximum=1,
        ),
        series(
            "Requests running and waiting",
            "Waiting inside vLLM, after the gateway's queue.",
            "short",
            Query(total("vllm:num_requests_running"), "running"),
            Query(total("vllm:num_requests_waiting"), "waiting"),
            limits=Limits(64, 256),
        ),
        series(
            "Preemptions",
            "Requests a second that lost their KV blocks to others and are computed again.",
            "cps",
            Query(rate("vllm:num_preemptions_total", by=_BY), _NAME),
            limits=Limits(0.01, 0.5),
        ),
        series(
            "Tokens",
            "Prompt tokens (after pruning at the encoder) and generated tokens a second.",
            "cps",
            Query(rate("vllm:prompt_tokens_total"), "prompt"),
            Query(rate("vllm:generation_tokens_total"), "generated"),
            limits=NO_LIMIT,
        ),
        series(
            "Requests finished by reason",
            "Requests a second: stop, length, abort (the client left), error.",
            "reqps",
            Query(rate("vllm:request_success_total", by="finished_reason"), "{{finished_reason}}"),
            limits=NO_LIMIT,
            stacked=True,
        ),
        series(
            "Waiting by reason",
            "Requests that wait inside vLLM: for room (capacity), or for something else (deferred).",
            "short",
            Query(total("vllm:num_requests_waiting_by_reason", by="reason"), "{{reason}}"),
            limits=Limits(4, 32),
            stacked=True,
        ),
    ]


def _caches() -> list[AnyPanel]:
    return [
        series(
            "Prefix cache hits",
            "Share of prompt tokens whose KV was found. With pruned images, hits end before the first pruned image.",
            "percentunit",
            Query(_hit_share("prefix", by=_BY), _NAME),
            limits=NO_LIMIT,
            maximum=1,
            width=12,
        ),
        series(
            "Multimodal cache hits",
            "Share of images whose preprocessing was found in vLLM's cache.",
            "percentunit",
            Query(_hit_share("mm", by=_BY), _NAME),
            limits=NO_LIMIT,
            maximum=1,
            width=12,
        ),
    ]


def _time() -> list[AnyPanel]:
    return [
        series(
            "Steps",
            "Steps of the model a second.",
            "ops",
            Query(rate(f"{_STEPS}_count", by=_BY), _NAME),
            limits=NO_LIMIT,
        ),
        series(
            "Tokens in a step",
            "Mean number of tokens that a step processes.",
            "short",
            Query(mean(_STEPS, by=_BY), _NAME),
            limits=NO_LIMIT,
        ),
        series(
            "Time of a decode step",
            "Between two tokens of a request: one step while it decodes, longer if prefills come between.",
            "s",
            *(Query(quantile(share, "vllm:inter_token_latency_seconds"), f"p{100 * share:g}") for share in (0.5, 0.95)),
            limits=Limits(0.05, 0.2),
        ),
        series(
            "Prefill",
            "Mean time from a request's first step to its first token; vLLM's buckets begin at 0.3 s, too coarse "
            "for quantiles.",
            "s",
            Query(mean("vllm:request_prefill_time_seconds", by=_BY), _NAME),
            limits=Limits(0.5, 2),
        ),
        series(
            "Queue inside vLLM",
            "Mean time from a request's arrival in the engine to its first step.",
            "s",
            Query(mean("vllm:request_queue_time_seconds", by=_BY), _NAME),
            limits=Limits(0.5, 5),
        ),
        series(
            "Time to first token in the engine",
            "Without the gateway's queue and image checks.",
            "s",
            *(Query(quantile(share, "vllm:time_to_first_token_seconds"), f"p{100 * share:g}") for share in (0.5, 0.95)),
            limits=Limits(1, 2.5),
        ),
    ]
