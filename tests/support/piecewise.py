"""Piecewise CUDA graphs without a GPU: vLLM's compiled pieces, and each piece as a graph would run it.

vLLM compiles, splits at attention, chooses steps, pads them and names the graph in the forward context. Only the graph
of a piece is ours: a replay computes from the tensors of recording time, and leaves its results where recording left
them. What a graph may overwrite is overwritten: the output of a segment, as soon as another piece runs.

Upstream: `vllm/compilation/cuda_graph.py` (vLLM 0.32).
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar
from unittest.mock import patch

import engines
import torch
from engines import FAST, Engine
from torch import Tensor
from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
from vllm.config.compilation import CompilationMode, CUDAGraphMode
from vllm.forward_context import BatchDescriptor, get_forward_context
from vllm.platforms import current_platform
from vllm.v1.worker.gpu import cudagraph_utils

import vd_plugin


@dataclass
class _Record:
    inputs: tuple[Any, ...]
    addresses: list[int]
    outputs: Any


class Piece:
    """Stands for vLLM's `CUDAGraphWrapper`."""

    all_pieces: ClassVar[list[Piece]] = []
    is_recording: ClassVar[bool] = False
    replays: ClassVar[dict[int, list[int]]] = defaultdict(list)
    """Number of a segment's last piece -> rows, each time that it was replayed."""
    _gone: ClassVar[list[Tensor]] = []
    """Outputs of segments that any other graph may write over."""

    def __init__(
        self, runnable: Callable[..., Any], vllm_config: Any, runtime_mode: CUDAGraphMode, cudagraph_options: Any
    ) -> None:
        self.runnable = runnable
        self.runtime_mode = runtime_mode
        self.is_last = cudagraph_options.weak_ref_output
        self.records: dict[BatchDescriptor, _Record] = {}
        self.all_pieces.append(self)

    def __call__(self, *args: Any) -> Any:
        context = get_forward_context()
        if context.cudagraph_runtime_mode != self.runtime_mode:
            return self.runnable(*args)
        assert context.batch_descriptor is not None
        for tensor in self._gone:
            tensor.fill_(torch.nan)
        self._gone.clear()
        addresses = [arg.data_ptr() for arg in args if isinstance(arg, Tensor)]
        record = self.records.get(context.batch_descriptor)
        if record is None:
            assert self.is_recording, f"no graph for {context.batch_descriptor}"
            record = self.records[context.batch_descriptor] = _Record(args, addresses, self.runnable(*args))
        else:
            assert addresses == record.addresses, f"a graph of {context.batch_descriptor} would read something else"
            for old, new in zip(_flat(record.outputs), _flat(self.runnable(*record.inputs)), strict=True):
                old.copy_(new)
        if self.is_last:
            self._gone.extend(_flat(record.outputs))
            self.replays[self.all_pieces.index(self)].append(context.batch_descriptor.num_tokens)
        return record.outputs


def _flat(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else [each for each in outputs if isinstance(each, Tensor)]


def start(model: Any, sizes: Sequence[int], *, layers: Sequence[int], backend: str, **overrides: Any) -> Engine:
    """An engine whose stages are compiled as on a GPU, with room for graphs of these numbers of rows."""
    stock = current_platform.check_and_update_config.__func__  # type: ignore[attr-defined]

    def check(cls: type, config: Any) -> None:
        stock(cls, config)
        compilation = config.compilation_config
        compilation.mode, compilation.backend = CompilationMode.VLLM_COMPILE, backend
        compilation.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
        compilation.cudagraph_capture_sizes, compilation.max_cudagraph_capture_size = sorted(sizes), max(sizes)
        compilation.compile_sizes = []

    engines.stop()
    Piece.all_pieces.clear()
    options = {**FAST, "enforce_eager": False, **overrides}
    arguments = vd_plugin.engine_args(str(model), visiondrop={"layers": list(layers), "compile": True}, **options)
    with _platform(check):
        engine = engines._start(arguments)
    record(engine)
    return engine


@contextlib.contextmanager
def _platform(check: Callable[[type, Any], None]) -> Iterator[None]:
    platform = type(current_platform)
    with (
        patch.object(platform, "check_and_update_config", classmethod(check)),
        patch.object(platform, "get_static_graph_wrapper_cls", classmethod(lambda cls: f"{__name__}.{Piece.__name__}")),
        patch.object(platform, "get_global_graph_pool", classmethod(lambda cls: None)),
        # It asks every operator whether it is one of some that only a GPU has.
        patch.object(FixFunctionalizationPass, "__call__", lambda self, graph: None),
    ):
        yield


def record(engine: Engine) -> None:
    """What vLLM does before the first request: run every number of rows, recording the pieces."""
    runner = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner
    (model,) = engine.llm.apply_model(lambda model: model)
    Piece.is_recording = True
    try:
        with patch.object(cudagraph_utils, "graph_capture", lambda device: contextlib.nullcontext()):
            runner.cudagraph_manager.capture(
                model,
                runner.model_state,
                runner.input_buffers,
                None,
                runner.block_tables,
                runner.attn_groups,
                runner.kv_cache_config,
            )
    finally:
        Piece.is_recording = False
    Piece.replays.clear()
