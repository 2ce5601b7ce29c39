"""Norms that write into their inputs, as vLLM's CUDA kernel does: a CPU's make new tensors, which hides bugs.

Upstream: `fused_add_rms_norm` in `vllm/kernels/vllm_c.py` (vLLM 0.32).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest.mock import patch

from engines import Engine
from torch import Tensor
from vllm.model_executor.layers.layernorm import RMSNorm


@contextlib.contextmanager
def norms_in_place(engine: Engine) -> Iterator[None]:
    """An engine whose decoder's norms overwrite what they are given beside a residual, meanwhile.

    Raises:
        AssertionError: at the end, no norm was called that way.
    """
    (model,) = engine.llm.apply_model(lambda model: model)
    norms = [module for module in model.modules() if isinstance(module, RMSNorm)]
    count = 0

    def forward_of(norm: RMSNorm) -> object:
        stock = norm.forward

        def forward(x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
            nonlocal count
            if residual is None:
                return stock(x)
            count += 1
            normed, added = stock(x, residual)
            return x.copy_(normed), residual.copy_(added)

        return forward

    with contextlib.ExitStack() as stack:
        for norm in norms:
            stack.enter_context(patch.object(norm, "forward", forward_of(norm)))
        yield
    assert count, "no norm was called with a residual"
