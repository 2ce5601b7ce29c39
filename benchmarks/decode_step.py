"""Median time of a decode step, VisionDrop against stock vLLM: same checkpoint, same context, interleaved in one run.

Two engines run in two processes; the parent lets them take turns, a few steps at a time, so that both see the same
machine. The prompts hold one image in full and some text, so that both engines do the same work: the difference is
what keeping several stages costs when nothing is saved. A second pair of columns shows the same requests at a budget.
Stock vLLM is unmodified: this plugin is not loaded there.

    python benchmarks/decode_step.py MODEL [--requests 4] [--rounds 12] [--steps 8] [--budget 320]

Prints a table, and one line of JSON last.

The environment says how both run, as for the tests (tests/support/engines.py): VISIONDROP_TEST_DTYPE, by default the
checkpoint's, and VISIONDROP_TEST_EAGER=0 with CUDA graphs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any

_IMAGE_SIZE = (672, 672)


def _serve(pipe: Connection, model: str, kind: str, num_requests: int) -> None:
    """A child: prefill every request it is told to, then run decode steps on demand and send back their seconds."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    if kind == "stock":
        os.environ["VLLM_PLUGINS"] = ""  # none: on a CPU, ours makes stock vLLM faster, too
    from PIL import Image
    from vllm import LLM, SamplingParams

    from vd_plugin import engine_args

    options: dict[str, Any] = {
        "dtype": os.environ.get("VISIONDROP_TEST_DTYPE", "auto"),
        "enforce_eager": os.environ.get("VISIONDROP_TEST_EAGER", "1") != "0",
        "max_model_len": 8192,
        "max_num_batched_tokens": 8192,
        "max_num_seqs": num_requests,
        "skip_mm_profiling": True,
        "distributed_executor_backend": "uni",
        "enable_prefix_caching": False,
    }
    llm = LLM(**({"model": model, **options} if kind == "stock" else engine_args(model, **options)))
    engine = llm.llm_engine
    token = llm.get_tokenizer().decode([engine.model_config.hf_config.image_token_index])
    image = Image.effect_mandelbrot(_IMAGE_SIZE, (-2, -1.5, 1, 1.5), 64).convert("RGB")
    pipe.send("ready")
    while (order := pipe.recv()) is not None:
        name, budget, count = order
        if name == "prefill":
            for number in range(num_requests):
                prompt: dict[str, Any] = {
                    "prompt": f"USER: {token}\nWhat is this? ASSISTANT:",
                    "multi_modal_data": {"image": image},
                }
                if budget != "stock":
                    prompt["mm_processor_kwargs"] = {"visual_token_budget": budget}
                params = SamplingParams(temperature=0, max_tokens=4000, ignore_eos=True)
                engine.add_request(f"{budget}-{number}", prompt, params)
            while sum(bool(output.outputs[0].token_ids) for output in engine.step()) < num_requests:
                pass
            pipe.send(None)
        elif name == "decode":
            seconds = []
            for _ in range(count):
                start = time.perf_counter()
                engine.step()
                seconds.append(time.perf_counter() - start)
            pipe.send(seconds)
        else:
            engine.abort_request([f"{budget}-{number}" for number in range(num_requests)])
            pipe.send(None)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="a LLaVA-NeXT checkpoint")
    parser.add_argument("--requests", type=int, default=4, help="requests that decode together (default 4)")
    parser.add_argument("--rounds", type=int, default=12, help="turns of each engine (default 12)")
    parser.add_argument("--steps", type=int, default=8, help="steps a turn (default 8)")
    parser.add_argument("--budget", type=int, default=320, help="budget of the second comparison (default 320)")
    arguments = parser.parse_args()

    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for kind in ("stock", "visiondrop"):
        pipes[kind], child = context.Pipe()
        context.Process(target=_serve, args=(child, arguments.model, kind, arguments.requests), daemon=True).start()
        pipes[kind].recv()

    def ask(kind: str, *order: Any) -> Any:
        pipes[kind].send(order)
        return pipes[kind].recv()

    results = {}
    for budget in ("full", arguments.budget):
        budgets = {"stock": "stock", "visiondrop": budget}
        samples: dict[str, list[float]] = {kind: [] for kind in pipes}
        for kind in pipes:
            ask(kind, "prefill", budgets[kind], 0)
            ask(kind, "decode", budgets[kind], 2)  # warm
        for _ in range(arguments.rounds):
            for kind in pipes:
                samples[kind] += ask(kind, "decode", budgets[kind], arguments.steps)
        for kind in pipes:
            ask(kind, "abort", budgets[kind], 0)
        medians = {kind: statistics.median(values) for kind, values in samples.items()}
        results[str(budget)] = {**medians, "overhead": medians["visiondrop"] / medians["stock"] - 1}
    for pipe in pipes.values():
        pipe.send(None)

    print(f"{arguments.requests} requests decoding, {arguments.rounds * arguments.steps} steps each, median of a step")
    print(f"{'budget':>8} {'stock':>10} {'VisionDrop':>11} {'overhead':>9}")
    for budget, result in results.items():
        stock, ours = result["stock"] * 1e3, result["visiondrop"] * 1e3
        print(f"{budget:>8} {stock:>7.1f} ms {ours:>8.1f} ms {result['overhead']:>+8.1%}")
    print(json.dumps({"benchmark": "decode_step", "requests": arguments.requests, "seconds": results}))


if __name__ == "__main__":
    main()
