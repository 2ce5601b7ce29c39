"""A plan as a page of text."""

from __future__ import annotations

from typing import Final

from vd_plugin.kv_capacity import divide_layers, rows_per_cost
from vd_plugin.plan import GIB, Plan

_MIB: Final = 2**20


def render(plan: Plan, model: str, settings: str) -> str:
    """The report as text.

    Args:
        settings: the last line.
    """
    parts = [_render_model(plan, model), _render_memory(plan)]
    if plan.capacity.usable_blocks:
        parts += [_render_cache(plan), _render_images(plan)]
    if not plan.problems:
        parts += [_render_limit(plan), settings]
    return "\n\n".join(parts)


def _render_model(plan: Plan, model: str) -> str:
    shape, boundaries = plan.geometry.decoder, plan.geometry.boundaries
    where = f"again after {', '.join(map(str, boundaries))}" if boundaries else "at the encoder alone"
    gpus = f"{plan.tensor_parallel_size} GPUs" if plan.tensor_parallel_size > 1 else "one GPU"
    return f"{model}, {plan.dtype} on {gpus}: {shape.num_layers} decoder layers, pruned {where}"


def _render_memory(plan: Plan) -> str:
    memory = plan.memory
    loaded, layers = plan.tower_layers
    lines = ["memory of each GPU, GiB"]

    def add(name: str, value: int | None, note: str = "") -> None:
        if value is not None:
            lines.append(f"  {name:<22}{value / GIB:>10,.2f}  {note}".rstrip())

    add("total", memory.total, "--gpu-memory, as vLLM counts it: a card sold as 80 GB has about 79")
    add("usable by vLLM", memory.usable, "--gpu-memory-utilization")
    add("weights", memory.weights, f"exact; {loaded} of the tower's {layers} layers are loaded")
    add("reserve", memory.reserve, "assumed (--reserve): activations, CUDA graphs, CUDA itself")
    known = "" if memory.reserve is None else 'vLLM logs the true "Available KV cache memory": give it as --kv-memory'
    add("KV cache", memory.kv_cache, known or "given")
    return "\n".join(lines)


def _render_cache(plan: Plan) -> str:
    counts, group_layers = divide_layers(plan.geometry.layers_per_stage)
    capacity = plan.capacity
    blocks = (
        f"KV cache of {capacity.num_blocks:,} blocks: {plan.block_size} rows x {group_layers} layers, "
        f"{plan.block_bytes / _MIB:,.2f} MiB each; groups by stage: {', '.join(map(str, counts))}"
    )
    text = (
        f"  text: {capacity.text_tokens:,} tokens, or {plan.max_concurrency:.2f} requests of {plan.max_model_len:,} "
        f"(vLLM will log {plan.kv_cache_tokens:,} tokens)"
    )
    lines = [blocks, text]
    if line := plan.log_line:
        lines += ["  the engine will log:", f"  {line}"]
    return "\n".join(lines)


def _render_images(plan: Plan) -> str:
    height, width = plan.image_size
    full = plan.images[0]
    header = ("budget", "rows by stage", "KV blocks", "MiB", "saved", "fit at once", "prefill", "saved")
    rows = [header]
    for image in plan.images:
        rows.append(
            (
                image.budget,
                ", ".join(f"{count:,}" for count in dict.fromkeys(image.rows)),
                f"{image.kv_blocks:,}",
                f"{image.kv_bytes / _MIB:,.1f}",
                _saved(image.kv_blocks, full.kv_blocks),
                f"{image.images_at_once:,}",
                f"{image.prefill_flops / 1e12:#,.3g} TFLOP",
                _saved(image.prefill_flops, full.prefill_flops),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        names, figures = row[:2], row[2:]
        cells = [cell.ljust(width) for cell, width in zip(names, widths[:2], strict=True)]
        cells += [cell.rjust(width) for cell, width in zip(figures, widths[2:], strict=True)]
        lines.append("  " + "   ".join(cells).rstrip())
    title = f"an image of {width}x{height}; prefill with {plan.text_tokens:,} tokens of text"
    return "\n".join((title, *lines))


def _saved(value: int, full: int) -> str:
    return "" if value == full else f"{100 * (full - value) / full:.0f} %"


def _render_limit(plan: Plan) -> str:
    """How the limit comes about; see `kv_capacity.max_cost`."""
    capacity = plan.capacity
    ratio = float(rows_per_cost(plan.geometry.layers_per_stage, capacity.groups))
    rows = f"{plan.answer_tokens:,} answer + {plan.block_size - 1} rounding"
    return (
        f"what fits, at any mix of budgets: {plan.max_inflight_tokens:,} tokens of text and kept visual tokens\n"
        f"  = ({capacity.usable_blocks:,} blocks x {plan.block_size} rows - {plan.max_num_seqs:,} requests x "
        f"{len(capacity.groups)} groups x ({rows})) / {ratio:.4g} rows a token"
    )
