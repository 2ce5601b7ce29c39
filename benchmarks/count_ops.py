"""Operations that VisionDrop adds to a step: laying out a decode step, and pruning images at all stages.

On a GPU each operation is at least one kernel, and small kernels cost the CPU that launches them more than the GPU that
runs them. Nothing is computed here: tensors have shapes only (torch's "meta" device), those of LLaVA-NeXT-7B. Views and
empty tensors are not counted; norm, projection and rotary embedding count as the kernels that vLLM has for them.

    python -m benchmarks.count_ops [--budget 320]

Prints a table, and one line of JSON last.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.v1.attention.backends.utils import PAD_SLOT_ID

from benchmarks.seven_b import SEVEN_B
from vd_plugin import decoder, model_state, row_layout, row_layout_kernel
from vd_plugin.decoder import StagedDecoder
from vd_plugin.key_reader import KeyReader
from vd_plugin.model_state import StagedModelState
from vd_plugin.row_layout import StageBuffers, StageGroup
from vd_plugin.schedule import DecoderShape, resolve
from vd_plugin.spans import ImageSpan
from vd_plugin.step_layout import PrunedRequest, StepLayout

IMAGE_SIZE = (672, 672)
BLOCK_SIZE = 16
META = torch.device("meta")

_MAKE_NO_KERNEL = {"empty", "empty_like", "_unsafe_view", "promote_types", "scalar_tensor"}


class OperationCount(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # torch's own
        name = str(func)
        if not func.is_view and name.split(".")[1] not in _MAKE_NO_KERNEL:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


class FakeLayer(SimpleNamespace):
    """A decoder layer as pruning sees it: norm and rotary embedding are one operation each, like vLLM's kernels."""

    def __init__(self, shape: DecoderShape, dtype: torch.dtype = torch.bfloat16) -> None:
        q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        weight = torch.empty(q_size + 2 * kv_size, shape.hidden_size, dtype=dtype, device=META)
        cache = torch.empty(64, shape.num_kv_heads, BLOCK_SIZE, 2 * shape.head_dim, dtype=dtype, device=META)
        attention = SimpleNamespace(
            q_size=q_size,
            kv_size=kv_size,
            head_dim=shape.head_dim,
            qkv_proj=lambda rows: (rows @ weight.T, None),
            rotary_emb=lambda positions, query, key: (query.neg_(), key),
            attn=SimpleNamespace(kv_cache=cache),
        )
        super().__init__(input_layernorm=torch.neg, self_attn=attention)


def to_meta(data: np.ndarray, device: torch.device) -> Tensor:
    """In the place of vLLM's asynchronous copy from pinned memory: one operation."""
    return torch.zeros(data.shape, dtype=getattr(torch, data.dtype.name), device=device)


@contextmanager
def on_meta() -> Iterator[list[str]]:
    """Pruning and layout without a device; gives the names of the Triton kernels that were launched."""
    launches: list[str] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **kwargs: launches.append("_lay_out_rows_kernel")

    with ExitStack() as stack:
        stack.enter_context(patch.object(decoder, "async_tensor_h2d", to_meta))
        stack.enter_context(patch.object(model_state, "async_tensor_h2d", to_meta))
        stack.enter_context(patch.object(decoder, "mean_over_ranks", lambda *partials: partials))
        stack.enter_context(patch.object(row_layout_kernel, "_lay_out_rows_kernel", Kernel()))
        stack.enter_context(torch.no_grad())
        yield launches


class FakeStep:
    """A step of the model runner: requests of one image each that is computed now, or of none that decode."""

    def __init__(self, num_reqs: int, spans: tuple[ImageSpan, ...] = (), computed: int = 0, tail: int = 20) -> None:
        self.num_stages, self.num_reqs = len(SEVEN_B.boundaries), num_reqs
        length = spans[-1].end + tail - computed if spans else 1
        self.lengths = np.full(num_reqs, length, dtype=np.int32)
        self.num_tokens = num_reqs * length
        self.pruned = [PrunedRequest(str(index), index, index, computed, spans) for index in range(num_reqs) if spans]

    def _model_state(self, kernel: bool) -> StagedModelState:
        """With what a layout needs, and no more."""
        state: StagedModelState = object.__new__(StagedModelState)
        stages, max_reqs, max_tokens = self.num_stages, 1024, 8192
        state.num_stages, state.device = stages, META
        state.drops = SimpleNamespace(
            np=np.zeros((stages, max_reqs), np.int32), gpu=torch.zeros(stages, max_reqs, dtype=torch.int32, device=META)
        )
        state.positions = torch.zeros(stages, max_tokens, dtype=torch.int64, device=META)
        state.seq_lens = torch.zeros(stages, max_reqs, dtype=torch.int32, device=META)
        state.buffers = StageBuffers(state.positions, state.seq_lens)
        state.stage_groups = [[stage] for stage in range(stages + 1)]
        state.model = SimpleNamespace(entry_groups=[1, 2, 3])
        tables = [torch.zeros(max_reqs, 256, dtype=torch.int32, device=META) for _ in range(stages)]
        groups = [StageGroup(stage, stage, BLOCK_SIZE, table) for stage, table in enumerate(tables, start=1)]
        if kernel:
            state.lay_out_rows = row_layout_kernel.RowLayoutKernel(groups, META)
        else:
            state.lay_out_rows = lambda *args: row_layout.lay_out_rows(groups, *args)
        return state

    def lay_out(self, kernel: bool, mode: TorchDispatchMode) -> StepLayout:
        """What the model runner's state does for the step, under `mode`: on a GPU (`kernel`) or a CPU."""
        state = self._model_state(kernel)
        batch = SimpleNamespace(
            num_reqs=self.num_reqs,
            num_tokens=self.num_tokens,
            num_tokens_after_padding=self.num_tokens,
            num_scheduled_tokens=self.lengths,
            idx_mapping=torch.zeros(self.num_reqs, dtype=torch.int64, device=META),
            query_start_loc=torch.zeros(self.num_reqs + 1, dtype=torch.int32, device=META),
            positions=torch.zeros(self.num_tokens, dtype=torch.int64, device=META),
        )
        names = [SimpleNamespace(layer_names=[f"layer {stage}"]) for stage in range(self.num_stages + 1)]
        step: Any = SimpleNamespace(
            batch=batch,
            is_dummy=False,
            slot_mappings=torch.full((self.num_stages + 1, self.num_tokens), PAD_SLOT_ID, device=META),
            block_tables=[torch.zeros(self.num_reqs, 256, dtype=torch.int32, device=META)] * (self.num_stages + 1),
            kv_cache_config=SimpleNamespace(kv_cache_groups=names),
        )
        with mode:
            return state._lay_out_pruning(step, self.pruned)[0] if self.pruned else state._lay_out(step)

    def prune(self, layout: StepLayout, mode: TorchDispatchMode, shape: DecoderShape = SEVEN_B.decoder) -> None:
        """Prune the step's images at every stage, under `mode`."""
        layer = FakeLayer(shape)
        reader: KeyReader = object.__new__(KeyReader)
        reader.block_shape = (BLOCK_SIZE, shape.num_kv_heads, shape.head_dim)
        reader.places = torch.zeros(BLOCK_SIZE * shape.num_kv_heads * shape.head_dim, dtype=torch.int64, device=META)
        edges = (0, *range(1, self.num_stages + 1), self.num_stages + 1)
        staged = StagedDecoder(SimpleNamespace(layers=[layer] * (self.num_stages + 1)), edges, segments=())
        staged.key_reader = reader
        stream = torch.zeros(self.num_tokens, shape.hidden_size, dtype=torch.bfloat16, device=META)
        qkv = torch.zeros(self.num_tokens, staged.projected_width, dtype=torch.bfloat16, device=META)
        with mode:
            for stage in range(1, self.num_stages + 1):
                stream, qkv = staged._prune(stage, stream, qkv, layout)
        assert len(stream) == layout.stages[-1].num_rows


def image_span(offset: int, budget: int) -> ImageSpan:
    """An image of the largest size."""
    schedule = resolve(SEVEN_B, *IMAGE_SIZE, budget)
    return ImageSpan(offset, schedule.rows, schedule.decoder)


def count_layout(num_reqs: int, kernel: bool) -> int:
    """Operations and kernels that lay out a decode step."""
    count = OperationCount()
    with on_meta() as launches:
        FakeStep(num_reqs).lay_out(kernel, count)
    return count.total + len(launches)


def count_pruning(num_images: int, budget: int, computed: int = 0) -> tuple[int, int]:
    """Operations and kernels of a step with equal images on a GPU: its layout, and pruning at all stages.

    Args:
        computed: how many of the 35 tokens before each image were computed by earlier steps.
    """
    step = FakeStep(num_images, (image_span(35, budget),), computed)
    layout_count, prune_count = OperationCount(), OperationCount()
    with on_meta() as launches:
        step.prune(step.lay_out(True, layout_count), prune_count)
    return layout_count.total + len(launches), prune_count.total


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--budget", type=int, default=320, help="of the images (default 320)")
    budget = parser.parse_args().budget

    counts = {
        "decode_layout_gpu": count_layout(256, kernel=True),
        "decode_layout_cpu": count_layout(256, kernel=False),
    }
    for num_images in (1, 8):
        counts[f"prune_{num_images}_layout"], counts[f"prune_{num_images}"] = count_pruning(num_images, budget)
    rows = {
        "decode_layout_gpu": "layout of a decode step, on a GPU",
        "decode_layout_cpu": "layout of a decode step, on a CPU",
        "prune_1_layout": "layout of a step with one image, on a GPU",
        "prune_1": "pruning one image at all stages",
        "prune_8_layout": "layout of a step with eight equal images, on a GPU",
        "prune_8": "pruning eight equal images at all stages",
    }
    print(f"Operations of a step, images at budget {budget}")
    for name, text in rows.items():
        print(f"{text:<52} {counts[name]:>6}")
    print(json.dumps({"benchmark": "count_ops", "budget": budget, "operations": counts}))


if __name__ == "__main__":
    main()
