"""Positions, lengths and slots of a step at every stage: the torch expression and the GPU kernel against loops."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("vllm")
from vllm.platforms import current_platform
from vllm.v1.attention.backends.utils import PAD_SLOT_ID

from vd_plugin.row_layout import PAD_SLOT, StageBuffers, StageGroup, StepRows, lay_out_rows
from vd_plugin.row_layout_kernel import RowLayoutKernel

pytestmark = pytest.mark.engine

MAX_REQS, MAX_TOKENS, MAX_LENGTH = 6, 1200, 1300
STALE = 7777
"""What the step before has left everywhere."""

DEVICE = current_platform.device_type


@dataclass(frozen=True)
class Case:
    """Lists are by request, or by stage and request."""

    computed: list[int]
    lengths: list[int]
    drops: list[list[int]]
    gone: list[list[int]]
    """Rows that this step prunes."""
    prunes: bool
    block_sizes: list[list[int]]
    """By stage, of its groups."""
    num_padding: int

    @property
    def num_reqs(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def rows(self, stage: int) -> list[int]:
        return [length - gone for length, gone in zip(self.lengths, self.gone[stage], strict=True)]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_reqs = draw(st.integers(1, MAX_REQS))
    is_decode = draw(st.booleans())
    # Beside one-token requests: chunks within a block, over several, and longer than a program's block of 1024.
    lengths = [1 if is_decode else draw(st.sampled_from([1, 2, 15, 16, 17, 40, 90])) for _ in range(num_reqs)]
    if not is_decode and draw(st.booleans()):
        lengths[draw(st.integers(0, num_reqs - 1))] = draw(
            st.sampled_from([600, 1024, 1025]) if num_reqs == 1 else st.just(500)
        )
    computed = [draw(st.integers(0, 200)) for _ in lengths]
    num_stages = draw(st.integers(1, 3))
    prunes = not is_decode and draw(st.booleans())
    drops = [[draw(st.integers(0, before)) for before in computed] for _ in range(num_stages)]
    gone = [[draw(st.integers(0, length - 1)) if prunes else 0 for length in lengths] for _ in range(num_stages)]
    sizes = st.lists(st.sampled_from([1, 16, 32, 48]), min_size=1, max_size=2)
    block_sizes = [draw(sizes) for _ in range(num_stages)]
    return Case(computed, lengths, drops, gone, prunes, block_sizes, draw(st.integers(0, 9)))


def tensor(values: object, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def starts_of(lengths: list[int]) -> list[int]:
    return [sum(lengths[:number]) for number in range(len(lengths) + 1)]


@dataclass(frozen=True)
class Memory:
    """A step's inputs, and where its layout is written. Slots of requests are in another order than the batch."""

    rows: StepRows
    drops: Tensor
    groups: list[StageGroup]
    buffers: StageBuffers
    slot_mappings: Tensor


def prepare(case: Case) -> Memory:
    num_stages, padded = len(case.drops), case.num_tokens + case.num_padding
    order = list(range(MAX_REQS))[::-1][: case.num_reqs]
    drops = torch.full((num_stages, MAX_REQS), STALE, dtype=torch.int32)
    drops[:, order] = torch.tensor(case.drops, dtype=torch.int32)
    groups = []
    for stage, sizes in enumerate(case.block_sizes, start=1):
        for block_size in sizes:
            table = torch.randint(1, 10**6, (MAX_REQS, -(-MAX_LENGTH // block_size)), dtype=torch.int32)
            # Group 0 is of stage 0; between the others lies one that is not ours.
            groups.append(StageGroup(stage, 1 + 2 * len(groups), block_size, table.to(DEVICE)))
    slot_mappings = torch.full((2 * len(groups) + 1, padded), STALE, dtype=torch.int64, device=DEVICE)
    slot_mappings[:, case.num_tokens :] = PAD_SLOT  # as vLLM's runner leaves them
    positions = [first + place for first, n in zip(case.computed, case.lengths, strict=True) for place in range(n)]
    row_starts = [starts_of(case.rows(stage)) for stage in range(num_stages)]
    return Memory(
        StepRows(
            tensor(order, torch.int64),
            tensor(starts_of(case.lengths) + [case.num_tokens] * 2),  # padded as for a graph
            tensor(positions + [STALE] * case.num_padding, torch.int64),
            [starts[-1] for starts in row_starts],
            tensor(row_starts) if case.prunes else None,
        ),
        drops.to(DEVICE),
        groups,
        StageBuffers(
            torch.full((num_stages, MAX_TOKENS), STALE, dtype=torch.int64, device=DEVICE),
            torch.full((num_stages, MAX_REQS), STALE, dtype=torch.int32, device=DEVICE),
        ),
        slot_mappings,
    )


def check(case: Case, memory: Memory) -> None:
    padded = case.num_tokens + case.num_padding
    positions, seq_lens = memory.buffers.positions.tolist(), memory.buffers.seq_lens.tolist()
    slots, tables = memory.slot_mappings.tolist(), [group.block_table.tolist() for group in memory.groups]
    ours = {group.group for group in memory.groups}
    assert all(set(row[: case.num_tokens]) == {STALE} for number, row in enumerate(slots) if number not in ours)
    for stage in range(len(case.drops)):
        expected, owners = [], []
        for request, count in enumerate(case.rows(stage)):
            first = case.computed[request] - case.drops[stage][request]
            assert seq_lens[stage][request] == first + count
            expected += range(first, first + count)
            owners += [request] * count
        behind = padded - len(expected)
        assert positions[stage] == expected + [0] * behind + [STALE] * (MAX_TOKENS - padded)
        assert seq_lens[stage][case.num_reqs :] == [0] * (MAX_REQS - case.num_reqs)
        for group, table in zip(memory.groups, tables, strict=True):
            if group.stage == stage + 1:
                size = group.block_size
                found = [table[r][p // size] * size + p % size for r, p in zip(owners, expected, strict=True)]
                assert slots[group.group] == found + [PAD_SLOT] * behind


def run_torch(memory: Memory) -> None:
    lay_out_rows(memory.groups, memory.rows, memory.drops, memory.buffers, memory.slot_mappings)


def run_kernel(memory: Memory) -> None:
    kernel = RowLayoutKernel(memory.groups, torch.device(DEVICE))
    kernel(memory.rows, memory.drops, memory.buffers, memory.slot_mappings)


LONG = Case([3], [1025], [[3], [0]], [[0], [0]], False, [[16], [48, 1]], 3)
LONG_PRUNED = Case([0, 9], [1100, 1], [[0, 4]], [[60, 0]], True, [[16]], 2)


@pytest.mark.parametrize("run", [run_torch, run_kernel], ids=["torch", "kernel"])
@settings(max_examples=60)
@example(LONG)
@example(LONG_PRUNED)
@given(case=cases())
def test_every_row_is_where_a_loop_puts_it(run: Callable[[Memory], None], case: Case) -> None:
    memory = prepare(case)
    run(memory)
    check(case, memory)


def test_padding_is_named_as_by_vllm() -> None:
    assert PAD_SLOT == PAD_SLOT_ID


COMPILE = """
import sys
import types

import triton
import triton.language
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# vLLM gives stand-ins where there is no GPU.
sys.modules["vllm.triton_utils"] = types.SimpleNamespace(tl=triton.language, triton=triton)
from vd_plugin.row_layout_kernel import _lay_out_rows_kernel as kernel

wide = {"idx_mapping", "step_positions", "block_table_strides", "positions", "slot_mappings"}
types_of = {"block_table_pointers": "*u64", "num_padded": "i32", "PAD_SLOT": "constexpr", "BLOCK": "constexpr"}
for name in kernel.arg_names:
    if name not in types_of:
        pointer = "*i64" if name in wide else "*i32"
        types_of[name] = "i32" if name.endswith("_stride") else pointer
signature = {name: types_of[name] for name in kernel.arg_names}
for capability in (80, 89, 90):
    source = ASTSource(kernel, signature, {"PAD_SLOT": -1, "BLOCK": 1024})
    assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
print("compiled")
"""


@pytest.mark.slow
def test_the_kernel_compiles_for_gpus(tmp_path: Path) -> None:
    """For A100, L40 and H100, without one: here the interpreter runs it, which takes more than the compiler does."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment = {**clean, "VISIONDROP_CPU": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.endswith("compiled\n")
