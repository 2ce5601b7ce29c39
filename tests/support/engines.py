"""Real vLLM engines for tests: in this process, one alive at a time, started as fast as vLLM can.

`conftest.py` sets the environment that makes them live in this process, so that a test can look at their model.
Log-probabilities are those of the whole vocabulary: on tiny random models different inputs often give equal tokens.

The same tests run on a GPU and in other precisions, by the environment:

    VISIONDROP_TEST_DTYPE   float32 unless set. vLLM's FlashAttention takes bfloat16 and float16 alone, so on a GPU
                            float32 tests its Triton back end. Tests against the float32 reference are skipped.
    VISIONDROP_TEST_EAGER   1 unless set. With 0 the engine captures CUDA graphs, and compiles what it compiles by
                            default.

Two ways to compute one thing agree to the last digits only in float32 on a CPU. `within` says how far they may lie
apart elsewhere, and `IS_EXACT` whether tokens must be equal, too.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils._pytree import tree_map_only
from vllm import LLM, SamplingParams
from vllm.model_executor.models import registry
from vllm.platforms import current_platform

import vd_plugin

DTYPE = os.environ.get("VISIONDROP_TEST_DTYPE", "float32")
IS_EAGER = {"0": False, "1": True}[os.environ.get("VISIONDROP_TEST_EAGER", "1")]

IS_EXACT = DTYPE == "float32" and current_platform.is_cpu()
"""Elsewhere the shape of a batch selects the kernel, and with it how sums are rounded."""

SINGLE, HALF = 1e-3, 0.5
"""Bounds of differences of log-probabilities where they are not exact: float32 on a GPU, and 16 bits anywhere. In 16
bits other patches may be kept, too (test_half_precision.py)."""

float32_only = pytest.mark.skipif(DTYPE != "float32", reason="compares with a float32 reference")

VOCABULARY = 512
"""Of every checkpoint here, recorded or built."""

NUM_TOKENS = 4
"""Of an answer, unless a test says otherwise."""

FAST: dict[str, Any] = {
    "block_size": 128,
    "distributed_executor_backend": "uni",
    "dtype": DTYPE,
    "enforce_eager": IS_EAGER,
    "gpu_memory_utilization": 0.5,
    "kv_cache_memory_bytes": 2**30,
    "max_logprobs": VOCABULARY,
    "max_model_len": 4096,
    "max_num_batched_tokens": 4096,
    "max_num_seqs": 8,
    "skip_mm_profiling": True,
}
"""The sizes are what vLLM would take on a CPU, so that a GPU has the same blocks."""

# vLLM looks at a model class in a process of its own, so as not to wake a GPU in this one. On a new machine that costs
# ten seconds for each class.
registry._run_in_subprocess = lambda function: function()

_SET_NUM_THREADS = torch.set_num_threads


@dataclass(frozen=True)
class Answer:
    token_ids: list[int]
    logprobs: Tensor
    """(steps, V), the first from the prompt."""
    prompt_token_ids: list[int]
    num_cached_tokens: int
    """Prompt tokens that came out of the prefix cache."""

    def count(self, token_id: int) -> int:
        return self.prompt_token_ids.count(token_id)


def request(
    prompt: str, images: Sequence[Image.Image] = (), uuids: Sequence[str] | None = None, **mm_kwargs: Any
) -> dict[str, Any]:
    """A prompt as `vllm.LLM.generate` takes it; `mm_kwargs` are the request's `mm_processor_kwargs`."""
    made: dict[str, Any] = {"prompt": prompt}
    if images:
        made["multi_modal_data"] = {"image": list(images)}
    if uuids is not None:
        made["multi_modal_uuids"] = {"image": list(uuids)}
    if mm_kwargs:
        made["mm_processor_kwargs"] = mm_kwargs
    return made


class Engine:
    """A started `vllm.LLM`."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.llm = LLM(**arguments)

    def generate(self, *requests: dict[str, Any], num_tokens: int = NUM_TOKENS) -> list[Answer]:
        """Greedy answers to a batch, end-of-sequence disabled."""
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=VOCABULARY)
        return [_answer(output) for output in self.llm.generate(list(requests), params, use_tqdm=False)]

    def ask(self, *args: Any, num_tokens: int = NUM_TOKENS, **kwargs: Any) -> Answer:
        """One request alone, made of what `request` takes."""
        (answer,) = self.generate(request(*args, **kwargs), num_tokens=num_tokens)
        return answer

    def on_model(self, function: Callable[[Any], Any]) -> Any:
        """`function` of the engine's own model object, under the runner's inference mode; its tensors on the CPU."""

        def run(model: Any) -> Any:
            with torch.inference_mode():
                return tree_map_only(Tensor, Tensor.cpu, function(model))

        (result,) = self.llm.apply_model(run)
        return result

    def forget(self) -> None:
        """Make it cold: nothing remains in the processor's, the encoder's and the prefix cache."""
        self.llm.reset_mm_cache()
        self.llm.llm_engine.reset_encoder_cache()
        assert self.llm.reset_prefix_cache()

    def stop(self) -> None:
        """Also takes down vLLM's distributed state, without which no other engine starts in this process."""
        self.llm.llm_engine.renderer.shutdown()
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()
        torch.cuda.empty_cache()  # of what the next engine measures as taken
        os.environ.pop("VLLM_DIST_IDENT", None)  # set by the CPU worker, and unknown to the next engine
        torch.set_num_threads = _SET_NUM_THREADS  # which the CPU worker replaces by a refusal


def draw(width: int, height: int, seed: int = 0) -> Image.Image:
    """An image of soft colours: resizing it rounds little, and every tile differs from the others."""
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (7, 7, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


_running: tuple[str, Engine] | None = None


def start(model: str | Path, *, layers: Sequence[int] = (), asynchronous: bool = False, **overrides: Any) -> Engine:
    """An engine with the plugin, by default without decoder stages; the running one if it is the same.

    Args:
        asynchronous: prepare each step while the one before it runs; vLLM would always do so on a GPU, never on a CPU.
    """
    options = {**FAST, **overrides}
    arguments = vd_plugin.engine_args(str(model), visiondrop={"layers": list(layers)}, **options)
    return _start(arguments, asynchronous)


def start_stock(model: str | Path, **overrides: Any) -> Engine:
    """vLLM's own model class on the same checkpoint."""
    return _start({"model": str(model), **FAST, **overrides})


def stop() -> None:
    global _running
    if _running is not None:
        engine, _running = _running[1], None
        engine.stop()


def _start(arguments: dict[str, Any], asynchronous: bool = False) -> Engine:
    global _running
    key = repr((sorted(arguments.items()), asynchronous))
    if _running is not None and _running[0] == key:
        _running[1].forget()
        return _running[1]
    stop()
    with _scheduling(asynchronous):
        _running = key, Engine({**arguments, "async_scheduling": asynchronous})
    return _running[1]


@contextlib.contextmanager
def _scheduling(asynchronous: bool) -> Iterator[None]:
    """vLLM switches asynchronous scheduling off for the CPU as its last word on the configuration: take it back."""
    if not asynchronous or not current_platform.is_cpu():
        yield
        return

    def check(cls: type, config: Any) -> None:
        stock(config)
        config.scheduler_config.async_scheduling = True

    platform = type(current_platform)
    stock = platform.check_and_update_config
    platform.check_and_update_config = classmethod(check)
    try:
        yield
    finally:
        platform.check_and_update_config = stock


def within(bound: float) -> float:
    """How far log-probabilities may lie apart where they lie within `bound` when computed in float32 on a CPU."""
    if IS_EXACT:
        return bound
    return max(bound, SINGLE if DTYPE == "float32" else HALF)


def answers_of(output: Any) -> list[Answer]:
    """All `n` answers of a request."""
    answers = []
    for completion in output.outputs:
        rows = []
        for step in completion.logprobs:
            row = torch.full((VOCABULARY,), -torch.inf)
            row[list(step)] = torch.tensor([entry.logprob for entry in step.values()])
            rows.append(row)
        prompt, cached = list(output.prompt_token_ids), output.num_cached_tokens or 0
        answers.append(Answer(list(completion.token_ids), torch.stack(rows), prompt, cached))
    return answers


def _answer(output: Any) -> Answer:
    (answer,) = answers_of(output)
    return answer
