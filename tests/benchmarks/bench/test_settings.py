"""Prompts of the limit, and KV caches of the same bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.bench import throughput
from benchmarks.bench.prefill import SPEEDUPS
from benchmarks.bench.settings import OURS, STOCK, Settings
from benchmarks.seven_b import SEVEN_B
from vd_plugin.kv_capacity import KVCapacity
from vd_plugin.schedule import FULL


@pytest.fixture
def settings(random_model: Path) -> Settings:
    return Settings(random_model, SEVEN_B, "bfloat16", "dummy", eager=True, on_gpu=False)


@pytest.mark.parametrize("budget", SPEEDUPS)
def test_the_limit_is_a_text_of_what_a_layer_holds_on_average(settings: Settings, budget: int) -> None:
    rows = settings.schedule(budget).rows
    held = sum(rows) / len(rows)  # every stage has as many layers
    assert settings.limit_tokens(budget) == pytest.approx(settings.text_tokens + held, abs=1)
    assert settings.limit_tokens(budget) < settings.limit_tokens(FULL)


@pytest.mark.parametrize("stock_blocks", [25, 51])
def test_both_engines_get_the_same_bytes_of_kv_cache(settings: Settings, stock_blocks: int) -> None:
    sizes = {kind: settings.blocks_of(kind, stock_blocks) * settings.bytes_per_block(kind) for kind in (STOCK, OURS)}
    assert sizes[OURS] == sizes[STOCK]
    # Keys and values of 128 rows in 32 layers of 32 heads of 128 numbers of 2 bytes.
    assert sizes[STOCK] == stock_blocks * 128 * 32 * 2 * 32 * 128 * 2
    assert settings.blocks_of(OURS, stock_blocks) == KVCapacity.of_memory(SEVEN_B, sizes[OURS], 128, 2).num_blocks


@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_small_kv_cache_holds_two_images_in_full_and_no_third(settings: Settings, on_gpu: bool) -> None:
    settings = replace(settings, on_gpu=on_gpu)
    arguments = throughput.starts(settings)[STOCK].arguments
    request = settings.schedule(FULL).num_placeholders + settings.text_tokens + throughput.NUM_TOKENS
    blocks = -(-request // arguments["block_size"])
    assert arguments["num_gpu_blocks_override"] - 1 == 2 * blocks
    assert arguments["max_model_len"] >= request


def test_both_engines_have_the_same_options_but_the_plugins_own(settings: Settings) -> None:
    starts = settings.starts(stock_blocks=25)
    stock, ours = (dict(starts[kind].arguments) for kind in (STOCK, OURS))
    overrides = ours.pop("hf_overrides")
    assert overrides["visiondrop"] == {"layers": [8, 16, 24]}
    assert ours.pop("num_gpu_blocks_override") == 4 * stock.pop("num_gpu_blocks_override")
    assert ours == stock
