"""Results of the parts of `make bench`, as if they had been measured."""

from __future__ import annotations

from typing import Any

from benchmarks.bench import flops
from benchmarks.bench.curve import POINTS


def prefill_result(*, over_limit: float = 1.0, over_stock: float = 1.0) -> dict[str, Any]:
    """Two rounds; the machine is twice as slow in the second."""
    seconds: dict[str, float] = {"stock": 10.0, "full": 10.0 * over_stock, "text stock": 1.0}
    seconds |= {"text visiondrop": over_stock, "encoder stock": 0.5}
    for budget, limit in (("640", 2.5), ("320", 1.8), ("160", 1.5)):
        seconds |= {budget: limit * over_limit, f"limit {budget}": limit}
        seconds |= {f"encoder {budget}": 0.5, f"limit encoder {budget}": 0.4, f"limit decoder {budget}": limit - 0.4}
    seconds |= {f"projector {name}": 0.1 for name in ("stock", "640", "320", "160")}
    seconds |= {f"pruning {name}": 0.0 for name in ("stock", "full")}
    seconds |= {f"pruning {budget}": 0.2 for budget in ("640", "320", "160")}
    seconds |= {f"prepare {name}": 0.03 for name in ("stock", "full", "640", "320", "160")}
    samples = {name: [value, 2 * value] for name, value in seconds.items()}
    limits = {"640": 700, "320": 380, "160": 220}
    return {
        "samples": samples,
        "kept": {"full": 2928, "640": 640, "320": 320, "160": 160},
        "limit_tokens": limits,
        "fraction": 8,
    }


def result_of(part: str) -> dict[str, Any]:
    if part == "flops":
        return flops.counts()
    if part == "prefill":
        return prefill_result()
    if part == "throughput":
        run = {"seconds": 8.0, "first_token_seconds": [1.0, 2.0], "peak_blocks": 40, "preemptions": 0}
        fast = {**run, "seconds": 1.6}
        return {
            "served": {"stock": [run, run], "full": [run, run], "320": [fast, fast]},
            "requests": 8,
            "blocks": {"stock": 50, "visiondrop": 203},
            "block_bytes": {"stock": 4 << 20, "visiondrop": 1 << 20},
        }
    if part == "decode":
        samples = {"seconds": [0.1, 0.2], "schedule": [100e-6] * 4, "prepare": [50e-6] * 4}
        return {"4 with an image": {"320": {"stock": samples, "ours": samples}}}
    if part == "curve":
        return {
            "points": [
                {"engine": point.kind, "budget": point.budget, "images": point.images, "requests": point.requests,
                 "kept": 100, "seconds": [1.0]}
                for point in POINTS
            ]
        }  # fmt: skip
    figures = {"completed": 24, "failed": 0, "request_throughput": 3.0, "p50_ttft_ms": 100.0, "p99_ttft_ms": 200.0}
    text = {"request": "text", "added_seconds": 0.002, "cpu_seconds": 0.002, "check_seconds": 0.0}
    image = {"request": "2 MB JPEG", "added_seconds": 0.0117, "cpu_seconds": 0.012, "check_seconds": 0.002}
    return {"gateway": [text, image], "measured": "added_seconds", "served": {"full": figures, "320": figures}}
