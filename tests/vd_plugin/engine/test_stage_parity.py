"""Pruning inside the decoder, through vLLM, against the authors' recorded run and against the plain reference.

Plans are compared at every stage, and the log-probabilities of the whole vocabulary at every step of the answer.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import engines
import golden
import pytest
import torch
from engines import Answer, Engine, draw
from golden import Case
from inplace_norm import norms_in_place
from PIL import Image as Pillow
from reference import Image, Reference, Result
from staged import LAYERS, SeenPlan, observed, rows_of

from vd_plugin.spans import ImageSpan

pytestmark = [pytest.mark.engine, pytest.mark.slow, engines.float32_only]

TOLERANCE = 1e-3
"""Of log-probabilities. Seen at most: 5e-5 against the reference, which gets the engine's own pixels; against the
release 4e-5 with LLaVA-1.5, 5e-4 with LLaVA-NeXT, whose images are resized (torchvision here, PIL there)."""

CASES = [case for case in golden.cases() if not case.is_named(golden.BASE_VIEW)]
STEPS = 8

PROMPTS: dict[str, tuple[str, list[tuple[int, int]]]] = {
    "between": ("USER: Look. <image>\nWhat is it? ASSISTANT:", [(640, 320)]),
    "first": ("<image>What is it?", [(336, 672)]),
    "last": ("What is it?<image>", [(640, 320)]),
    "two turns": ("USER: <image>\nWhat? ASSISTANT: It is. USER: And <image>\n? ASSISTANT:", [(640, 320), (300, 400)]),
    "side by side": ("USER: <image><image>", [(320, 640), (640, 320)]),
    "text": ("USER: What is it? ASSISTANT:", []),
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "budget 64": {"visual_token_budget": 64},
    "budget 160": {"visual_token_budget": 160},
    "nothing merged": {"visual_token_schedule": [[60, 0], [50, 0], [40, 0], [20, 0]]},
    "all merged": {"visual_token_schedule": [[50, 10], [0, 40], [0, 20], [0, 5]]},
    "stages that do nothing": {"visual_token_schedule": [[60, 0], [40, 20], [45, 0], [1, 1]]},
}


@pytest.fixture(scope="module", params=sorted({case.model_dir for case in CASES}), ids=lambda path: path.parent.name)
def recorded(request: pytest.FixtureRequest) -> tuple[Path, Engine]:
    layers = next(case.boundaries for case in CASES if case.model_dir == request.param)
    return request.param, engines.start(request.param, layers=layers)


@pytest.fixture(scope="module", params=["random_model", "llava15"])
def built(request: pytest.FixtureRequest) -> tuple[Path, Engine]:
    folder = request.getfixturevalue(request.param)
    return folder, engines.start(folder, layers=LAYERS)


@golden.requires_golden
def test_plans_and_answers_equal_the_release(recorded: tuple[Path, Engine], subtests: pytest.Subtests) -> None:
    folder, engine = recorded
    for case in (case for case in CASES if case.model_dir == folder):
        with subtests.test(case.name):
            answer, plans = _answer_case(engine, case)
            _assert_plans_equal_the_release(plans, case)
            if not case.is_named(golden.TWO_IMAGES):
                assert answer.token_ids == case["gen_ids"].tolist()
                assert _error(answer, torch.log_softmax(case["step_logits"], dim=-1)) < TOLERANCE


@golden.requires_golden
def test_both_images_of_the_two_image_case_are_pruned_as_by_the_reference(
    recorded: tuple[Path, Engine], subtests: pytest.Subtests
) -> None:
    """The release prunes the first alone. All other cases too, by the way: the oracle itself is judged."""
    folder, engine = recorded
    for case in (case for case in CASES if case.model_dir == folder and case.has_image):
        with subtests.test(case.name):
            answer, plans = _answer_case(engine, case)
            kept = [(case.encoder, case.decoder)] * 2
            expected = _expect(folder, case.prompt, _pictures(case), kept, case.boundaries)
            _assert_plans_equal_the_reference(plans, expected)
            assert answer.token_ids == expected.token_ids
            assert _error(answer, expected.logprobs) < TOLERANCE


@pytest.mark.parametrize(
    ("prompt", "schedule"),
    [*((prompt, "budget 64") for prompt in PROMPTS), *(("two turns", name) for name in list(SCHEDULES)[1:])],
)
def test_plans_and_answers_equal_the_reference(built: tuple[Path, Engine], prompt: str, schedule: str) -> None:
    folder, engine = built
    text, sizes = PROMPTS[prompt]
    pictures = [draw(*size, seed=seed) for seed, size in enumerate(sizes)]
    with observed(engine) as plans:
        answer = engine.ask(text, pictures, num_tokens=STEPS, **SCHEDULES[schedule] if pictures else {})
    asked = SCHEDULES[schedule]
    if "visual_token_schedule" in asked:
        encoder, *decoder = [tuple(pair) for pair in asked["visual_token_schedule"]]
        kept = [(encoder, decoder) for _ in pictures]
    else:
        kept = [_of_budget(engine, asked["visual_token_budget"], picture) for picture in pictures]
    expected = _expect(folder, text, pictures, kept, LAYERS)
    _assert_plans_equal_the_reference(plans, expected)
    assert answer.token_ids == expected.token_ids
    assert _error(answer, expected.logprobs) < TOLERANCE


def test_norms_may_overwrite_what_they_are_given(built: tuple[Path, Engine]) -> None:
    """As a GPU's do."""
    with norms_in_place(built[1]):
        test_plans_and_answers_equal_the_reference(built, "two turns", "budget 64")


@pytest.mark.parametrize("budgets", [[64, 160], [160, "full"], ["full", 64]], ids=str)
def test_each_image_is_pruned_by_its_own_schedule(built: tuple[Path, Engine], budgets: list[Any]) -> None:
    folder, engine = built
    text, sizes = PROMPTS["two turns"]
    pictures = [draw(*size, seed=seed) for seed, size in enumerate(sizes)]
    with observed(engine) as plans:
        answer = engine.ask(text, pictures, num_tokens=STEPS, visual_token_budget=budgets)
    kept = [_of_budget(engine, budget, picture) for budget, picture in zip(budgets, pictures, strict=True)]
    expected = _expect(folder, text, pictures, kept, LAYERS)
    _assert_plans_equal_the_reference(plans, expected)
    assert answer.token_ids == expected.token_ids
    assert _error(answer, expected.logprobs) < TOLERANCE


def test_what_is_kept_changes_the_answer(built: tuple[Path, Engine]) -> None:
    """Else a selection by anything would pass. One stage differs, by three rows of many."""
    _, engine = built
    text, _ = PROMPTS["between"]
    splits = SCHEDULES["nothing merged"]["visual_token_schedule"]
    one = engine.ask(text, [draw(640, 320)], visual_token_schedule=splits)
    other = engine.ask(text, [draw(640, 320)], visual_token_schedule=[*splits[:3], [17, 3]])
    assert _error(one, other.logprobs) > 10 * TOLERANCE


def _answer_case(engine: Engine, case: Case) -> tuple[Answer, list[SeenPlan]]:
    engine.forget()
    pictures = _pictures(case)
    asked = {"visual_token_schedule": [list(case.encoder), *map(list, case.decoder)]} if pictures else {}
    with observed(engine) as plans:
        answer = engine.ask(case.prompt, pictures, num_tokens=STEPS, **asked)
    return answer, plans


def _assert_plans_equal_the_release(plans: list[SeenPlan], case: Case) -> None:
    first = [seen for seen in plans if seen.span == plans[0].span]
    assert [seen.stage for seen in first] == ([1, 2, 3] if case.has_image else [])
    for seen in first:
        prefix = f"s{seen.stage}"
        assert seen.plan.kept.tolist() == case[f"{prefix}_keep_sorted"].tolist()
        assert seen.plan.anchors.tolist() == case[f"{prefix}_target_abs"].tolist()
        assert seen.plan.donors.tolist() == case[f"{prefix}_merge_abs"].tolist()
        assert seen.plan.owners.tolist() == case[f"{prefix}_assign"].tolist()
        torch.testing.assert_close(seen.scores, case[f"{prefix}_score"], atol=1e-5, rtol=1e-3)


def _assert_plans_equal_the_reference(plans: list[SeenPlan], expected: Result) -> None:
    spans: list[ImageSpan] = []
    for seen in plans:
        if seen.span not in spans:
            spans.append(seen.span)
    spans.sort(key=lambda span: span.offset)
    pruned = sorted({image for _, image in expected.stages})
    assert len(spans) == len(pruned)
    found = {(seen.stage, pruned[spans.index(seen.span)]): seen for seen in plans}
    assert len(found) == len(plans)
    assert set(found) == set(expected.stages)
    for key, record in expected.stages.items():
        torch.testing.assert_close(found[key].scores, record.scores, atol=1e-5, rtol=1e-3)
        plan = rows_of(found[key].plan)
        if not plan["anchors"]:
            plan["owners"] = []  # what is dropped has no owner: any number will do
        assert plan == record.plan._asdict(), key


def _expect(folder: Path, prompt: str, pictures: list[Any], kept: list[Any], boundaries: list[int]) -> Result:
    reference = _reference(folder)
    images = []
    for picture, (encoder, decoder) in zip(pictures, kept, strict=False):
        pixels = _image_processor(folder)(picture, return_tensors="pt")["pixel_values"]
        tiles = pixels.reshape(-1, *pixels.shape[-3:])
        images.append(Image(tiles, (picture.height, picture.width), encoder, decoder))
    return reference.generate(reference.tokenize(prompt), images, boundaries, num_tokens=STEPS)


def _of_budget(engine: Engine, budget: Any, picture: Pillow.Image) -> tuple[Any, Any]:
    """What each stage keeps, by the rule that schedule.py owns (and has its own tests)."""
    from vd_plugin.options import read_geometry
    from vd_plugin.schedule import resolve

    geometry = read_geometry(engine.llm.model_config.hf_config)
    schedule = resolve(geometry, picture.height, picture.width, budget)
    assert all(schedule.decoder) is not schedule.is_full
    return schedule.encoder, schedule.decoder


def _error(answer: Answer, expected: torch.Tensor) -> float:
    error = float((answer.logprobs - expected).abs().max())
    print(f"largest difference of log-probabilities: {error:.1e}")
    return error


def _pictures(case: Case) -> list[Pillow.Image]:
    return [Pillow.fromarray(case.arrays[key]) for key in sorted(case.arrays) if key.startswith("image_u8")]


@cache
def _reference(folder: Path) -> Reference:
    return Reference(folder)


@cache
def _image_processor(folder: Path) -> Any:
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(folder)
