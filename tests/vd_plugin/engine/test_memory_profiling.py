"""Starts that measure memory with images, as vLLM does on a GPU unless told not to. All other tests leave it out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engines
import pytest
from engines import draw
from staged import LAYERS, assert_same, words
from vllm.platforms import current_platform

from vd_plugin import model

pytestmark = [pytest.mark.engine, pytest.mark.slow]

PROMPT = f"{words(9)} <image> {words(5, 1)}"
LARGEST = 5
"""Tiles of a LLaVA-NeXT image."""


@pytest.mark.parametrize(("default", "rows"), [(None, 2928), (160, 240)], ids=["in full", "default budget"])
def test_the_tower_is_measured_with_the_largest_image(
    random_model: Path, monkeypatch: pytest.MonkeyPatch, default: int | None, rows: int
) -> None:
    """With an engine's default budget, too: it bounds what the decoder gets, not what the tower sees."""
    architecture = model.VisionDropLlavaNextForConditionalGeneration
    embed = architecture.embed_multimodal
    seen: list[tuple[list[int], list[int]]] = []

    def record(self: Any, **kwargs: Any) -> Any:
        made = embed(self, **kwargs)
        seen.append(([len(tiles) for tiles in kwargs["pixel_values"]], [len(each) for each in made]))
        return made

    monkeypatch.setattr(architecture, "embed_multimodal", record)
    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker

        # It measures nothing where the size of the KV cache is given.
        monkeypatch.setattr(CPUWorker, "_should_warm_up_model", lambda self: True)
    budget = {} if default is None else {"mm_processor_kwargs": {"visual_token_budget": default}}
    engine = engines.start(random_model, layers=LAYERS, skip_mm_profiling=False, **budget)
    assert seen == [([LARGEST], [rows])]
    answer = engine.ask(PROMPT, [draw(640, 320)])
    assert_same(engine.ask(PROMPT, [draw(640, 320)], visual_token_budget=default or "full"), answer)
