"""`visiondrop plan MODEL --gpu-memory 80`: how many images and tokens an engine will hold, before there is one.

Prints a plan (`vd_plugin/plan.py`): a page of text, or JSON. A folder or a config.json is read with the standard
library alone; a model id is looked up with transformers.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from vd_plugin.model_config import complete, read_model_config
from vd_plugin.options import OPTIONS_KEY, load_config
from vd_plugin.plan import (
    BLOCK_SIZE,
    ELEMENT_BYTES,
    GPU_MEMORY_UTILIZATION,
    MAX_NUM_SEQS,
    RESERVE_GIB,
    Plan,
    Request,
    make_plan,
)
from vd_plugin.schedule import Budget, read_budget
from vd_plugin.tools.plan_report import render
from vd_plugin.wire import ERROR_PREFIX


def _settings_line(options: argparse.Namespace, plan: Plan) -> str:
    """What to start: the engine that was planned, and the gateway's limit."""
    engine: list[str] = ["--max-num-seqs", str(plan.max_num_seqs)]
    for name in ("max_model_len", "block_size", "dtype", "tensor_parallel_size", "gpu_memory_utilization"):
        value = getattr(options, name)
        if value is not None:
            engine += [f"--{name.replace('_', '-')}", str(value)]
    if options.layers is not None:
        engine += ["--hf-overrides", json.dumps({OPTIONS_KEY: {"layers": options.layers}})]
    return (
        f"VISIONDROP_MAX_INFLIGHT_TOKENS={plan.max_inflight_tokens} "
        f"visiondrop serve {shlex.quote(_served(options.model))} -- {shlex.join(engine)}"
    )


def _served(model: str) -> str:
    """A config.json is read from, but what is served is its folder."""
    path = Path(model).expanduser()
    return str(path.parent) if path.is_file() else model


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{ERROR_PREFIX}{message}\n")


def _count(text: str) -> int:
    if text.isascii() and text.isdecimal() and 0 < int(text) < 2**31:
        return int(text)
    raise argparse.ArgumentTypeError(f"must be a positive integer; got {text!r}")


def _size(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if 0 <= value < 1e6:
        return value
    raise argparse.ArgumentTypeError(f"must be a number from 0 up; got {text!r}")


def _memory(text: str) -> float:
    value = _size(text)
    if value > 0:
        return value
    raise argparse.ArgumentTypeError(f"must be above 0; got {text!r}")


def _share(text: str) -> float:
    value = _size(text)
    if 0 < value <= 1:
        return value
    raise argparse.ArgumentTypeError(f"must be above 0 and at most 1; got {text!r}")


def _image(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text, re.ASCII)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT in pixels; got {text!r}")
    return int(match[2]), int(match[1])


def _layers(text: str) -> list[int]:
    try:
        return [int(depth) for depth in text.split(",")] if text else []
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be depths with commas between, as 8,16,24; got {text!r}") from None


def _budget(text: str) -> Budget:
    try:
        return read_budget(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="visiondrop plan",
        description="Compute from a model's configuration what an engine will hold, and the settings to use.",
        epilog="Exit status 1: a request of full length, or the image in full, does not fit; 2: wrong usage.",
    )
    parser.add_argument("model", metavar="MODEL", help="a checkpoint's folder, a config.json, or a name on the hub")
    memory = parser.add_mutually_exclusive_group(required=True)
    memory.add_argument(
        "--gpu-memory",
        type=_memory,
        metavar="GIB",
        help="memory of one GPU in GiB, as vLLM counts it; a card sold as 80 GB has about 79",
    )
    memory.add_argument(
        "--kv-memory",
        type=_memory,
        metavar="GIB",
        help='size of the KV cache on each GPU instead: what vLLM logs as "Available KV cache memory", or what '
        "VLLM_CPU_KVCACHE_SPACE says",
    )
    parser.add_argument(
        "--gpu-memory-utilization",
        type=_share,
        metavar="SHARE",
        help=f"the engine option (default: vLLM's, {GPU_MEMORY_UTILIZATION})",
    )
    parser.add_argument(
        "--reserve",
        type=_size,
        default=RESERVE_GIB,
        metavar="GIB",
        help="memory of each GPU for activations, CUDA graphs and CUDA itself, which only a GPU can tell "
        "(assumed: %(default)g)",
    )
    parser.add_argument("--tensor-parallel-size", type=_count, metavar="N", help="the engine option (default: 1)")
    parser.add_argument(
        "--dtype",
        choices=("auto", *ELEMENT_BYTES),
        help="the engine option, of weights and KV cache (default: the configuration's; float32 becomes bfloat16)",
    )
    parser.add_argument(
        "--block-size", type=_count, metavar="ROWS", help=f"the engine option (default: {BLOCK_SIZE}; on a CPU, 128)"
    )
    parser.add_argument("--max-model-len", type=_count, metavar="N", help="the engine option (default: the model's)")
    parser.add_argument(
        "--max-num-seqs",
        type=_count,
        metavar="N",
        help=f"the engine option (default: as many requests at --budget as fit, at most {MAX_NUM_SEQS})",
    )
    parser.add_argument(
        "--layers",
        type=_layers,
        metavar="A,B,C",
        help="depths at which the decoder prunes, '' for none (default: a quarter, a half and three quarters)",
    )
    parser.add_argument("--image", type=_image, metavar="WIDTHxHEIGHT", help="size of an image (default: the largest)")
    parser.add_argument(
        "--budget",
        type=_budget,
        default="high",
        metavar="BUDGET",
        help="budget of most images, from which --max-num-seqs follows: an integer or a preset (default: %(default)s)",
    )
    parser.add_argument(
        "--text-tokens", type=_count, default=60, metavar="N", help="text beside an image (default: %(default)s)"
    )
    parser.add_argument(
        "--answer-tokens",
        type=_count,
        default=256,
        metavar="N",
        help="room for each answer, and for what the chat template adds to a request (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the plan as one JSON object")
    return parser


def _read_config(model: str) -> Any:
    path = Path(model).expanduser()
    if path.exists():
        return read_model_config(path)
    try:
        return complete(load_config(model).to_dict())
    except ImportError:
        raise ValueError(
            f"{model} is no folder or file here, and looking up a model id needs transformers: "
            "give the path of its config.json"
        ) from None


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `make_plan`: those that were left out have its defaults."""
    names = ("gpu_memory_utilization", "tensor_parallel_size", "dtype", "block_size", "max_model_len", "max_num_seqs")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    memory = {"gpu_memory_gib": options.gpu_memory, "kv_memory_gib": options.kv_memory, "reserve_gib": options.reserve}
    return {**memory, **given}


def main(argv: Sequence[str] | None = None) -> int:
    """Print a plan; returns the exit status: 0, 1 if it does not work, 2 for wrong usage."""
    options = _make_parser().parse_args(argv)
    try:
        config = _read_config(options.model)
        if options.layers is not None:
            setattr(config, OPTIONS_KEY, {"layers": options.layers})
        request = Request(options.image, options.text_tokens, options.answer_tokens, options.budget)
        plan = make_plan(config, request, **_given(options))
    except (ValueError, NotImplementedError) as error:
        print(f"{ERROR_PREFIX}{' '.join(str(error).split())}", file=sys.stderr)
        return 2
    settings = _settings_line(options, plan)
    if options.json:
        print(json.dumps({"model": options.model, **plan.to_dict(), "settings": settings}))
    else:
        print(render(plan, options.model, settings))
    if plan.problems:
        sys.stdout.flush()
        print(f"{ERROR_PREFIX}{'; '.join(plan.problems)}", file=sys.stderr)
    return 1 if plan.problems else 0


if __name__ == "__main__":
    sys.exit(main())
