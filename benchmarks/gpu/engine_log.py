"""Facts in an engine's log: what vLLM 0.32 made of its defaults. A test holds vLLM to its words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

_PATTERNS: Final = {
    "compilation": r"'mode': <CompilationMode\.(\w+)",
    "graphs": r"'cudagraph_mode': <CUDAGraphMode\.(\w+)",
    "dtype": r"dtype=torch\.(\w+)",
    "backend": r"Using (\w+) attention backend",
    "layout": r"Using (\w+) KV cache layout",
    "kv_cache_tokens": r"KV cache size: ([\d,]+) tokens",
    "graph_seconds": r"Graph capturing finished in (\d+) secs",
    "graph_gib": r"Graph capturing finished in \d+ secs, took ([-\d.]+) GiB",
}
_IMAGES: Final = re.compile(r"(\d+) at (\w+) \(\d+ blocks each\)")
"""Of the plugin's own line on the KV cache."""
_GRAPH_SIZES: Final = re.compile(r"'cudagraph_capture_sizes': \[([\d, ]*)\]")
_LATE_COMPILATION: Final = "JIT compilation during inference"
"""Of a kernel that the warm-up has missed (vllm/utils/jit_monitor.py)."""


def facts_of(log: Path) -> dict[str, Any]:
    """What is found, in the order of `_PATTERNS`; of several lines the last one counts."""
    text = log.read_text(errors="replace") if log.exists() else ""
    facts: dict[str, Any] = {}
    for name, pattern in _PATTERNS.items():
        if found := re.findall(pattern, text):
            facts[name] = found[-1]
    if images := _IMAGES.findall(text):
        facts["images"] = {budget: int(number) for number, budget in images}
    if sizes := _GRAPH_SIZES.findall(text):
        numbers = [int(size) for size in sizes[-1].split(",") if size.strip()]
        facts["graph_sizes"] = f"{len(numbers)} up to {max(numbers)}" if numbers else "none"
    facts["late_compilations"] = text.count(_LATE_COMPILATION)
    return facts
