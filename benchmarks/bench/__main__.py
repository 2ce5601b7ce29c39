"""Stock vLLM, VisionDrop and the limit side by side in one run: `make bench`.

    python -m benchmarks.bench [--only prefill,throughput] [--shape slice|quarter|7b] [--rounds 7] [--log]

Engines live in processes of their own and take turns, so that all see the same machine. Each part (flops, prefill,
throughput, decode, curve, serve) is saved in .cache/bench when it is done. Without --only, a run measures what is not
saved for this code, machine and setting, so that one that was stopped goes on; with it, just those parts. The report
has all that is saved. Prints tables, the marks as met or missed, and one line of JSON last.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from benchmarks.bench.checkpoint import SHAPES, write
from benchmarks.bench.report import PARTS, Report, add_entry, draw_plot, plan_parts
from benchmarks.bench.settings import Settings
from vd_plugin.options import OPTIONS_KEY, load_config, read_geometry

ROOT: Final = Path(__file__).parents[2]
CACHE: Final = ROOT / ".cache" / "bench"
LOG: Final = ROOT / "benchmarks" / "LOG.md"
PLOT: Final = ROOT / "docs" / "images" / "bench.png"


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)
    on_gpu = _has_gpu()
    with _checkpoint(options, on_gpu) as (settings, description):
        facts = {"commit": commit(), "machine": machine(on_gpu), "checkpoint": description}
        folder = options.out / run_key(facts["machine"], description, str(options.rounds))
        saved = load(folder)
        try:
            parts = plan_parts(options.only, list(saved))
        except ValueError as error:
            print(f"bench: {error}", file=sys.stderr)
            return 2
        if kept := [part for part in saved if part not in parts]:
            print(f"bench: measured before: {', '.join(kept)} (--only measures them again)", file=sys.stderr)
        for part in parts:
            with _progress(part, PARTS[part].count(settings)) as advance:
                saved[part] = measure(part, settings, advance)
            save(folder, part, saved[part])
    command = f"make bench ARGS={shlex.quote(shlex.join(options.given))}" if options.given else "make bench"
    report = Report(date.today().isoformat(), command, results=saved, **facts)
    print(report.text())
    plot = PLOT if options.log else options.out / "bench.png"
    draw_plot(report, plot)
    if options.log:
        LOG.write_text(add_entry(LOG.read_text(), report.entry(os.path.relpath(plot, LOG.parent))))
    print(report.json_line())
    return 0


def measure(part: str, settings: Settings, advance: Callable[[], None]) -> dict[str, Any]:
    """The result of a part, with engines of its own."""
    result: dict[str, Any] = PARTS[part].measure(settings, advance)
    return result


def save(folder: Path, part: str, result: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder / f".{part}.json"
    fresh.write_text(json.dumps(result) + "\n")
    fresh.replace(folder / f"{part}.json")


def load(folder: Path) -> dict[str, Any]:
    """Parts that were measured before, by name."""
    return {
        part: json.loads((folder / f"{part}.json").read_text()) for part in PARTS if (folder / f"{part}.json").exists()
    }


def run_key(*setting: str) -> str:
    """Of what a result depends on: the code that is measured and that measures, and the setting."""
    digest = hashlib.sha256("\n".join(setting).encode())
    for folder in ("vd_plugin", "server", "benchmarks"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def default_dtype(cpu_flags: str | None) -> str:
    """bfloat16 where the hardware has it: a CPU that emulates it is ten times slower.

    Args:
        cpu_flags: those of /proc/cpuinfo; None on a GPU.
    """
    return "bfloat16" if cpu_flags is None or {"avx512_bf16", "amx_bf16"} & set(cpu_flags.split()) else "float32"


def default_eager(on_gpu: bool) -> bool:
    """Whether graphs and compilation are off: as VISIONDROP_TEST_EAGER says, else on a CPU alone."""
    said = os.environ.get("VISIONDROP_TEST_EAGER")
    return not on_gpu if said is None else said != "0"


def commit() -> str:
    """Of the working tree."""
    head = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if head.returncode:
        return "unknown"
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=False)
    return head.stdout.strip() + (" with changes" if changed.stdout.strip() else "")


def machine(on_gpu: bool) -> str:
    """One line: processor, cores in use, accelerator."""
    cores = len(os.sched_getaffinity(0))
    threads = os.environ.get("OMP_NUM_THREADS")
    name = _cpu("model name") or platform.machine()
    line = f"{cores} cores of {name}" + (f", {threads} thread(s)" if threads else "")
    if not on_gpu:
        return line
    import torch

    return f"{torch.cuda.get_device_name()}, {line}"


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--only", metavar="PARTS", help=f"of {','.join(PARTS)}, with commas (default: what is not saved)"
    )
    parser.add_argument(
        "--shape", choices=SHAPES, default="slice", help="an eighth of the depth of LLaVA-NeXT-7B, a quarter, or all"
    )
    parser.add_argument("--model", type=Path, help="a LLaVA-NeXT checkpoint with weights instead")
    parser.add_argument("--dtype", help="default: bfloat16 where the hardware has it, else float32")
    parser.add_argument("--rounds", type=int, help="turns of each engine (default: each part has its own)")
    parser.add_argument(
        "--cpu-time", action="store_true", help="measure CPU time: for a busy machine, with OMP_NUM_THREADS=1"
    )
    parser.add_argument("--eager", action=argparse.BooleanOptionalAction, help="no graphs, no compilation")
    parser.add_argument(
        "--log", action="store_true", help="add an entry to benchmarks/LOG.md, and docs/images/bench.png"
    )
    parser.add_argument("--out", type=Path, default=CACHE, help="where parts are saved (default .cache/bench)")
    options = parser.parse_args(argv)
    options.given = sys.argv[1:] if argv is None else argv
    return options


@contextmanager
def _checkpoint(options: argparse.Namespace, on_gpu: bool) -> Iterator[tuple[Settings, str]]:
    dtype = options.dtype or default_dtype(None if on_gpu else _cpu("flags"))
    eager = default_eager(on_gpu) if options.eager is None else options.eager
    with tempfile.TemporaryDirectory() as temporary:
        if options.model is not None:
            model, boundaries, load_format, fraction = options.model, None, "auto", 1
        else:
            shape = SHAPES[options.shape]
            model, boundaries, load_format, fraction = (
                Path(temporary, "model"),
                shape.boundaries,
                "dummy",
                shape.fraction,
            )
            write(model, shape)
        config = load_config(str(model))
        if boundaries is not None:
            setattr(config, OPTIONS_KEY, {"layers": list(boundaries)})
        clock = "process_time" if options.cpu_time else "perf_counter"
        settings = Settings(
            model=model,
            geometry=read_geometry(config),
            dtype=dtype,
            load_format=load_format,
            eager=eager,
            on_gpu=on_gpu,
            fraction=fraction,
            clock=clock,
            rounds=options.rounds,
        )
        details = [dtype, *["eager"] * eager, f"vLLM {version('vllm')}", *["CPU time"] * options.cpu_time]
        yield settings, f"{options.model or SHAPES[options.shape].title}, {', '.join(details)}"


@contextmanager
def _progress(part: str, steps: int) -> Iterator[Callable[[], None]]:
    """A bar on standard error while a part is measured; yields what moves it on."""
    from tqdm import tqdm

    with tqdm(total=steps, desc=part, unit="turn", file=sys.stderr) as bar:
        yield lambda: bar.update() and None


def _cpu(key: str) -> str | None:
    """A line of /proc/cpuinfo, of the first processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)


def _has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


if __name__ == "__main__":
    raise SystemExit(main())
