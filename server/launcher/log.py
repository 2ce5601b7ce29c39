"""Reading the engine's log: what it is doing while it loads, and why it died."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from vd_plugin.wire import ERROR_PREFIX

_TAIL_BYTES: Final = 64 * 1024

# vLLM 0.32's own words, in the order in which they appear.
_ACTIVITIES: Final = (
    (re.compile(r"vLLM API server version|non-default args"), "reading the configuration"),
    (re.compile(r"Initializing a V1 LLM engine|Initializing .*engine"), "starting the engine's processes"),
    (re.compile(r"Starting to load model"), "loading the model"),
    (re.compile(r"[Ll]oading .*checkpoint shards:\s+(?P<progress>\d+%)"), "loading weights"),
    (re.compile(r"Loading weights took|Model loading took"), "preparing the model"),
    (re.compile(r"[Ee]ncoder cache will be initialized|profiled with"), "measuring memory"),
    (re.compile(r"KV cache (?:size|memory)"), "reserving the KV cache"),
    (re.compile(r"torch\.compile|Dynamo bytecode"), "compiling"),
    (re.compile(r"[Cc]aptur\w+ CUDA graphs?[^%]*?(?P<progress>\d+%)?"), "capturing CUDA graphs"),
    (re.compile(r"init engine|[Ww]arming up|Warmup"), "warming up"),
    (re.compile(r"Starting vLLM server|Application startup complete"), "starting the HTTP server"),
)

_EXCEPTION_LINE: Final = re.compile(r"\b(?:\w+\.)*[A-Z]\w*(?:Error|Exception): \S.*")
_USAGE_LINE: Final = re.compile(r"\berror: \S.*")
# vLLM's outermost exceptions only point to the one that counts.
_POINTERS: Final = ("See root cause above", "EngineDeadError", "Failed core proc")
# Of the API server, when its core is gone and nobody had asked it to go (vllm/v1/engine/core_client.py).
_CORE_LOST: Final = ("engine core exited unexpectedly", "EngineDeadError")


def activity(path: Path) -> str:
    """What the engine is doing, by the last line of its log that is known; "starting" before any."""
    for line in reversed(_tail(path)):
        for pattern, words in _ACTIVITIES:
            if match := pattern.search(line):
                progress = match.groupdict().get("progress")
                return f"{words}, {progress}" if progress else words
    return "starting"


def last_words(path: Path) -> str | None:
    """The sentence that the engine left behind for bad input, if it did."""
    lines = [line for line in _tail(path) if line.startswith(ERROR_PREFIX)]
    return lines[-1].removeprefix(ERROR_PREFIX) if lines else None


def last_error(path: Path) -> str | None:
    """The last line that names an exception, as `ValueError: ...`, without the log's prefix."""
    for pattern in (_EXCEPTION_LINE, _USAGE_LINE):
        for line in reversed(_tail(path)):
            match = pattern.search(line)
            if match and not any(pointer in line for pointer in _POINTERS):
                return match.group()
    return None


def has_lost_its_core(path: Path) -> bool:
    """Whether the engine's process that computes ended before the one that writes most of the log."""
    return any(words in line for line in _tail(path) for words in _CORE_LOST)


def _tail(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(file.tell() - _TAIL_BYTES, 0))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    # Progress bars rewrite their line with carriage returns; splitlines takes those as line ends.
    return [line for line in text.splitlines() if line.strip()]
