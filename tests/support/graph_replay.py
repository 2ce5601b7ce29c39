"""CUDA graphs without a GPU: decode steps as a full graph would run them.

vLLM's own graph manager decides which steps are replayed, pads them, prepares the inputs of each capture and keeps the
output. Only the graph is ours: a replay runs the model again with the very objects of capture time, inputs, layout of
the stages, attention metadata and slots. What a step computes anew and a graph would never see is not seen here either.

Each replay also compares addresses: every tensor that the step prepared for the model must lie where capture found it.

Upstream: `vllm/v1/worker/gpu/cudagraph_utils.py` (vLLM 0.32).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from engines import Engine
from torch import Tensor
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import get_forward_context
from vllm.platforms import current_platform
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager, ModelCudaGraphManager

MADE_ANEW = "scheduler_metadata"
"""What a back end plans for each step. FlashAttention copies it to a buffer of its own (test_flash_attention.py); the
CPU back end, which knows no graphs, makes a tensor each time, and a replay must take the step's own."""


@dataclass
class Step:
    """What a forward pass gets."""

    inputs: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the model."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Layer -> attention metadata."""
    slots: dict[str, Tensor] = field(default_factory=dict)
    """Layer -> KV slots."""

    def addresses(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Where every tensor lies, and its shape."""
        found = {
            **_tensors(self.inputs, "inputs"),
            **_tensors(self.metadata, "metadata"),
            **_tensors(self.slots, "slots"),
        }
        return {
            name: (tensor.data_ptr(), tuple(tensor.shape))
            for name, tensor in found.items()
            if not name.endswith(f".{MADE_ANEW}")
        }


def _tensors(value: Any, name: str) -> dict[str, Tensor]:
    """All tensors within mappings, sequences and dataclasses, by their way there."""
    if isinstance(value, Tensor):
        return {name: value}
    if isinstance(value, Mapping):
        parts = {str(key): part for key, part in value.items()}
    elif isinstance(value, list | tuple):
        parts = {str(index): part for index, part in enumerate(value)}
    elif dataclasses.is_dataclass(value):
        parts = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
    else:
        return {}
    return {way: tensor for key, part in parts.items() for way, tensor in _tensors(part, f"{name}.{key}").items()}


class _Graph:
    """Stands for a `torch.cuda.CUDAGraph`."""

    def __init__(self, captured: Step, forward: Callable[[CUDAGraphMode], None], replays: Replays) -> None:
        self.captured = captured
        self.addresses = captured.addresses()
        self.forward = forward
        self.replays = replays

    def replay(self) -> None:
        step = self.replays.step
        addresses = step.addresses()
        assert addresses.keys() == self.addresses.keys(), "the step has other tensors than the graph"
        self.replays.moved |= {name for name, where in addresses.items() if where != self.addresses[name]}
        for layer, metadata in self.captured.metadata.items():
            if hasattr(metadata, MADE_ANEW):
                setattr(metadata, MADE_ANEW, getattr(step.metadata[layer], MADE_ANEW))
        self.forward(CUDAGraphMode.NONE)


class _Recorder(CudaGraphManager):
    """vLLM's `capture`, without a GPU."""

    replays: Replays

    @torch.inference_mode()
    def capture(self, create_forward_fn: Any, progress_bar_desc: str = "") -> None:
        for desc in self._capture_descs[CUDAGraphMode.FULL]:
            create_forward_fn(desc, warmup=True)(CUDAGraphMode.NONE)
            forward = create_forward_fn(desc, warmup=False)
            with self.replays.captured() as step:
                forward(CUDAGraphMode.NONE)
            self.graphs[desc] = _Graph(step, forward, self.replays)  # type: ignore[assignment]
        self._graphs_captured = True


class _Manager(ModelCudaGraphManager, _Recorder):
    """In this order vLLM's `capture` for models calls the recorder's."""

    def run_fullgraph(self, desc: BatchExecutionDescriptor) -> Any:
        self.replays.sizes.append((self.replays.num_reqs, desc.num_tokens))
        return super().run_fullgraph(desc)


class Replays:
    """What was replayed since the graphs were captured."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.step = Step()
        """That is being prepared."""
        self.num_reqs = 0
        self.sizes: list[tuple[int, int]] = []
        """Of each step that was replayed: requests, and rows of the graph."""
        self.moved: set[str] = set()
        """Tensors that a replay would have looked for elsewhere."""

    @contextlib.contextmanager
    def captured(self) -> Iterator[Step]:
        """What the model gets meanwhile."""
        step = Step()

        def see(model: Any, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
            context = get_forward_context()
            step.inputs, step.metadata, step.slots = (
                dict(inputs),
                dict(context.attn_metadata),
                dict(context.slot_mapping),
            )

        hook = self.model.register_forward_pre_hook(see, with_kwargs=True)
        try:
            yield step
        finally:
            hook.remove()

    @contextlib.contextmanager
    def prepared(self, state: Any) -> Iterator[None]:
        """Watch what a model state prepares for each step."""
        attention, embeddings, inputs = state.prepare_attn, state.prepare_inputs_embeds, state.prepare_inputs

        def prepare_attn(
            batch: Any, mode: Any, tables: Any, slots: Tensor, groups: Any, cache: Any, **others: Any
        ) -> Any:
            metadata = attention(batch, mode, tables, slots, groups, cache, **others)
            self.step = Step(metadata=metadata, slots=build_slot_mappings_by_layer(slots, cache))
            self.num_reqs = batch.num_reqs
            return metadata

        def prepare_inputs_embeds(*args: Any) -> Any:
            self.step.inputs["inputs_embeds"] = made = embeddings(*args)
            return made

        def prepare_inputs(batch: Any, *args: Any) -> Any:
            made = inputs(batch, *args)
            self.step.inputs |= {"input_ids": batch.input_ids, "positions": batch.positions, **made}
            return made

        state.prepare_attn, state.prepare_inputs_embeds = prepare_attn, prepare_inputs_embeds
        state.prepare_inputs = prepare_inputs
        try:
            yield
        finally:
            del state.prepare_attn, state.prepare_inputs_embeds, state.prepare_inputs


@contextlib.contextmanager
def replayed(engine: Engine, sizes: Sequence[int] = (1, 2, 4, 8)) -> Iterator[Replays]:
    """An engine that replays its decode steps meanwhile, in graphs of these numbers of rows.

    Raises:
        AssertionError: at the end, nothing was replayed, or a tensor was not where the capture had found it.
    """
    runner = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner
    (model,) = engine.llm.apply_model(lambda model: model)
    replays = Replays(model)
    stock = runner.cudagraph_manager
    runner.cudagraph_manager = manager = _make_manager(runner, replays, sizes)
    try:
        manager.capture(
            model,
            runner.model_state,
            runner.input_buffers,
            None,
            runner.block_tables,
            runner.attn_groups,
            runner.kv_cache_config,
        )
        with replays.prepared(runner.model_state):
            yield replays
    finally:
        runner.cudagraph_manager = stock
    assert replays.sizes, "nothing was replayed"
    assert not replays.moved, f"a graph would read something else than {sorted(replays.moved)}"


def _make_manager(runner: Any, replays: Replays, sizes: Sequence[int]) -> _Manager:
    with (
        patch.object(runner.compilation_config, "cudagraph_capture_sizes", list(sizes)),
        patch.object(runner.compilation_config, "max_cudagraph_capture_size", max(sizes)),
        patch.object(type(current_platform), "get_global_graph_pool", lambda self: None),
    ):
        manager = _Manager(runner.vllm_config, runner.device, CUDAGraphMode.FULL_DECODE_ONLY, runner.decode_query_len)
    manager.replays = replays
    return manager
