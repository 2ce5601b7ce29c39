"""Scenes and questions: what is drawn is what is said, and every answer is certain."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from vd_plugin.demo.questions import KINDS, Question, choose, make_questions, normalize
from vd_plugin.demo.scenes import COLORS, FONTS, POSITIONS, Scene, draw, get_font, make_scene

SEEDS = range(300)


@pytest.fixture(scope="module")
def asked() -> list[tuple[Scene, Question]]:
    return [(scene, q) for seed in SEEDS for scene in [make_scene(seed)] for q in make_questions(scene, seed)]


def test_a_seed_gives_the_same_image_and_questions() -> None:
    assert make_scene(5) == make_scene(5)
    assert draw(make_scene(5)).tobytes() == draw(make_scene(5)).tobytes()
    assert make_questions(make_scene(5), 5) == make_questions(make_scene(5), 5)
    assert draw(make_scene(5)).tobytes() != draw(make_scene(6)).tobytes()


@pytest.mark.parametrize(("width", "height"), [(448, 448), (448, 224), (224, 672), (224, 224)])
def test_everything_lies_in_its_slot(width: int, height: int) -> None:
    for seed in SEEDS:
        scene = make_scene(seed, width, height)
        assert draw(scene).size == (width, height)
        assert scene.things or scene.signs
        for item in (*scene.things, *scene.signs):
            left, right = item.column * width // 3, (item.column + 1) * width // 3
            top, bottom = item.row * height // 3, (item.row + 1) * height // 3
            box = item.box
            assert left <= box.left < box.right <= right
            assert top <= box.top < box.bottom <= bottom


def test_shapes_are_drawn_in_their_colour() -> None:
    names = list(COLORS)
    palette = np.array(list(COLORS.values()))
    for seed in SEEDS:
        scene = make_scene(seed)
        pixels = np.asarray(draw(scene)).astype(int)
        for thing in scene.things:
            x, y = (thing.box.left + thing.box.right) // 2, (thing.box.top + thing.box.bottom) // 2
            if thing.label:
                continue
            if thing.shape == "ring":
                x = thing.box.left + max(1, (thing.box.right - thing.box.left) // 10)
            nearest = int(((palette - pixels[y, x]) ** 2).sum(axis=1).argmin())
            assert names[nearest] == thing.color, (seed, thing)


def test_every_kind_is_asked_and_half_of_it_is_easy(asked: list[tuple[Scene, Question]]) -> None:
    kinds = Counter(question.kind for _, question in asked)
    assert set(kinds) == set(KINDS)
    easy = Counter(question.kind for _, question in asked if question.easy)
    assert all(0.2 < easy[kind] / kinds[kind] < 0.8 for kind in KINDS), easy
    assert 0.4 < easy.total() / kinds.total() < 0.6


def test_answers_of_yes_and_no_are_balanced(asked: list[tuple[Scene, Question]]) -> None:
    for kind in ("exists", "relation"):
        answers = Counter(question.answer for _, question in asked if question.kind == kind)
        assert 0.44 < answers["yes"] / answers.total() < 0.56, kind


def test_evidence_lies_in_the_image_and_shows_the_answer(asked: list[tuple[Scene, Question]]) -> None:
    for scene, question in asked:
        things = {thing.box: thing for thing in scene.things}
        signs = {sign.box: sign for sign in scene.signs}
        assert all(box in things or box in signs for box in question.evidence)
        shown = [things[box] for box in question.evidence if box in things]
        match question.kind:
            case "color":
                assert [thing.color for thing in shown] == [question.answer]
            case "shape":
                assert [thing.shape for thing in shown] == [question.answer]
            case "position":
                assert [thing.position for thing in shown] == [question.answer]
            case "label":
                assert [thing.label for thing in shown] == [question.answer]
            case "count":
                assert len(shown) == int(question.answer)
            case "number" | "word":
                assert [signs[box].text for box in question.evidence] == [question.answer]
                assert question.answer.isdigit() == (question.kind == "number")
            case "neighbor":
                first, second = shown
                assert second.name == question.answer
                assert abs(first.row - second.row) + abs(first.column - second.column) == 1
            case "size":
                widths = {thing.name: thing.box.right - thing.box.left for thing in scene.things}
                assert all(widths[question.answer] >= widths[thing.name] for thing in shown)
            case "describe":
                told = [word for word in normalize(question.answer).split() if word != "and"]
                assert told == [word for thing in scene.things for word in thing.name.split()]


def test_what_is_named_is_there_once(asked: list[tuple[Scene, Question]]) -> None:
    """Or, for "is there a ...", at least once if the answer is yes, and never if it is no."""
    for scene, question in asked:
        names = Counter(thing.name for thing in scene.things)
        named = [
            name
            for name in (f"{c} {s}" for c in COLORS for s in ("circle", "star", "ring", "heart"))
            if name in question.text
        ]
        for name in named:
            if question.kind in ("position", "relation", "neighbor", "size", "label"):
                assert names[name] == 1, question
            elif question.kind == "exists":
                assert (names[name] > 0) == (question.answer == "yes"), question


def test_relations_follow_the_slots(asked: list[tuple[Scene, Question]]) -> None:
    for scene, question in asked:
        if question.kind != "relation":
            continue
        first, second = (next(t for t in scene.things if t.box == box) for box in question.evidence)
        says = {
            "left of": first.column < second.column,
            "right of": first.column > second.column,
            "above": first.row < second.row,
            "below": first.row > second.row,
        }
        (word,) = (word for word in says if f"{word} the {second.name}" in question.text)
        assert says[word] == (question.answer == "yes"), question


def test_choice_takes_kinds_in_turn() -> None:
    questions = make_questions(make_scene(7), 7)
    chosen = choose(questions, 8, 1)
    assert len(chosen) == 8
    assert len({question.kind for question in chosen}) == min(8, len({question.kind for question in questions}))
    assert len(choose(questions, 10_000, 1)) == len(questions)


@pytest.mark.parametrize(
    ("text", "same"),
    [("A red circle.", "red circle"), ("Top  left", "top left"), ("a star, a ring and a heart", "star ring and heart")],
)
def test_normalized(text: str, same: str) -> None:
    assert normalize(text) == same


def test_places_are_named_by_reading() -> None:
    assert [name for row in POSITIONS for name in row][4] == "center"
    scene = make_scene(3)
    assert all(thing.position == POSITIONS[thing.row][thing.column] for thing in scene.things)


def test_fonts_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from vd_plugin.demo import scenes

    monkeypatch.setattr(scenes, "_matplotlib_fonts", lambda: None)
    get_font.cache_clear()
    assert get_font(FONTS[0], 20).getbbox("7")
    with pytest.raises(FileNotFoundError, match="comes with matplotlib"):
        get_font(FONTS[1], 20)
    get_font.cache_clear()
