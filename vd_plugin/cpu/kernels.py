"""vLLM's Triton kernels that dominate a step on a machine without a GPU, replaced by numpy.

Triton's interpreter runs the programs of a kernel one after another, operation by operation, at about a millisecond a
program: of a decode step with four KV-cache groups it took nine tenths. A replacement takes a kernel's arguments and
leaves the same bytes in memory; `NotImplemented` from it hands a launch to the interpreter. What is not listed here
(penalties, `min_p`, `logit_bias`, bad words, speculative decoding) the interpreter runs as before.

REMOVE WHEN: vLLM runs its second model runner without Triton, or Triton has a backend that compiles for the CPU.

Upstream: `vllm/v1/worker/gpu/` (vLLM 0.32); `triton/runtime/interpreter.py` (Triton 3.9).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, Final

from vd_plugin.cpu import sampling_kernels, step_kernels
from vd_plugin.cpu.interpreter import is_in_use

_WORKER: Final = "vllm.v1.worker.gpu"

REPLACEMENTS: Final[dict[tuple[str, str], Callable[..., Any]]] = {
    (f"{_WORKER}.block_table", "_gather_block_tables_kernel"): step_kernels.gather_block_tables,
    (f"{_WORKER}.block_table", "_compute_slot_mappings_kernel"): step_kernels.compute_slot_mappings,
    (f"{_WORKER}.buffer_utils", "_apply_write_kernel"): step_kernels.apply_write,
    (f"{_WORKER}.input_batch", "_prepare_prefill_inputs_kernel"): step_kernels.prepare_prefill_inputs,
    (f"{_WORKER}.input_batch", "_prepare_pos_seq_lens_kernel"): step_kernels.prepare_pos_seq_lens,
    (f"{_WORKER}.input_batch", "_combine_sampled_and_draft_tokens_kernel"): step_kernels.combine_sampled_tokens,
    (f"{_WORKER}.input_batch", "_get_num_sampled_and_rejected_kernel"): step_kernels.get_num_sampled_and_rejected,
    (f"{_WORKER}.input_batch", "_post_update_kernel"): step_kernels.post_update,
    (f"{_WORKER}.sample.gumbel", "_temperature_kernel"): sampling_kernels.apply_temperature,
    (f"{_WORKER}.sample.gumbel", "_gumbel_sample_kernel"): sampling_kernels.gumbel_sample,
    (f"{_WORKER}.sample.logprob", "_topk_log_softmax_kernel"): sampling_kernels.token_logprobs,
    (f"{_WORKER}.sample.logprob", "_ranks_kernel"): sampling_kernels.token_ranks,
    (f"{_WORKER}.structured_outputs", "_apply_grammar_bitmask_kernel"): sampling_kernels.apply_grammar_bitmask,
}
"""(module, kernel) -> what runs in its place: the launch grid, then the kernel's own parameters."""


def replace_kernels() -> None:
    """Let the replacements run where their kernels are launched. Idempotent; idle unless the interpreter is in use.

    Triton's launch is patched rather than the kernels: vLLM's CPU worker mends modules before it imports those of the
    kernels, so that nothing else may import them first.

    Raises:
        RuntimeError: this is not the interpreter that the patch was written for; or, when a kernel is launched, it is
            not the one that its replacement was written for.
    """
    if not is_in_use():
        return
    from triton.runtime.interpreter import InterpretedFunction

    interpret = InterpretedFunction.run
    if getattr(interpret, "replaces_kernels", False):
        return
    parameters = list(inspect.signature(interpret).parameters)
    if parameters != ["self", "args", "grid", "warmup", "kwargs"]:
        raise RuntimeError(f"Triton's interpreter has changed: run takes {parameters}; see {__name__}")

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        replacement = None if warmup else REPLACEMENTS.get((self.fn.__module__, self.fn.__name__))
        if replacement is None or _launch(replacement, self, grid, args, kwargs) is NotImplemented:
            return interpret(self, *args, grid=grid, warmup=warmup, **kwargs)
        return None

    run.replaces_kernels = True  # type: ignore[attr-defined]
    InterpretedFunction.run = run


def _launch(replacement: Callable[..., Any], kernel: Any, grid: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    parameters = _parameters(replacement)
    if kernel.arg_names != parameters:
        name = f"{kernel.fn.__module__}.{kernel.fn.__name__}"
        raise RuntimeError(f"vLLM has changed: {name} takes {kernel.arg_names}, not {parameters}; see {__name__}")
    # The other options are the compiler's.
    return replacement(grid, *args, **{name: value for name, value in kwargs.items() if name in parameters})


@cache
def _parameters(replacement: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(replacement).parameters)[1:]
