"""Steps that serve a model, ask it, and compare its answers with those of the first of them."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from benchmarks.gpu.context import Context
from benchmarks.gpu.programs import run_tests
from benchmarks.gpu.questions import (
    Answers,
    Reply,
    ask_all,
    ask_at_once,
    check_right,
    first_token_ms,
    share_equal,
    tokens_of,
)
from benchmarks.gpu.server import serve
from benchmarks.gpu.step import Skip, StepError, tell
from server.demo import make_tasks
from vd_plugin.flashinfer import SWITCH

REFERENCE: Final = "eager"
"""The step whose answers those of the others are compared with: nothing of it is captured or compiled."""


def eager(context: Context) -> None:
    """Nothing captured or compiled, and a hidden wait for the GPU is an error."""
    _serve_and_ask(context, ["--enforce-eager"], {"VLLM_GPU_SYNC_CHECK": "error"})


def defaults(context: Context) -> None:
    _serve_and_ask(context)


def burst(context: Context) -> None:
    """3, 9 and 200 requests at once, at all budgets; on a CPU 3 and 9."""
    sizes = (3, 9, 200) if context.num_gpus else (3, 9)
    tasks = make_tasks((sum(sizes) + 3) // 4)
    with serve(context.model, context.path("engine.log")) as server:
        for size in sizes:
            asked, tasks = tasks[:size], tasks[size:]
            start = time.perf_counter()
            replies = ask_at_once(server, asked)
            tell(**{f"{size}_at_once_seconds": round(time.perf_counter() - start, 2)})
            tell(**{f"{size}_at_once_right": check_right(context.model, replies)})


def triton(context: Context) -> None:
    _other_backend(context, "TRITON_ATTN")


def flashinfer(context: Context) -> None:
    if find_spec("flashinfer") is None:
        raise Skip("flashinfer is not installed")
    _other_backend(context, "FLASHINFER")


def flash_attention_2(context: Context) -> None:
    """What A100 and L40 run."""
    if find_spec("vllm.vllm_flash_attn._vllm_fa2_C") is None:
        raise Skip("vLLM's kernels of FlashAttention 2 are not installed")
    _serve_and_ask(context, ["--attention-config.flash_attn_version=2"])


def tensor_parallel(context: Context) -> None:
    """The same answers; and by the tests, the same plans on both ranks."""
    _serve_and_ask(context, ["--tensor-parallel-size", "2"])
    run_tests("vd_plugin/test_tensor_parallel.py", "vd_plugin/engine/test_stage_tensor_parallel.py")


def bare_path(context: Context) -> None:
    """A start without this environment's programs on the PATH, and sampling that might compile kernels."""
    environment = {name: value for name, value in os.environ.items() if name != SWITCH}
    environment["PATH"] = "/usr/bin:/bin"
    with serve(context.model, context.path("engine.log"), (), environment) as server:
        tell(**server.facts())
        body = {
            "model": server.model,
            "messages": [{"role": "user", "content": "What color is the triangle?"}],
            "temperature": 1,
            "top_p": 0.9,
            "top_k": 20,
            "max_tokens": 8,
        }
        response = server.client.post("/v1/chat/completions", json=body)
        if response.status_code != 200:
            raise StepError(f"a sampled answer failed with status {response.status_code}: {response.text[:500]}")


def _other_backend(context: Context, name: str) -> None:
    facts = _serve_and_ask(context, ["--attention-backend", name])
    if facts.get("backend", name) != name:
        raise StepError(f"vLLM has chosen {facts['backend']} instead")


def _serve_and_ask(
    context: Context, options: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """All questions; the answers are compared with those of the first such step."""
    with serve(context.model, context.path("engine.log"), options, environment) as server:
        tell(**server.facts())
        *tasks, warm_up = make_tasks(2)[:5]
        ask_all(server, [warm_up])
        replies = ask_all(server, tasks)
        facts = server.facts()
        tell(late_compilations=facts["late_compilations"])
    tell(first_token_ms=first_token_ms(replies), right=check_right(context.model, replies))
    Answers(context.folder).keep(context.step, replies)
    if context.step != REFERENCE and (reference := Answers(context.folder).of(REFERENCE)) is not None:
        tell(**{f"equal_to_{REFERENCE}": share_equal(tokens_of(replies), reference)})
    return facts


_TURNS: Final = 3
"""Of each engine."""


def compiled(context: Context) -> None:
    """The decoder's stages compiled, and not: the same answers, and first tokens of both in turns."""
    _compare_compiled(context, context.model)


def compiled_7b(context: Context) -> None:
    """The same on the shape of LLaVA-NeXT-7B with random weights, whose answers say nothing."""
    from benchmarks.bench.checkpoint import SHAPES, write

    with TemporaryDirectory() as folder:
        write(Path(folder), SHAPES["7b"])
        _compare_compiled(context, folder, "--load-format", "dummy", "--max-model-len", "4096")


def _compare_compiled(context: Context, model: str, *options: str) -> None:
    if context.num_gpus:
        options = (*options, "--gpu-memory-utilization", "0.42")  # both engines live on one GPU
    names = {"compiled": "true", "not_compiled": "false"}
    *tasks, warm_up = make_tasks(_TURNS + 1)[: 4 * _TURNS + 1]
    replies: dict[str, list[Reply]] = {name: [] for name in names}
    with ExitStack() as stack:
        servers, modes = {}, []
        for name, value in names.items():
            given = [*options, "--hf-overrides", f'{{"visiondrop": {{"compile": {value}}}}}']
            server = stack.enter_context(serve(model, context.path(f"{name}.engine.log"), given))
            servers[name] = server
            facts = server.facts()
            tell(**{f"{name}_{fact}": facts.get(fact) for fact in ("start_seconds", "compilation", "graphs")})
            modes.append(facts.get("compilation"))
            ask_all(server, [warm_up])
        if len(set(modes)) == 1:
            raise StepError(f"both engines have compilation mode {modes[0]}")
        for turn in range(_TURNS):
            for name, server in servers.items():
                replies[name] += ask_all(server, tasks[4 * turn : 4 * turn + 4])
    for name, given_replies in replies.items():
        tell(**{f"{name}_first_token_ms": first_token_ms(given_replies)})
    tell(right=check_right(model, replies["compiled"]))
    if model == context.model:
        tell(equal=share_equal(tokens_of(replies["compiled"]), tokens_of(replies["not_compiled"])))
