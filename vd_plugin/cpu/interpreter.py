"""Patches of Triton's interpreter, applied where the interpreter runs and nowhere else.

Triton 3.9 interprets a masked store only if the mask's numbers are booleans. vLLM's grammar kernel makes its mask by
arithmetic on integers, which compiled Triton takes for a mask as well; interpreted, the store raises, and the engine
dies at the first request with structured output. REMOVE WHEN: Triton's `create_masked_store` converts masks itself.
"""

from __future__ import annotations

import inspect
import os
from typing import Any


def is_in_use() -> bool:
    """Whether Triton's kernels are interpreted in this process, as they are on a machine without a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1" and os.environ.get("TRITON_DEFAULT_BACKEND") == "cpu"


def patch_masked_store() -> None:
    """Let masked stores take masks of integers. Idempotent; does nothing unless the interpreter is in use.

    Raises:
        RuntimeError: this is not the interpreter that the patch was written for.
    """
    if not is_in_use():
        return
    import numpy as np
    from triton.language import int1
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    stock = InterpreterBuilder.create_masked_store
    if getattr(stock, "is_mended", False):
        return
    parameters = list(inspect.signature(stock).parameters)
    if parameters != ["self", "ptrs", "value", "mask", "cache_policy"]:
        raise RuntimeError(f"Triton's interpreter has changed: create_masked_store takes {parameters}; see {__name__}")

    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, cache_policy: Any) -> Any:
        if mask.data.dtype != np.bool_:
            mask = TensorHandle(mask.data.astype(np.bool_), int1)
        return stock(self, ptrs, value, mask, cache_policy)

    create_masked_store.is_mended = True  # type: ignore[attr-defined]
    InterpreterBuilder.create_masked_store = create_masked_store


def patch_top_k_top_p() -> None:
    """Let vLLM choose among the likeliest tokens with torch, as it does without Triton. Idempotent; idle as above.

    vLLM's kernel for it calls a method of its loop's variable, which interpreted is a plain integer: the engine died at
    the first request with `top_p` or `top_k`. REMOVE WHEN: the interpreter's `range` gives tensors.

    Raises:
        RuntimeError: this is not the sampler that the patch was written for.
    """
    if not is_in_use():
        return
    from vllm.v1.sample.ops import topk_topp_sampler as sampler

    if not isinstance(getattr(sampler, "HAS_TRITON", None), bool) or not hasattr(sampler, "apply_top_k_top_p_pytorch"):
        raise RuntimeError(f"vLLM's top-k sampler has changed; see {__name__}")
    sampler.HAS_TRITON = False
