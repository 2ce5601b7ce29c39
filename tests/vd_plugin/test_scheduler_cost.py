"""A decode step of four groups of KV blocks costs the scheduler about what one of stock vLLM, with one group, costs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from benchmarks.scheduler_cost import BLOCK_SIZE, KINDS, Decoding

NUM_REQUESTS = 16


@pytest.mark.parametrize("budget", ["full", 160, 320])
def test_the_work_of_a_decode_step_is_close_to_stock(budget: int | str) -> None:
    """Counted in bytecode instructions, over as many steps as a block has tokens; clocks depend on the neighbours."""
    allocating, stepping = {}, {}
    for kind in KINDS:
        decoding = Decoding(kind, NUM_REQUESTS, budget)
        stepping[kind] = sum(_count_instructions(decoding.step) for _ in range(BLOCK_SIZE))
        decoding.settle()
        allocating[kind] = 0
        for _ in range(BLOCK_SIZE):
            allocating[kind] += _count_instructions(decoding.allocate)
            decoding.advance()
    assert min(allocating.values()) > 100 * NUM_REQUESTS * BLOCK_SIZE
    assert allocating["visiondrop"] < 1.5 * allocating["stock"]
    assert stepping["visiondrop"] < 1.1 * stepping["stock"]


def _count_instructions(run: Callable[[], None]) -> int:
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)
    return count
