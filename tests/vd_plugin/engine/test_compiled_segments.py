"""Stages that are compiled, and replayed in pieces, answer as stages that run layer by layer.

vLLM compiles as it would on a GPU: its own backend, split at attention, with recorded pieces (`piecewise.py`). Equal
means equal but for rounding, since compiled norms round otherwise.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engines
import piecewise
import pytest
import torch
from engines import Answer, Engine, draw, request
from piecewise import Piece
from torch._dynamo.utils import counters
from vllm.compilation.counter import compilation_counter

from vd_plugin.stage_graphs import StageGraphs

pytestmark = [pytest.mark.engine, pytest.mark.slow]

LAYERS = (2, 4, 6)
NUM_STAGES = 4
NUM_PIECES = NUM_STAGES * 3
"""Before, between and behind the two attentions of a stage."""
SIZES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 320, 384, 448, 512)
NUM_MIXES = 100
ROUNDING = 1e-4
NUM_TOKENS = 3

BUDGETS = [40, 64, 100, 160, 320, 640, "full"]
IMAGES = [draw(336, 336), draw(672, 672, seed=1), draw(120, 200, seed=2), draw(500, 300, seed=3)]


def mixes(engine: Engine, count: int, seed: int) -> list[list[dict[str, Any]]]:
    """Batches of one to four requests, of which some share their text and some have no image."""
    token = engine.llm.get_tokenizer().decode([engine.llm.llm_engine.model_config.hf_config.image_token_index])
    dice = random.Random(seed)
    made = []
    for _ in range(count):
        batch = []
        for _ in range(dice.randint(1, 4)):
            words = " word" * dice.choice([0, 3, 40, 200])
            if dice.random() < 0.25:
                batch.append(request(f"USER:{words} {dice.randint(0, 9)} ASSISTANT:"))
                continue
            images = [dice.choice(IMAGES) for _ in range(dice.choice([1, 1, 1, 2]))]
            prompt = f"USER:{words} {token * len(images)} {dice.randint(0, 9)} ASSISTANT:"
            batch.append(request(prompt, images, visual_token_budget=[dice.choice(BUDGETS) for _ in images]))
        made.append(batch)
    return made


def answers(engine: Engine, count: int, seed: int = 0) -> list[Answer]:
    return [answer for batch in mixes(engine, count, seed) for answer in engine.generate(*batch, num_tokens=NUM_TOKENS)]


def assert_equal(found: list[Answer], expected: list[Answer]) -> None:
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.token_ids == theirs.token_ids
        assert (mine.logprobs - theirs.logprobs).abs().max() < ROUNDING


@pytest.fixture(scope="module")
def expected(random_model: Path) -> list[Answer]:
    return answers(engines.start(random_model, layers=LAYERS), NUM_MIXES)


@pytest.fixture(scope="module")
def compiled(random_model: Path, expected: list[Answer]) -> Iterator[Engine]:
    counters.clear()
    with compilation_counter.expect(
        num_graphs_seen=NUM_STAGES, num_piecewise_capturable_graphs_seen=NUM_PIECES, num_backend_compilations=NUM_PIECES
    ):
        engine = piecewise.start(random_model, SIZES, layers=LAYERS, backend="eager")
    yield engine
    engines.stop()


def test_a_hundred_mixes_are_answered_as_without_compilation(compiled: Engine, expected: list[Answer]) -> None:
    """From one graph a stage, which no request makes torch compile again."""
    assert counters["stats"]["unique_graphs"] == NUM_STAGES
    assert not counters["graph_break"]
    Piece.replays.clear()
    compiled.forget()
    assert_equal(answers(compiled, NUM_MIXES), expected)
    assert counters["stats"]["unique_graphs"] == NUM_STAGES
    assert len(Piece.all_pieces) == NUM_PIECES
    replays = [Piece.replays[last] for last in range(2, NUM_PIECES, 3)]
    assert {size for size in SIZES if size > 16} < {size for stage in replays for size in stage}
    assert len(replays[0]) < len(replays[-1]), "some steps are too long for a graph at first, and pruned to its size"


@pytest.mark.parametrize("way", ["where it was made", "without room", "of true length"])
def test_pieces_that_read_elsewhere_are_noticed(
    compiled: Engine, expected: list[Answer], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = StageGraphs.run

    def sabotaged(self: StageGraphs, stage: int, segment: Any, positions: Any, inputs: Any, pruned: bool) -> Any:
        if way == "where it was made" and not pruned:
            return segment(positions, *inputs)
        if way == "without room" and pruned:
            monkeypatch.setattr(self, "rooms", [torch.zeros_like(room) for room in self.rooms])
        if way == "of true length" and pruned:
            return segment(positions, *inputs)
        return run(self, stage, segment, positions, inputs, pruned)

    monkeypatch.setattr(StageGraphs, "run", sabotaged)
    compiled.forget()
    with pytest.raises((AssertionError, RuntimeError)):
        assert_equal(answers(compiled, 3), expected)
    abandon(compiled)


def abandon(engine: Engine) -> None:
    """Requests that a failed step has left behind."""
    core = engine.llm.llm_engine
    ids = list(core.output_processor.request_states)
    core.abort_request(ids, internal=True)
    engine.forget()


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler: install g++")
def test_compiled_code_is_kept_for_the_next_start(
    random_model: Path, expected: list[Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every stage its own, although their `forward` is one."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    count = 15
    expected = expected[: sum(len(batch) for batch in mixes(engines._running[1], count, 0))]
    for counts in ({"num_aot_artifacts_saved": NUM_STAGES}, {"num_aot_artifacts_loaded": NUM_STAGES}):
        with compilation_counter.expect(**counts):
            engine = piecewise.start(random_model, SIZES, layers=LAYERS, backend="inductor")
        assert_equal(answers(engine, count), expected)
    engines.stop()
