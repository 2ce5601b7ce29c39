"""What a run measures: the checkpoint, the options of its engines, and the tokens of its prompts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.bench.checkpoint import CONTEXT
from benchmarks.bench.engine import IMAGE_SIZE, Asked, Start
from vd_plugin.kv_capacity import block_bytes, divide_layers
from vd_plugin.options import engine_args
from vd_plugin.plan import BLOCK_SIZE, ELEMENT_BYTES
from vd_plugin.schedule import Budget, Geometry, Schedule, resolve

BUDGETS: Final = (640, 320, 160)
STOCK: Final = "stock"
OURS: Final = "visiondrop"


@dataclass(frozen=True, slots=True)
class Settings:
    model: Path
    geometry: Geometry
    dtype: str
    load_format: str
    eager: bool
    on_gpu: bool
    text_tokens: int = 60
    """Of a prompt with an image. The README's FLOPs are counted with as many."""
    only_text_tokens: int = 256
    """Of a prompt without one."""
    fraction: int = 1
    """The model whose ratios are wanted is so many times as deep."""
    clock: str = "perf_counter"
    rounds: int | None = None
    """Turns of each engine; None for a part's own number."""

    @property
    def block_size(self) -> int:
        """vLLM's default."""
        return BLOCK_SIZE if self.on_gpu else 128

    def schedule(self, budget: Budget) -> Schedule:
        return resolve(self.geometry, *IMAGE_SIZE, budget)

    def limit_tokens(self, budget: Budget) -> int:
        """Text tokens whose prefill by stock vLLM is the limit: the prompt's own, and what a layer keeps on average."""
        return self.text_tokens + self.schedule(budget).kept

    def request(self, budget: Budget | None, images: int = 1) -> Asked:
        return Asked(self.text_tokens, images, budget)

    def starts(
        self, *, max_num_seqs: int = 8, stock_blocks: int | None = None, max_model_len: int = CONTEXT, kv_gib: int = 2
    ) -> dict[str, Start]:
        """How the engines of a part are started.

        Args:
            stock_blocks: KV blocks of the stock engine; ours gets as many bytes. None lets vLLM decide.
        """
        return {
            kind: Start(self._arguments(kind, max_num_seqs, stock_blocks, max_model_len), kv_gib, self.clock)
            for kind in (STOCK, OURS)
        }

    def blocks_of(self, kind: str, stock_blocks: int) -> int:
        """Blocks with the bytes of `stock_blocks` of the stock engine, whose only group has all layers."""
        if kind == STOCK:
            return stock_blocks
        _, layers_of_group = divide_layers(self.geometry.layers_per_stage)
        return stock_blocks * self.geometry.decoder.num_layers // layers_of_group

    def bytes_per_block(self, kind: str) -> int:
        ours = block_bytes(self.geometry, self.block_size, ELEMENT_BYTES[self.dtype])
        return ours * self.blocks_of(OURS, 1) if kind == STOCK else ours

    def _arguments(self, kind: str, max_num_seqs: int, stock_blocks: int | None, max_model_len: int) -> dict[str, Any]:
        options: dict[str, Any] = {
            "distributed_executor_backend": "uni",
            "dtype": self.dtype,
            "enforce_eager": self.eager,
            "load_format": self.load_format,
            "max_model_len": max_model_len,
            "max_num_batched_tokens": CONTEXT,
            "max_num_seqs": max_num_seqs,
            "skip_mm_profiling": True,
            "use_tqdm_on_load": False,
        }
        if stock_blocks is not None:
            options["block_size"] = self.block_size
            options["num_gpu_blocks_override"] = self.blocks_of(kind, stock_blocks)
        if self.on_gpu:
            options["gpu_memory_utilization"] = 0.42  # both engines live on one GPU
        if kind == STOCK:
            return {"model": str(self.model), **options}
        layers = list(self.geometry.boundaries)
        return engine_args(str(self.model), visiondrop={"layers": layers}, **options)
