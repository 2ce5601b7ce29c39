"""What vLLM's scheduler costs a decode step: four stages of KV blocks, with VisionDrop, against one group, with stock.

No engine runs: two schedulers take turns, on requests that hold one image each and decode, and the answers of the model
are made up. As on a GPU, a step is scheduled before the answer to the last one is there. Measured are

* `allocate_slots`: all calls of a step, and nothing else,
* `step`: the whole of `schedule` and `update_from_output`.

    python -m benchmarks.scheduler_cost [--requests 256] [--budget 320] [--rounds 12]

Prints a table, and one line of JSON last.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, Final

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from vd_plugin.demo import MODEL_PATH
from vd_plugin.kv_cache import StagedAttentionSpec
from vd_plugin.options import engine_args, read_geometry
from vd_plugin.schedule import parse_budget, resolve
from vd_plugin.scheduler import VisionDropScheduler
from vd_plugin.spans import identify

KINDS: Final = ("stock", "visiondrop")
BLOCK_SIZE: Final = 16
"""Tokens of a KV block on a GPU. After so many steps, every group of every request has begun a new block once."""
_IMAGE_SIZE = (448, 448)
_TOKEN = 7
"""What is generated."""


class Decoding:
    """A scheduler and its requests, which decode. All have the same lengths, whatever the kind."""

    def __init__(self, kind: str, num_requests: int, budget: int | str) -> None:
        options = {"max_model_len": 4096, "max_num_batched_tokens": 8192, "max_num_seqs": num_requests}
        model = str(MODEL_PATH)
        arguments = {"model": model, **options} if kind == "stock" else engine_args(model, **options)
        config = EngineArgs(**arguments).create_engine_config()
        config.cache_config.num_gpu_blocks = num_requests * 1024
        heads: dict[str, Any] = {"block_size": BLOCK_SIZE, "num_kv_heads": 1, "head_size": 64, "dtype": torch.float16}
        spec = FullAttentionSpec(**heads)
        specs = [spec] if kind == "stock" else [StagedAttentionSpec.of(spec, stage) for stage in range(4)]
        groups = [KVCacheGroupSpec([f"layer.{number}"], spec) for number, spec in enumerate(specs)]
        self.scheduler = (AsyncScheduler if kind == "stock" else VisionDropScheduler)(
            config,
            KVCacheConfig(config.cache_config.num_gpu_blocks, [], groups),
            StructuredOutputManager(config),
            BLOCK_SIZE,
        )
        self._in_flight: tuple[SchedulerOutput, list[list[int]]] | None = None
        init_none_hash(sha256)
        schedule = resolve(read_geometry(config.model_config.hf_config), *_IMAGE_SIZE, parse_budget(budget))
        for number in range(num_requests):
            self.scheduler.add_request(_request(number, schedule, pruned=kind != "stock"))
        while not all(request.num_output_tokens for request in self.scheduler.requests.values()):
            self.step()

    def step(self) -> None:
        """Schedule a step, then receive the answer to the last one."""
        scheduled = self.scheduler.schedule()
        requests = [self.scheduler.requests[name] for name in scheduled.num_scheduled_tokens]
        sampled = [[] if request.is_prefill_chunk else [_TOKEN] for request in requests]
        self.settle()
        self._in_flight = scheduled, sampled

    def settle(self) -> None:
        """Receive the answer to the last step."""
        if self._in_flight is None:
            return
        scheduled, sampled = self._in_flight
        names = list(scheduled.num_scheduled_tokens)
        numbers = {name: number for number, name in enumerate(names)}
        self.scheduler.update_from_output(scheduled, ModelRunnerOutput(names, numbers, sampled))
        self._in_flight = None

    def allocate(self) -> None:
        """What the step's loop over running requests asks the KV-cache manager for."""
        allocate_slots = self.scheduler.kv_cache_manager.allocate_slots
        for request in self.scheduler.running:
            assert allocate_slots(request, 1, num_lookahead_tokens=0) is not None

    def advance(self) -> None:
        """After `allocate`: the step has been computed."""
        for request in self.scheduler.running:
            request.num_computed_tokens += 1
            request.append_output_token_ids(_TOKEN)


def _request(number: int, schedule: Any, pruned: bool) -> Request:
    num_tokens = 40 + schedule.num_placeholders + number % (4 * BLOCK_SIZE)
    name = f"image-{number}"
    return Request(
        request_id=str(number),
        prompt_token_ids=[(number * 7 + position) % 1000 for position in range(num_tokens)],
        sampling_params=SamplingParams(max_tokens=3000, ignore_eos=True),
        pooling_params=None,
        mm_features=[
            MultiModalFeatureSpec(
                data=None,
                modality="image",
                identifier=identify(name, schedule) if pruned else name,
                mm_position=PlaceholderRange(offset=20, length=schedule.num_placeholders),
            )
        ],
        block_hasher=get_request_block_hasher(BLOCK_SIZE, sha256),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=256, help="requests that decode together (default 256)")
    parser.add_argument("--budget", type=int, default=320, help="budget of the second comparison (default 320)")
    parser.add_argument("--rounds", type=int, default=12, help=f"rounds of {BLOCK_SIZE} steps (default 12)")
    arguments = parser.parse_args()

    results = {
        str(budget): _compare(arguments.requests, budget, arguments.rounds) for budget in ("full", arguments.budget)
    }
    print(f"{arguments.requests} requests decoding, for each of {BLOCK_SIZE} steps the fastest of {arguments.rounds}")
    print(f"{'budget':>8} {'':14} {'stock':>10} {'VisionDrop':>11} {'ratio':>6}")
    for budget, parts in results.items():
        for part, seconds in parts.items():
            stock, ours = seconds["stock"] * 1e3, seconds["visiondrop"] * 1e3
            print(f"{budget:>8} {part:14} {stock:>7.2f} ms {ours:>8.2f} ms {ours / stock:>6.2f}")
    print(json.dumps({"benchmark": "scheduler_cost", "requests": arguments.requests, "seconds": results}))


def _compare(num_requests: int, budget: int | str, num_rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of each part of a step, by kind: the fastest of each of a round's steps, and their mean."""
    seconds = {part: {kind: [math.inf] * BLOCK_SIZE for kind in KINDS} for part in ("allocate_slots", "step")}
    decoding = {kind: Decoding(kind, num_requests, budget) for kind in KINDS}

    def measure(part: str, number: int, kind: str, run: Callable[[], None]) -> None:
        start = time.perf_counter()
        run()
        seconds[part][kind][number] = min(seconds[part][kind][number], time.perf_counter() - start)

    for _ in range(num_rounds):
        for number in range(BLOCK_SIZE):
            for kind, of_kind in decoding.items():
                measure("step", number, kind, of_kind.step)
        for of_kind in decoding.values():
            of_kind.settle()
        for number in range(BLOCK_SIZE):
            for kind, of_kind in decoding.items():
                measure("allocate_slots", number, kind, of_kind.allocate)
                of_kind.advance()
    return {part: {kind: statistics.mean(values) for kind, values in kinds.items()} for part, kinds in seconds.items()}


if __name__ == "__main__":
    main()
