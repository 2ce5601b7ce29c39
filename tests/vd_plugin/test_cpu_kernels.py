"""What replaces vLLM's kernels on a CPU leaves the bytes in memory that the kernels leave in Triton's interpreter."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
import vllm  # noqa: F401  # which asks for the interpreter
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime.interpreter import GridExecutor, InterpretedFunction
from vllm.v1.worker.cpu.buffer_utils import UvaBuffer
from vllm.v1.worker.gpu import buffer_utils
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor
from vllm.v1.worker.gpu.input_batch import (
    combine_sampled_and_draft_tokens,
    get_num_sampled_and_rejected,
    post_update,
    prepare_pos_seq_lens,
    prepare_prefill_inputs,
)
from vllm.v1.worker.gpu.sample.gumbel import _gumbel_sample_kernel, apply_temperature, gumbel_sample
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.structured_outputs import _apply_grammar_bitmask_kernel

from vd_plugin.cpu import interpreter, kernels

CPU = torch.device("cpu")
SEEDS = st.integers(0, 2**32 - 1)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
FEW = settings(max_examples=40)


@pytest.fixture(scope="module", autouse=True)
def _worker_of_a_cpu() -> Iterator[None]:
    """What the plugin and vLLM's CPU worker patch."""
    interpreter.patch_masked_store()
    kernels.replace_kernels()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buffer_utils, "UvaBuffer", UvaBuffer)
        yield


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """The kernels themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "REPLACEMENTS", {})
        yield


@contextlib.contextmanager
def never_interpreted() -> Iterator[None]:
    def refuse(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"{self.fn.__name__} was interpreted")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", refuse)
        yield


def assert_same_bytes(run: Callable[[], Sequence[Tensor]]) -> None:
    """`run` makes its inputs anew, launches kernels, and returns all the memory that they might write."""
    with interpreted():
        expected = run()
    with never_interpreted():
        found = run()
    for one, other in zip(found, expected, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        same = one.contiguous().view(torch.uint8) == other.contiguous().view(torch.uint8)
        assert bool(same.all()), f"{one} is not {other}"


def stale(random: np.random.Generator, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.from_numpy(random.integers(-999, -99, shape)).to(dtype)


def slots_of_step(random: np.random.Generator, num_reqs: int, max_num_reqs: int) -> Tensor:
    return torch.from_numpy(random.permutation(max_num_reqs)[:num_reqs])


@FEW
@given(
    seed=SEEDS,
    block_sizes=st.lists(st.sampled_from([8, 16, 32, 128]), min_size=1, max_size=4),
    max_num_reqs=st.integers(1, 5),
    data=st.data(),
)
def test_block_tables_and_slots(seed: int, block_sizes: list[int], max_num_reqs: int, data: st.DataObject) -> None:
    """Appended and overwritten blocks, requests without blocks, slots of none, groups switched off, padding."""
    num_reqs = data.draw(st.integers(0, max_num_reqs))
    num_padded = data.draw(st.integers(max(num_reqs, 1), max_num_reqs))
    room = data.draw(st.integers(0, 20))

    def run() -> list[Tensor]:
        random = np.random.default_rng(seed)
        widths = [int(random.integers(1, 1100 if block_sizes[0] == 8 else 40)) for _ in block_sizes]
        lengths = random.integers(0, 30, num_reqs) * (random.random(num_reqs) < 0.8)
        num_tokens = int(lengths.sum())
        enabled = (random.random(len(block_sizes)) < 0.8).tolist()
        tables = BlockTables(block_sizes, max_num_reqs, num_tokens + room, widths, CPU, slot_mapping_enabled=enabled)
        for table, gathered in zip(tables.block_tables, tables.input_block_tables, strict=True):
            table.gpu.copy_(torch.from_numpy(random.integers(0, 500, table.gpu.shape)))
            gathered.copy_(stale(random, *gathered.shape))
        tables.slot_mappings.copy_(stale(random, *tables.slot_mappings.shape))
        for _ in range(2):
            for slot in random.permutation(max_num_reqs)[: int(random.integers(0, max_num_reqs + 1))].tolist():
                held = tables.num_blocks.np[:, slot]
                overwrite = bool(random.integers(0, 2))
                free = [width - (0 if overwrite else int(n)) for width, n in zip(widths, held, strict=True)]
                blocks = [random.integers(0, 500, int(random.integers(0, n + 1))).tolist() for n in free]
                tables.append_block_ids(slot, tuple(blocks), overwrite)
            tables.apply_staged_writes()
        slots = slots_of_step(random, num_reqs, max_num_reqs)
        gathered = tables.gather_block_tables(slots, num_padded)
        starts = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
        shortest = min(size * width for size, width in zip(block_sizes, widths, strict=True))
        positions = torch.from_numpy(random.integers(0, shortest, num_tokens + room))
        slots[torch.from_numpy(random.random(num_reqs) < 0.3)] = -1
        mappings = tables.compute_slot_mappings(slots, starts, positions, num_tokens)
        return [*gathered, mappings, tables.slot_mappings, *tables.input_block_tables] + [
            table.gpu for table in tables.block_tables
        ]

    assert_same_bytes(run)


@FEW
@given(seed=SEEDS, dtype=st.sampled_from([torch.int32, torch.int64, torch.float32]), columns=st.integers(0, 1200))
def test_staged_writes(seed: int, dtype: torch.dtype, columns: int) -> None:
    """Writes that overlap, to a table or to one number a request (no columns)."""

    def run() -> list[Tensor]:
        random = np.random.default_rng(seed)
        size = (4, columns) if columns else 4
        staged = StagedWriteTensor(size, dtype, CPU)
        staged.gpu.copy_(stale(random, *staged.gpu.shape))
        for _ in range(int(random.integers(0, 5))):
            row = int(random.integers(0, 4))
            if columns:
                start = int(random.integers(0, columns))
                staged.stage_write(
                    row, start, random.integers(0, 999, int(random.integers(0, columns - start + 1))).tolist()
                )
            else:
                staged.stage_write_elem(row, int(random.integers(0, 999)))
        staged.apply_write()
        return [staged.gpu]

    assert_same_bytes(run)


@FEW
@given(
    seed=SEEDS,
    num_reqs=st.integers(1, 5),
    spare=st.integers(0, 3),
    lookahead=st.integers(1, 3),
    counted=st.booleans(),
    skipped=st.booleans(),
)
def test_a_step_of_prompts_and_decodes(
    seed: int, num_reqs: int, spare: int, lookahead: int, counted: bool, skipped: bool
) -> None:
    """Inputs of the step, and the state after it: whole prompts, chunks, resumed requests, decodes, slots of none."""

    def run() -> list[Tensor]:
        random = np.random.default_rng(seed)
        max_num_reqs, max_len = num_reqs + spare, 1200
        slots = slots_of_step(random, num_reqs, max_num_reqs)
        prefill_lens = random.integers(1, 1100, max_num_reqs)
        computed = np.where(random.random(max_num_reqs) < 0.5, prefill_lens + random.integers(0, 4, max_num_reqs), 0)
        computed = np.where(random.random(max_num_reqs) < 0.3, random.integers(0, prefill_lens), computed)
        lengths = np.where(
            computed < prefill_lens, random.integers(1, prefill_lens - computed.clip(max=prefill_lens - 1) + 1), 1
        )
        lengths = lengths[slots.numpy()]
        num_tokens = int(lengths.sum())
        starts = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
        prefill_len = torch.from_numpy(prefill_lens).to(torch.int32)
        num_computed = torch.from_numpy(computed).to(torch.int32)
        all_token_ids = torch.from_numpy(random.integers(0, 500, (max_num_reqs, max_len))).to(torch.int32)
        total_len = torch.maximum(prefill_len, num_computed + 1)
        last_sampled = torch.from_numpy(random.integers(0, 500, (max_num_reqs, 1)))
        input_ids, positions = stale(random, num_tokens + 9), stale(random, num_tokens + 9, dtype=torch.int64)
        upcoming, seq_lens = stale(random, lookahead, max_num_reqs), stale(random, max_num_reqs)
        counts = stale(random, max_num_reqs, 500) if counted else None

        prepare_prefill_inputs(input_ids, upcoming, slots, starts, all_token_ids, prefill_len, num_computed)
        prepare_pos_seq_lens(slots, starts, num_computed, positions, seq_lens)
        cu_num_logits = torch.arange(num_reqs + 1, dtype=torch.int32)
        drafts = torch.zeros(max_num_reqs, 0, dtype=torch.int64)
        rows = combine_sampled_and_draft_tokens(
            input_ids, slots, last_sampled, starts, seq_lens, prefill_len, drafts, cu_num_logits, num_reqs
        )
        num_sampled, none_rejected = get_num_sampled_and_rejected(
            seq_lens.new_ones(num_reqs), seq_lens, cu_num_logits, slots, prefill_len
        )
        sampled = torch.from_numpy(random.integers(0, 500, (num_reqs, 1)))
        num_rejected = torch.from_numpy(random.integers(0, 2, num_reqs)).to(torch.int32)
        if skipped:
            slots[int(random.integers(0, num_reqs))] = -1
        query_starts = None if skipped and counted else starts
        post_update(
            slots,
            num_computed,
            last_sampled,
            counts,
            sampled,
            num_sampled,
            num_rejected,
            query_starts,
            all_token_ids,
            total_len,
        )
        state = [
            num_computed,
            last_sampled,
            all_token_ids,
            total_len,
            prefill_len,
            *([counts] if counts is not None else []),
        ]
        return [input_ids, positions, upcoming, seq_lens, rows, num_sampled, none_rejected, *state]

    assert_same_bytes(run)


def draw_logits(random: np.random.Generator, rows: int, vocab_size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """With ties, sometimes all equal, and with words that are forbidden, though never all of a row."""
    logits = torch.from_numpy(random.normal(0, 8, (rows, vocab_size)))
    logits = (logits * random.choice([0, 1])).round(decimals=int(random.integers(0, 6)))
    logits[torch.from_numpy(random.random(logits.shape) < random.choice([0, 0.5]))] = -torch.inf
    logits[:, int(random.integers(0, vocab_size))] = 1.0
    return logits.to(dtype) + 0.0  # no -0.0: which of two zeros is the largest depends on who searches


LOGITS = {"seed": SEEDS, "rows": st.integers(1, 4), "vocab_size": st.integers(1, 40) | st.integers(1000, 2600)}


@FEW
@given(**LOGITS, dtype=DTYPES)
def test_sampling(seed: int, rows: int, vocab_size: int, dtype: torch.dtype) -> None:
    """Greedy and sampled rows together, and rows of no request."""

    def run() -> list[Tensor]:
        random = np.random.default_rng(seed)
        logits = draw_logits(random, rows, vocab_size, dtype)
        slots = slots_of_step(random, rows, rows + 2)
        slots[torch.from_numpy(random.random(rows) < 0.2)] = -1
        temperature = torch.from_numpy(random.choice([0, 0.3, 1, 1.7], rows + 2)).float()
        seeds = torch.from_numpy(random.integers(-(2**63), 2**63 - 1, rows + 2))
        positions = torch.from_numpy(random.integers(0, 9000, rows))
        words = gumbel_sample(logits, slots, temperature, seeds, positions, False, False)
        # And the noise to the last bit, which seldom decides about a word.
        num_blocks = -(-vocab_size // 1024)
        best, value = torch.zeros(rows, num_blocks, dtype=torch.int64), torch.zeros(rows, num_blocks)
        arguments = (best, num_blocks, value, num_blocks, None, 0, 0, None, None, 0, logits, vocab_size, slots, seeds)
        _gumbel_sample_kernel[(rows, num_blocks)](
            *arguments, positions, temperature, vocab_size, 1024, False, False, False, False
        )
        return [words, best, value, logits]

    assert_same_bytes(run)


@FEW
@given(**LOGITS)
def test_temperatures(seed: int, rows: int, vocab_size: int) -> None:
    def run() -> list[Tensor]:
        random = np.random.default_rng(seed)
        logits = draw_logits(random, rows, vocab_size)
        temperature = torch.from_numpy(random.choice([0, 0.3, 1, 1.7], rows + 2)).float()
        apply_temperature(logits, slots_of_step(random, rows, rows + 2), temperature)
        return [logits]

    assert_same_bytes(run)


@FEW
@given(**LOGITS, num_logprobs=st.integers(0, 1100))
def test_log_probabilities(seed: int, rows: int, vocab_size: int, num_logprobs: int) -> None:
    assert_same_bytes(lambda: log_probabilities(seed, rows, vocab_size, num_logprobs))


@FEW
@given(**LOGITS, dtype=DTYPES)
def test_log_probabilities_in_half_precision(seed: int, rows: int, vocab_size: int, dtype: torch.dtype) -> None:
    """They are those of the same logits in float32. (The interpreter compares bfloat16 by bits, and ranks wrongly.)"""
    found = log_probabilities(seed, rows, vocab_size, 0, dtype)
    with interpreted():
        expected = log_probabilities(seed, rows, vocab_size, 0, dtype, as_float=True)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def log_probabilities(
    seed: int, rows: int, vocab_size: int, number: int, dtype: torch.dtype = torch.float32, as_float: bool = False
) -> list[Tensor]:
    random = np.random.default_rng(seed)
    logits = draw_logits(random, rows, vocab_size, dtype)
    logits = logits.float() if as_float else logits
    sampled = torch.from_numpy(random.integers(0, vocab_size, rows))
    scores = compute_topk_scores(logits, min(number, vocab_size), sampled)
    return [scores.logprobs, scores.logprob_token_ids, scores.selected_token_ranks]


@FEW
@given(**LOGITS, dtype=DTYPES)
def test_grammars(seed: int, rows: int, vocab_size: int, dtype: torch.dtype) -> None:
    """Some requests have a grammar, with one or two rows each, and one more that has no logits."""

    def run() -> list[Tensor]:
        random = np.random.default_rng(seed)
        cu_num_logits = torch.tensor([0, *np.cumsum(random.integers(1, 3, rows))], dtype=torch.int32)
        logits = draw_logits(random, int(cu_num_logits[-1]), vocab_size, dtype)
        words = -(-vocab_size // 32)
        mapping = torch.from_numpy(random.permutation(rows * 2)[: int(random.integers(1, rows * 2 + 1))]).to(
            torch.int32
        )
        bitmask = torch.from_numpy(random.integers(-(2**31), 2**31, (len(mapping), words))).to(torch.int32)
        grid = (len(mapping), -(-vocab_size // 8192))
        _apply_grammar_bitmask_kernel[grid](
            logits, logits.stride(0), mapping, cu_num_logits, bitmask, words, vocab_size, MASK_STRIDE=2, BLOCK_SIZE=8192
        )
        return [logits]

    assert_same_bytes(run)


def test_all_kernels_exist() -> None:
    """Else the interpreter would run them, unnoticed."""
    for module, name in kernels.REPLACEMENTS:
        assert getattr(import_module(module), name).fn.__module__ == module


def test_what_a_replacement_leaves_to_the_interpreter_runs_there() -> None:
    """Sampling in float64 has no replacement."""
    logits, seeds = torch.randn(2, 40), torch.tensor([1, 2])
    arguments = (torch.arange(2), torch.ones(2), seeds, seeds, False, False)
    found = gumbel_sample(logits, *arguments, use_fp64=True)
    with interpreted():
        assert torch.equal(gumbel_sample(logits, *arguments, use_fp64=True), found)
    with never_interpreted(), pytest.raises(AssertionError, match="interpreted"):
        gumbel_sample(logits, *arguments, use_fp64=True)


def test_a_kernel_that_has_changed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gumbel_sample_kernel, "arg_names", ["logits"])
    with pytest.raises(RuntimeError, match="vLLM has changed"):
        gumbel_sample(torch.randn(1, 9), torch.arange(1), torch.ones(1), torch.arange(1), torch.arange(1), False, False)


def test_an_interpreter_that_has_changed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InterpretedFunction, "run", lambda self, grid: None)
    with pytest.raises(RuntimeError, match="interpreter has changed"):
        kernels.replace_kernels()


@pytest.mark.parametrize(("backend", "is_replaced"), [("cuda", False), ("cpu", True)])
def test_kernels_are_replaced_once_and_on_a_cpu_alone(
    monkeypatch: pytest.MonkeyPatch, backend: str, is_replaced: bool
) -> None:
    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None: ...

    monkeypatch.setattr(InterpretedFunction, "run", run)
    monkeypatch.setenv("TRITON_DEFAULT_BACKEND", backend)
    kernels.replace_kernels()
    once = InterpretedFunction.run
    assert (once is not run) is is_replaced
    kernels.replace_kernels()
    assert InterpretedFunction.run is once
