"""The demo model answers as many questions right as when its bounds were recorded: a slice of `make accuracy`.

`benchmarks/accuracy.py --record-bounds` records them anew, in accuracy_bounds.json, after a change that is meant to
change answers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import engines
import pytest

from benchmarks import accuracy
from benchmarks.accuracy import BOUNDS, TESTED, TESTED_QUESTIONS
from benchmarks.accuracy_answers import Answer, Setting, model_digest
from benchmarks.accuracy_report import make_report
from vd_plugin import decoder, vision
from vd_plugin.demo import MODEL_PATH
from vd_plugin.demo.split import evaluation_split, fingerprint

pytestmark = [pytest.mark.engine, pytest.mark.slow]

MARGIN = 2
"""Right answers that may be lost at a setting: float32 kernels of another machine may decide a near tie otherwise."""

EXAMPLES = evaluation_split(TESTED_QUESTIONS)


@pytest.fixture(scope="module")
def bounds() -> dict[str, Any]:
    assert BOUNDS.is_file(), "no bounds: run benchmarks/accuracy.py --record-bounds"
    recorded: dict[str, Any] = json.loads(BOUNDS.read_text())
    recorded_anew = "run benchmarks/accuracy.py --record-bounds"
    assert recorded["model"] == model_digest(MODEL_PATH), f"recorded with another model: {recorded_anew}"
    assert recorded["split"] == fingerprint(EXAMPLES), f"recorded with other questions: {recorded_anew}"
    return recorded


def ask(*settings: Setting) -> dict[str, list[Answer]]:
    """Answers of an engine whose caches are empty, by setting, in the order of EXAMPLES."""
    engine = engines._start(accuracy.engine_arguments(MODEL_PATH, settings[0]))
    answers: dict[str, list[Answer]] = {setting.name: [] for setting in settings}
    for answer in accuracy.ask(engine.llm, MODEL_PATH, accuracy.order(EXAMPLES, settings)):
        answers[answer.setting].append(answer)
    return {name: sorted(given, key=lambda answer: answer.number) for name, given in answers.items()}


def violations(answers: Mapping[str, Sequence[Answer]], bounds: Mapping[str, Any]) -> list[str]:
    """For each setting with fewer right answers than its bound what changed."""
    found = []
    for name, given in answers.items():
        right, recorded = sum(answer.is_right for answer in given), bounds["right"][name]
        if right < recorded - MARGIN:
            changed = [
                f"  {answer.number} {answer.question} was {before!r}, is {answer.answer!r}, right: {answer.expected!r}"
                for answer, before in zip(given, bounds["answers"][name], strict=True)
                if answer.answer != before
            ]
            found.append("\n".join([f"{name}: {right} of {len(given)} right, not {recorded}", *changed]))
    return found


def test_answers_are_as_often_right_as_recorded(bounds: dict[str, Any]) -> None:
    found = violations(ask(*TESTED), bounds)
    assert not found, "\n".join(found)


def test_the_bounds_say_something(bounds: dict[str, Any]) -> None:
    """More than the margin lies between them and a model that always gives the most common answer."""
    common = make_report(EXAMPLES, [], accuracy.read_setting_geometry(MODEL_PATH, TESTED[0]), {})
    for setting in TESTED:
        assert bounds["right"][setting.name] > sum(common.guessed) + 5 * MARGIN, setting.name


def keep_the_least_attended_patches(patch: pytest.MonkeyPatch) -> None:
    """At the encoder's output."""
    select = vision.select
    patch.setattr(vision, "select", lambda scores, *others: select(-scores, *others))


def keep_the_least_attended_tokens(patch: pytest.MonkeyPatch) -> None:
    """At every stage of the decoder."""
    select = decoder.select
    patch.setattr(decoder, "select", lambda scores, *others: select(-scores, *others))


@pytest.mark.parametrize("sabotage", [keep_the_least_attended_patches, keep_the_least_attended_tokens])
def test_keeping_the_wrong_tokens_is_noticed(
    bounds: dict[str, Any], monkeypatch: pytest.MonkeyPatch, sabotage: Any
) -> None:
    (low,) = (setting for setting in TESTED if setting.name == "low")
    sabotage(monkeypatch)
    try:
        assert violations(ask(low), bounds), "the answers are as good with the wrong tokens"
    finally:
        engines.stop()  # what it holds was made of the wrong tokens
