"""A plan of an engine that does not exist yet: how many images and tokens it will hold, from the configuration alone.

1. memory: what vLLM may use, less the weights (exact) and a reserve (assumed), is the KV cache
2. its blocks, divided over the decoder's stages as vLLM does it (`kv_capacity.py`)
3. what an image takes of them at each preset, and what its prefill costs (`schedule.py`)
4. the settings: `max_num_seqs` of the engine and `MAX_INFLIGHT_TOKENS` of the gateway, under which all that the gateway
   admits fits the KV cache, at any mix of budgets (`kv_capacity.max_cost`)

Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from vd_plugin.kv_capacity import (
    KVCapacity,
    block_bytes,
    describe_capacity,
    image_blocks,
    largest_image,
    max_cost,
    preset_names,
    request_blocks,
    rows_per_cost,
)
from vd_plugin.options import read_geometry
from vd_plugin.schedule import FULL, Budget, Geometry, parse_budget, prefill_flops, resolve
from vd_plugin.validation import check_model
from vd_plugin.weights import count_weights, loaded_tower_layers

GIB: Final = 2**30

ELEMENT_BYTES: Final = {"float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2}
"""vLLM's names of what it computes with."""

GPU_MEMORY_UTILIZATION: Final = 0.92
"""vLLM's default (`CacheConfig.gpu_memory_utilization`)."""
BLOCK_SIZE: Final = 16
"""vLLM's default on CUDA (`CacheConfig.DEFAULT_BLOCK_SIZE`); its CPU back end takes 128."""
RESERVE_GIB: Final = 4.0
"""For what only a GPU can tell: activations of the largest step, CUDA graphs, CUDA itself. An assumption."""
MAX_NUM_SEQS: Final = 1024
"""The largest of vLLM's defaults (`EngineArgs.get_batch_defaults`): a plan of its own never exceeds it."""


@dataclass(frozen=True, slots=True)
class Request:
    """What to plan for."""

    image: tuple[int, int] | None
    """(height, width); None for the largest."""
    text_tokens: int
    """Beside the image, the chat template included."""
    answer_tokens: int
    budget: Budget
    """Of most images: it decides the number of sequences, where none is given."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one GPU. `total`, `usable` and `reserve` are None where the size of the KV cache is given."""

    total: int | None
    usable: int | None
    weights: int
    reserve: int | None
    kv_cache: int


@dataclass(frozen=True, slots=True)
class ImagePlan:
    """The image at one budget."""

    budget: str
    rows: tuple[int, ...]
    kv_blocks: int
    kv_bytes: int
    """On each GPU."""
    images_at_once: int
    prefill_flops: int
    """Of the image and the text, on all GPUs together."""


@dataclass(frozen=True, slots=True)
class Plan:
    geometry: Geometry
    dtype: str
    tensor_parallel_size: int
    tower_layers: tuple[int, int]
    """Loaded, and in the checkpoint."""
    memory: Memory
    capacity: KVCapacity
    block_size: int
    block_bytes: int
    max_model_len: int
    max_concurrency: float
    """Requests of `max_model_len` text tokens that fit, as vLLM counts them."""
    image_size: tuple[int, int]
    """(height, width)."""
    images: tuple[ImagePlan, ...]
    """The most expensive preset first."""
    text_tokens: int
    answer_tokens: int
    max_num_seqs: int
    max_inflight_tokens: int
    problems: tuple[str, ...]
    """Why the plan does not work, each with the setting to change."""

    @property
    def kv_cache_tokens(self) -> int:
        """vLLM's "KV cache size" in tokens of text."""
        return int(self.max_concurrency * self.max_model_len)

    @property
    def log_line(self) -> str | None:
        """What the engine logs of its KV cache at start-up; nothing where the decoder does not prune."""
        return describe_capacity(self.geometry, self.capacity) if self.geometry.boundaries else None

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self)
        data["capacity"]["usable_blocks"] = self.capacity.usable_blocks
        data["kv_cache_tokens"] = self.kv_cache_tokens
        data["log"] = self.log_line
        return data


def make_plan(
    config: Any,
    request: Request,
    *,
    gpu_memory_gib: float | None = None,
    gpu_memory_utilization: float = GPU_MEMORY_UTILIZATION,
    reserve_gib: float = RESERVE_GIB,
    kv_memory_gib: float | None = None,
    tensor_parallel_size: int = 1,
    dtype: str = "auto",
    block_size: int = BLOCK_SIZE,
    max_model_len: int | None = None,
    max_num_seqs: int | None = None,
) -> Plan:
    """Plan an engine.

    Args:
        config: as `model_config.complete` makes it.
        kv_memory_gib: of each GPU; without it, `gpu_memory_gib` less weights and reserve.

    Raises:
        ValueError: a setting that no engine could have.
        NotImplementedError: a checkpoint that the plugin refuses.
    """
    check_model(config)
    if config.text_config.sliding_window is not None:
        raise NotImplementedError("VisionDrop prunes inside decoders of full attention only; this one has a window")
    if config.quantization_config and kv_memory_gib is None:
        raise ValueError("the weights of a quantized checkpoint are not computed: give the KV cache with --kv-memory")
    geometry = read_geometry(config)
    dtype = _resolve_dtype(dtype, config.dtype)
    element_bytes = ELEMENT_BYTES[dtype]
    weights = count_weights(config, tensor_parallel_size).total * element_bytes
    if kv_memory_gib is not None:
        memory = Memory(None, None, weights, None, int(kv_memory_gib * GIB))
    else:
        assert gpu_memory_gib is not None
        total, reserve = int(gpu_memory_gib * GIB), int(reserve_gib * GIB)
        usable = math.ceil(total * gpu_memory_utilization)
        memory = Memory(total, usable, weights, reserve, usable - weights - reserve)
    capacity = KVCapacity.of_memory(geometry, memory.kv_cache, block_size, element_bytes, tensor_parallel_size)
    size = request.image or largest_image(geometry)
    max_model_len = max_model_len or config.max_model_len
    if max_model_len > config.max_model_len:
        raise ValueError(f"vLLM refuses --max-model-len {max_model_len}: this model's own is {config.max_model_len}")
    seqs = max_num_seqs or _count_seqs(geometry, capacity, size, request)
    inflight = max(max_cost(capacity, geometry.layers_per_stage, seqs, request.answer_tokens), 0)
    plan = Plan(
        geometry=geometry,
        dtype=dtype,
        tensor_parallel_size=tensor_parallel_size,
        tower_layers=(loaded_tower_layers(config), config.vision_config.num_hidden_layers),
        memory=memory,
        capacity=capacity,
        block_size=block_size,
        block_bytes=block_bytes(geometry, block_size, element_bytes, tensor_parallel_size),
        max_model_len=max_model_len,
        max_concurrency=capacity.num_blocks / request_blocks(max_model_len, (), capacity.groups),
        image_size=size,
        images=(),
        text_tokens=request.text_tokens,
        answer_tokens=request.answer_tokens,
        max_num_seqs=seqs,
        max_inflight_tokens=inflight,
        problems=(),
    )
    return replace(plan, images=tuple(_plan_images(plan)), problems=tuple(_problems(plan, config.max_model_len)))


def _resolve_dtype(dtype: str, of_config: str | None) -> str:
    """As vLLM: what the configuration says, but float32 only where it is asked for."""
    if dtype != "auto":
        return dtype
    return of_config if of_config in ("float16", "bfloat16") else "bfloat16"


def _count_seqs(geometry: Geometry, capacity: KVCapacity, size: tuple[int, int], request: Request) -> int:
    """Requests of one image at the planned budget, with its text and its answer, that fit under `max_cost`."""
    (block_size,) = {size for _, size in capacity.groups}
    cost = resolve(geometry, *size, request.budget).kept + request.text_tokens
    rows = cost * rows_per_cost(geometry.layers_per_stage, capacity.groups)
    rows += len(capacity.groups) * (request.answer_tokens + block_size - 1)
    return min(max(int(capacity.usable_blocks * block_size // rows), 1), MAX_NUM_SEQS)


def _plan_images(plan: Plan) -> Iterator[ImagePlan]:
    for name in preset_names():
        schedule = resolve(plan.geometry, *plan.image_size, parse_budget(name))
        blocks = image_blocks(schedule, plan.capacity.groups)
        yield ImagePlan(
            budget=name,
            rows=schedule.rows,
            kv_blocks=blocks,
            kv_bytes=blocks * plan.block_bytes,
            images_at_once=plan.capacity.num_images(schedule),
            prefill_flops=prefill_flops(plan.geometry, plan.text_tokens, [schedule]),
        )


def _problems(plan: Plan, longest_of_model: int) -> Iterator[str]:
    memory, capacity = plan.memory, plan.capacity
    more = "give each GPU more memory, or raise --tensor-parallel-size"
    if not capacity.usable_blocks:
        taken = "" if memory.reserve is None else (
            f": weights of {memory.weights / GIB:.2f} GiB and a reserve of {memory.reserve / GIB:.2f} GiB leave "
            f"{memory.kv_cache / GIB:.2f} of {(memory.usable or 0) / GIB:.2f} GiB"
        )  # fmt: skip
        yield f"no memory is left for a KV cache{taken}; {more}"
        return
    full = resolve(plan.geometry, *plan.image_size, FULL)
    needed = full.num_placeholders + plan.text_tokens + plan.answer_tokens
    longest = capacity.text_tokens
    what = f"the image in full with text and answer, {needed:,} tokens,"
    if needed > longest:
        yield f"{what} is longer than the {longest:,} tokens that the KV cache holds; {more}"
    elif needed > plan.max_model_len:
        can = f"raise --max-model-len to {needed}" if needed <= longest_of_model else "plan for shorter answers"
        yield f"{what} is longer than the engine's {plan.max_model_len:,}; {can}, or set VISIONDROP_MAX_BUDGET"
    if plan.max_model_len > longest:
        yield (
            f"a request of {plan.max_model_len:,} tokens does not fit the KV cache, so the engine would not start; "
            f"set --max-model-len to {longest} or less"
        )
    elif plan.max_inflight_tokens < 1:
        yield (
            f"{plan.max_num_seqs:,} answers of {plan.answer_tokens:,} tokens fill the KV cache; "
            "lower --max-num-seqs or --answer-tokens"
        )
