"""Real vLLM engines for tests: in this process, one alive at a time, started as fast as vLLM can.

`conftest.py` sets the environment that makes them live in this process, so that a test can look at their model.
Log-probabilities are those of the whole vocabulary: on tiny random models different inputs often give equal tokens.
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
import torch
from PIL import Image
from torch import Tensor
from vllm import LLM, SamplingParams
from vllm.model_executor.models import registry
from vllm.platforms.cpu import CpuPlatform

import vd_plugin

VOCABULARY = 512
"""Of every checkpoint here, recorded or built."""

NUM_TOKENS = 4
"""Of an answer, unless a test says otherwise; a decode step costs a tenth of a second under Triton's interpreter."""

FAST: dict[str, Any] = {
    "distributed_executor_backend": "uni",
    "dtype": "float32",
    "enforce_eager": True,
    "max_logprobs": VOCABULARY,
    "max_model_len": 4096,
    "max_num_batched_tokens": 4096,
    "max_num_seqs": 8,
    "skip_mm_profiling": True,
}

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
        """`function` of the engine's own model object, under the runner's inference mode."""

        def run(model: Any) -> Any:
            with torch.inference_mode():
                return function(model)

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
        asynchronous: prepare each step while the one before it runs, as vLLM does on a GPU; on a CPU it never would.
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
        _running = key, Engine(arguments)
    return _running[1]


@contextlib.contextmanager
def _scheduling(asynchronous: bool) -> Iterator[None]:
    """vLLM switches asynchronous scheduling off for the CPU as its last word on the configuration: take it back."""
    if not asynchronous:
        yield
        return

    def check(cls: type, config: Any) -> None:
        stock(config)
        config.scheduler_config.async_scheduling = True

    stock = CpuPlatform.check_and_update_config
    CpuPlatform.check_and_update_config = classmethod(check)
    try:
        yield
    finally:
        CpuPlatform.check_and_update_config = stock


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
