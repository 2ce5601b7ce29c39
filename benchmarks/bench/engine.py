"""An engine in a process of its own, which answers orders: prefill, decode, serve, encode.

The parent lets its engines take turns, so that all see the same machine. A child holds one `vllm.LLM` with the engine's
core in the same process, so that its scheduler and its model can be timed from outside; nothing of either is changed.
Every prompt is new (random tokens, an image that no request had before), so that no cache has it.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Final

from vd_plugin.schedule import Budget

ENVIRONMENT: Final = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # engines take turns on the same cores
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

IMAGE_SIZE: Final = (672, 672)
"""(height, width): five tiles, and LLaVA-NeXT's largest number of tokens, 2,928."""

_FIRST_TEXT_TOKEN: Final = 16
_LAST_TEXT_TOKEN: Final = 255
"""Of the tokenizer: no special token among them."""
_TEXT_BEFORE: Final = 8
"""Text tokens before the images, as a chat template has them."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: new images and random text."""

    text_tokens: int
    images: int = 0
    budget: Budget | None = None
    """None sends no budget, as a client of the stock engine does."""


@dataclass(frozen=True, slots=True)
class FirstToken:
    """Requests that were sent at once, until all have their first token."""

    seconds: float
    prepare_seconds: float
    """Of the images and the text, in the front end, before that."""
    pruning_seconds: float
    """Of `seconds`, between the decoder's layers. On a GPU that is the host's part alone."""


@dataclass(frozen=True, slots=True)
class HostCost:
    """Python on the host, seconds of one step."""

    schedule: float
    """Scheduler: `schedule` and `update_from_output`."""
    prepare: float
    """Model state: `prepare_attn` and `prepare_inputs`."""


@dataclass(frozen=True, slots=True)
class Decoded:
    seconds: tuple[float, ...]
    host: tuple[HostCost, ...]


@dataclass(frozen=True, slots=True)
class Served:
    """Requests at a fixed concurrency."""

    seconds: float
    first_token_seconds: tuple[float, ...]
    """From the moment that a client sends its request, waiting included."""
    peak_blocks: int
    preemptions: int


@dataclass(frozen=True, slots=True)
class Encoded:
    """Seconds of the encoder alone, for one image."""

    tower: float
    projector: float
    """Over as many rows as were asked for."""
    whole: float
    """The model's own `embed_multimodal`, at the budget."""


@dataclass(frozen=True, slots=True)
class Start:
    """How a child starts its engine."""

    arguments: Mapping[str, Any]
    """Of `vllm.LLM`."""
    kv_gib: int = 1
    """Of a CPU engine."""
    clock: str = "perf_counter"
    """Of the module `time`. "process_time" counts the child's own CPU time, whatever else the machine does."""


class EngineProcess:
    """The parent's end. Any method of `Engine` can be asked for."""

    def __init__(self, start: Start) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(child, start), daemon=True)
        self._process.start()
        child.close()
        self.num_blocks: int = self._receive()
        """Of the KV cache, the null block included."""

    def ask(self, order: str, *args: Any) -> Any:
        """The child's answer.

        Raises:
            RuntimeError: the child failed; the message is its traceback.
        """
        self._pipe.send((order, args))
        return self._receive()

    def stop(self) -> None:
        self._pipe.close()
        self._process.join(20)
        if self._process.is_alive():
            self._process.kill()

    def _receive(self) -> Any:
        try:
            is_good, answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"an engine's process ended with status {self._process.exitcode}") from None
        if not is_good:
            raise RuntimeError(answer)
        return answer


@contextmanager
def running(starts: Mapping[str, Start]) -> Iterator[dict[str, EngineProcess]]:
    """Engines by name, started one after the other and stopped at the end."""
    engines: dict[str, EngineProcess] = {}
    try:
        for name, start in starts.items():
            engines[name] = EngineProcess(start)
        yield engines
    finally:
        for engine in engines.values():
            engine.stop()


def _serve(pipe: Connection, start: Start) -> None:
    for name, value in {**ENVIRONMENT, "VLLM_CPU_KVCACHE_SPACE": str(start.kv_gib)}.items():
        os.environ.setdefault(name, value)
    try:
        engine = Engine(start)
        pipe.send((True, engine.pool.num_gpu_blocks))
        while True:
            order, args = pipe.recv()
            pipe.send((True, getattr(engine, order)(*args)))
    except EOFError:
        pass  # the parent has closed its end
    except Exception:  # which the parent raises
        pipe.send((False, traceback.format_exc()))


class Engine:
    """The child's end: orders by name."""

    def __init__(self, start: Start) -> None:
        from vllm import LLM

        self.clock: Callable[[], float] = getattr(time, start.clock)
        self.llm = LLM(**start.arguments)
        self.engine = self.llm.llm_engine
        core = self.engine.engine_core.engine_core
        self.scheduler = core.scheduler
        self.pool = self.scheduler.kv_cache_manager.block_pool
        runner = self.engine.model_executor.driver_worker.worker.model_runner
        self.image_token = self.engine.model_config.hf_config.image_token_index
        self.tasks = self.engine.get_supported_tasks()
        self.count = 0
        self.preemptions = 0
        self.peak_blocks = 0
        self.spent = dict.fromkeys(("schedule", "prepare", "prune"), 0.0)
        self._time(self.scheduler, "schedule", "schedule", self._watch)
        self._time(self.scheduler, "update_from_output", "schedule")
        self._time(runner.model_state, "prepare_attn", "prepare")
        self._time(runner.model_state, "prepare_inputs", "prepare")
        (model,) = self.llm.apply_model(lambda model: model)
        if hasattr(model, "decoder"):
            self._time(model.decoder, "_prune", "prune")

    def first_token(self, asked: Sequence[Asked]) -> FirstToken:
        """Send requests at once and step until each has its first token."""
        made = [self._make(one, num_tokens=1) for one in asked]
        self.spent["prune"] = 0.0
        began = self.clock()
        waiting = {self._send(request) for request, _ in made}
        while waiting:
            outputs = self.engine.step()
            assert not any(output.num_cached_tokens for output in outputs), "a prompt was found in the prefix cache"
            waiting -= {output.request_id for output in outputs if output.outputs[0].token_ids}
        seconds = self.clock() - began
        return FirstToken(seconds, sum(prepare for _, prepare in made), self.spent["prune"])

    def prefill(self, asked: Sequence[Asked]) -> None:
        """Requests that go on for ever, until each has its first token."""
        waiting = {self._send(self._make(one, num_tokens=1000)[0]) for one in asked}
        while waiting:
            waiting -= {output.request_id for output in self.engine.step() if output.outputs[0].token_ids}

    def decode(self, num_steps: int) -> Decoded:
        """Steps of what `prefill` has started."""
        seconds, host = [], []
        for _ in range(num_steps):
            self.spent = dict.fromkeys(self.spent, 0.0)
            began = self.clock()
            self.engine.step()
            seconds.append(self.clock() - began)
            host.append(HostCost(self.spent["schedule"], self.spent["prepare"]))
        return Decoded(tuple(seconds), tuple(host))

    def abort(self) -> None:
        """End all requests."""
        self.engine.abort_request(list(self.scheduler.requests), internal=True)
        while self.engine.has_unfinished_requests():
            self.engine.step()

    def serve(self, asked: Sequence[Asked], concurrency: int, num_tokens: int) -> Served:
        """Answer requests as clients would send them that wait for an answer before they send the next one."""
        made = [self._make(one, num_tokens)[0] for one in asked]
        made.reverse()
        self.peak_blocks = self.preemptions = 0
        sent: dict[str, float] = {}
        first: dict[str, float] = {}
        began = self.clock()
        while sent or made:
            while made and len(sent) < concurrency:
                now = self.clock()
                sent[self._send(made.pop())] = now
            for output in self.engine.step():
                name, now = output.request_id, self.clock()
                if output.outputs[0].token_ids and name not in first:
                    first[name] = now - sent[name]
                if output.finished:
                    del sent[name]
        seconds = self.clock() - began
        return Served(seconds, tuple(first.values()), self.peak_blocks, self.preemptions)

    def encode(self, num_tiles: int, rows: int, split: tuple[int, int] | None) -> Encoded:
        """The encoder alone on one image.

        Args:
            rows: that the projector maps.
            split: dominant and contextual tokens of a tile; None for the stock encoder.
        """
        import torch

        (model,) = self.llm.apply_model(lambda model: model)
        vision = self.engine.model_config.hf_config.vision_config
        parameter = next(model.vision_tower.parameters())
        pixels = parameter.new_zeros(num_tiles, 3, vision.image_size, vision.image_size).normal_()
        arguments: dict[str, Any] = {"pixel_values": [pixels], "image_sizes": torch.tensor([IMAGE_SIZE])}
        if split is not None:
            stages = model.geometry.layers_per_stage
            arguments["visual_token_schedule"] = torch.tensor([[split, *[(0, 0)] * (len(stages) - 1)]])
        features = parameter.new_zeros(rows, vision.hidden_size)
        with torch.inference_mode():
            return Encoded(
                tower=self._seconds(lambda: model._image_pixels_to_features(model.vision_tower, pixels)),
                projector=self._seconds(lambda: model.multi_modal_projector(features)),
                whole=self._seconds(lambda: model.embed_multimodal(**arguments)),
            )

    def _seconds(self, work: Callable[[], Any]) -> float:
        """Seconds of some work, finished on the device, too."""
        _wait()
        began = self.clock()
        work()
        _wait()
        return self.clock() - began

    def _make(self, asked: Asked, num_tokens: int) -> tuple[Any, float]:
        """A request as the engine's core takes it, and the seconds that the front end took to prepare it."""
        import numpy as np
        from PIL import Image
        from vllm import SamplingParams

        self.count += 1
        random = np.random.default_rng(self.count)
        text = random.integers(_FIRST_TEXT_TOKEN, _LAST_TEXT_TOKEN, asked.text_tokens).tolist()
        text[_TEXT_BEFORE:_TEXT_BEFORE] = [self.image_token] * asked.images
        prompt: dict[str, Any] = {"prompt_token_ids": text}
        if asked.images:
            height, width = IMAGE_SIZE
            prompt["multi_modal_data"] = {
                "image": [
                    Image.fromarray(random.integers(0, 256, (7, 7, 3), dtype=np.uint8)).resize((width, height))
                    for _ in range(asked.images)
                ]
            }
        if asked.budget is not None:
            prompt["mm_processor_kwargs"] = {"visual_token_budget": asked.budget}
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        began = self.clock()
        request = self.engine.input_processor.process_inputs(
            f"request-{self.count}", prompt, params, supported_tasks=self.tasks
        )
        return request, self.clock() - began

    def _send(self, request: Any) -> str:
        name = str(request.request_id)
        self.engine.add_request(name, request, request.params)
        return name

    def _watch(self, output: Any) -> None:
        """What a step of the scheduler leaves in use. The null block is never in use."""
        used = self.pool.num_gpu_blocks - 1 - self.pool.get_num_free_blocks()
        self.peak_blocks = max(self.peak_blocks, used)
        self.preemptions += len(output.preempted_req_ids or ())

    def _time(self, owner: Any, method: str, kind: str, watch: Callable[[Any], None] = lambda _: None) -> None:
        """Count the seconds of a method under `kind`."""
        stock = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = self.clock()
            result = stock(*args, **kwargs)
            self.spent[kind] += self.clock() - began
            watch(result)
            return result

        setattr(owner, method, timed)


def _wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
