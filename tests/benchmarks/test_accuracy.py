"""What `make accuracy` makes of answers: intervals, groups, tables, the file of answers. No engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks import accuracy, accuracy_answers
from benchmarks.accuracy import SETTINGS, order
from benchmarks.accuracy_answers import Answer, AnswerFile, Setting, answer_key, model_digest
from benchmarks.accuracy_report import (
    GROUPS,
    Column,
    Report,
    Share,
    draw_plot,
    evidence_side,
    groups_of,
    guesses,
    is_right,
    make_report,
    make_tables,
    progress_line,
    replace_tables,
    spread,
    wilson,
)
from vd_plugin.demo import MODEL_PATH
from vd_plugin.demo.questions import KINDS, Question
from vd_plugin.demo.scenes import Box, Scene
from vd_plugin.demo.split import Example, evaluation_split
from vd_plugin.schedule import DecoderShape, Geometry

EXAMPLES = evaluation_split(24)


@pytest.fixture(scope="module")
def geometry() -> Geometry:
    """LLaVA-NeXT's tiles."""
    pinpoints = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
    return Geometry(1, 336, 14, pinpoints, (2, 4, 6), DecoderShape(8, 256, 512, 8, 4, 32))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint as far as its digest goes."""
    folder = tmp_path / "model"
    folder.mkdir()
    for source in MODEL_PATH.glob("*.json"):
        (folder / source.name).write_bytes(source.read_bytes())
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def example(*boxes: Box, width: int = 672, height: int = 672, kind: str = "color", answer: str = "red") -> Example:
    return Example(0, Scene(width, height, 0, (), ()), Question(kind, "?", answer, boxes, easy=True))


# Intervals


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (1, 29, 0.0061, 0.1718), (0, 20, 0.0, 0.1611)],
)
def test_intervals_are_those_of_the_literature(right: int, count: int, low: float, high: float) -> None:
    """Newcombe 1998, Statistics in Medicine 17, table I: method 3."""
    assert wilson(right, count) == pytest.approx((low, high), abs=6e-5)


def test_intervals_hold_their_share_and_mirror() -> None:
    for count in (1, 2, 17, 1200):
        for right in range(count + 1):
            low, high = wilson(right, count)
            assert 0 <= low <= right / count <= high <= 1
            assert wilson(count - right, count) == pytest.approx((1 - high, 1 - low))


def test_an_interval_of_nothing_says_nothing() -> None:
    assert wilson(0, 0) == (0, 1)
    assert str(Share(0, 0)) == "–"
    with pytest.raises(ValueError, match="no share"):
        wilson(3, 2)


# Groups


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("A red circle, and the blue star.", "red circle and blue star", True),
        ("chair", "CHAIR", True),
        ("red", "dark red", False),
        ("", "red", False),
    ],
)
def test_an_answer_is_right_if_it_matches_exactly(answer: str, expected: str, right: bool) -> None:
    assert is_right(answer, expected) is right


@pytest.mark.parametrize(
    ("size", "box", "side"),
    [
        ((672, 672), Box(0, 0, 40, 60), 40),
        ((336, 336), Box(0, 0, 50, 40), 40),  # pinpoint 672 x 336: not enlarged
        ((600, 600), Box(0, 0, 50, 60), 56),
        ((1008, 336), Box(0, 0, 30, 60), 30),
        ((1344, 1344), Box(0, 0, 60, 60), 30),
    ],
)
def test_evidence_is_measured_in_pixels_of_the_tiles(
    geometry: Geometry, size: tuple[int, int], box: Box, side: float
) -> None:
    shown = example(Box(0, 0, 300, 300), box, width=size[0], height=size[1])
    assert evidence_side(shown, geometry) == pytest.approx(side)


def test_every_example_is_in_its_groups(geometry: Geometry) -> None:
    top, bottom = Box(0, 0, 39, 100), Box(300, 400, 400, 500)
    assert groups_of(example(top), geometry) == {"color", "easy", "small evidence", "upper half"}
    assert groups_of(example(bottom), geometry) == {"color", "easy", "no small evidence", "lower half"}
    assert groups_of(example(top, bottom), geometry) == {"color", "easy", "small evidence"}
    assert groups_of(example(), geometry) == {"color", "easy"}
    assert "held-out words" in groups_of(example(bottom, kind="word", answer="CHAIR"), geometry)
    assert "training words" in groups_of(example(bottom, kind="word", answer="CAT"), geometry)


def test_the_guess_is_the_most_common_answer() -> None:
    asked = [example(answer=answer) for answer in ("red", "blue", "Blue", "green")]
    assert guesses(asked) == {"color": "blue"}
    assert guesses(asked[:2]) == {"color": "blue"}  # of equals the first by alphabet


# Report


@pytest.fixture
def report(geometry: Geometry) -> Report:
    count = len(EXAMPLES)
    columns = [
        Column("full", "full", 2800.0, [True] * (count - 4) + [False] * 4),
        Column("high", 640, 630.0, [False] * 6 + [True] * (count - 6)),
        Column("64", 64, 64.0, [False] * count),
    ]
    return make_report(EXAMPLES, columns, geometry, {"model": "m"})


def test_settings_are_compared_question_by_question(report: Report) -> None:
    _, high, least = report.columns
    assert report.stay_right(high) == Share(14, 20)
    assert report.become_right(high) == Share(4, 4)
    assert report.stay_right(least) == Share(0, 20)


def test_the_groups_of_the_report_add_up(report: Report) -> None:
    column = report.columns[1]
    kinds = [report.share(column, kind) for kind in KINDS]
    assert sum(share.right for share in kinds) == report.share(column).right == 18
    assert sum(share.count for share in kinds) == 24
    assert report.share(column, "easy").count + report.share(column, "hard").count == 24


def test_the_tables_show_the_figures(report: Report) -> None:
    tables = make_tables(report)
    lines = tables["kinds"].splitlines()
    assert lines[0] == "| kind | questions | guess | full | high (640) | 64 |"
    assert lines[2] == "| *tokens kept, mean* |  |  | *2,800* | *630* | *64* |"
    assert [line.split(" | ")[0].strip("| ") for line in lines[3:]] == [*KINDS, "**all**"]
    assert "| 83.3 (64.1–93.3) | 75.0 (55.1–88.0) | 0.0 (0.0–13.8) |" in lines[-1]
    assert tables["paired"].splitlines()[2].startswith("| right at full: stays right | 70.0 (")
    assert {line.split(" | ")[0].strip("| ") for line in tables["groups"].splitlines()[2:]} <= set(GROUPS)
    assert "70.0 % of the questions answered right with all tokens stay right" in tables["reading"]


def test_the_figures_are_json(report: Report) -> None:
    figures = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert figures["model"] == "m"
    assert figures["settings"][1]["exact_match"]["all"] == {
        "right": 18, "questions": 24, "share": 0.75, "low": 0.551, "high": 0.88
    }  # fmt: skip
    assert figures["settings"][1]["stay_right"]["all"]["right"] == 14


def test_tables_replace_those_of_the_page_and_leave_its_prose(report: Report) -> None:
    page = accuracy.PAGE.read_text()
    once = replace_tables(page, make_tables(report))
    assert replace_tables(once, make_tables(report)) == once
    assert "2,800" in once

    def prose(text: str) -> list[str]:
        kept, is_table = [], False
        for line in text.splitlines():
            is_table = is_table or line.startswith("<!-- table: begin")
            if not is_table:
                kept.append(line)
            is_table = is_table and line != "<!-- table: end -->"
        return kept

    assert prose(once) == prose(page)
    with pytest.raises(ValueError, match="0 places for the table 'kinds'"):
        replace_tables("nothing", make_tables(report))


def test_the_plot_is_drawn(report: Report, tmp_path: Path) -> None:
    draw_plot(report, tmp_path / "images" / "plot.png")
    assert (tmp_path / "images" / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_labels_are_moved_apart_and_no_further() -> None:
    assert spread({"a": 10, "b": 50}, 3, 0, 100) == {"a": 10, "b": 50}
    heights = {"a": 99, "b": 99, "c": 98, "d": 50, "e": 49}
    placed = spread(heights, 3, 0, 100)
    assert placed["d"] - placed["e"] == pytest.approx(3)
    assert placed["d"] + placed["e"] == pytest.approx(99)
    ordered = sorted(placed.values())
    assert all(b - a >= 3 - 1e-9 for a, b in pairwise(ordered))
    assert max(ordered) == pytest.approx(100)


# Order and progress


def test_questions_about_one_image_stand_together_at_each_setting() -> None:
    pairs = order(EXAMPLES, SETTINGS)
    assert len({(e.number, s.name) for e, s in pairs}) == len(pairs) == len(EXAMPLES) * len(SETTINGS)
    images = [(e.scene.seed, s.name) for e, s in pairs]
    changes = 1 + sum(a != b for a, b in pairwise(images))
    assert changes == len(set(images))
    assert [e.scene.seed for e, _ in pairs] == sorted(
        (e.scene.seed for e, _ in pairs), key=[e.scene.seed for e in EXAMPLES].index
    )


def test_progress_tells_the_time_left() -> None:
    assert progress_line(0, 100, 0.0) == "[........................] 0/100  starting"
    assert progress_line(25, 100, 50.0) == "[######..................] 25/100  2 min 30 s left  0.5 answers/s"
    assert "3 h 05 min left" in progress_line(1, 11101, 1.0)


# The file of answers


class FakeAsk:
    """In place of the engine: answers right, and says what it was asked."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.asked: list[tuple[int, str]] = []
        self.stop_after = stop_after

    def __call__(
        self, model: Path, pairs: list[tuple[Example, Setting]], batch: int, accept: Callable[[Answer], None]
    ) -> None:
        digest = model_digest(model)
        for example, setting in pairs:
            if len(self.asked) == self.stop_after:
                raise KeyboardInterrupt
            self.asked.append((example.number, setting.name))
            question = example.question
            accept(
                Answer(
                    answer_key(digest, setting, example),
                    example.number,
                    setting.name,
                    setting.budget,
                    100,
                    question.kind,
                    question.text,
                    question.answer,
                    question.answer,
                )
            )


def test_a_run_that_was_stopped_goes_on_where_it_was(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SETTINGS[:2]
    first = FakeAsk(stop_after=10)
    monkeypatch.setattr(accuracy, "ask_engine", first)
    with pytest.raises(KeyboardInterrupt):
        accuracy.ask_missing(model, EXAMPLES, settings, AnswerFile(tmp_path / "answers.jsonl"), 16)
    second = FakeAsk()
    monkeypatch.setattr(accuracy, "ask_engine", second)
    answers = AnswerFile(tmp_path / "answers.jsonl")
    with pytest.raises(ValueError, match="have not been asked"):
        accuracy.collect(model, EXAMPLES, settings, answers)
    accuracy.ask_missing(model, EXAMPLES, settings, answers, 16)
    assert len(first.asked) == 10
    assert sorted(first.asked + second.asked) == sorted((e.number, s.name) for e in EXAMPLES for s in settings)
    report, found = accuracy.collect(model, EXAMPLES, settings, AnswerFile(tmp_path / "answers.jsonl"))
    assert report.share(report.columns[0]) == Share(24, 24)
    assert [answer.number for answer in found["high"]] == list(range(24))


def test_a_larger_run_asks_only_what_is_new(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = AnswerFile(tmp_path / "answers.jsonl")
    monkeypatch.setattr(accuracy, "ask_engine", FakeAsk())
    accuracy.ask_missing(model, EXAMPLES[:12], SETTINGS[:1], answers, 16)
    more = FakeAsk()
    monkeypatch.setattr(accuracy, "ask_engine", more)
    accuracy.ask_missing(model, EXAMPLES, SETTINGS[:1], answers, 16)
    assert sorted(number for number, _ in more.asked) == list(range(12, 24))


def test_a_torn_line_is_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    first, second = (Answer(key, 0, "full", "full", 2928, "color", "?", "red", "red") for key in ("a", "b"))
    AnswerFile(path).add(first)
    AnswerFile(path).add(second)
    path.write_text(path.read_text()[:-20])
    again = AnswerFile(path)
    assert again.get("a") == first
    assert again.get("b") is None
    again.add(second)
    assert AnswerFile(path).get("b") == second


def test_a_key_changes_with_all_that_an_answer_depends_on(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = model_digest(model)
    setting, asked = SETTINGS[1], EXAMPLES[0]
    keys = [
        answer_key(digest, setting, asked),
        answer_key(digest, SETTINGS[2], asked),
        answer_key(digest, Setting("high", 640, {"visiondrop": {"layers": []}}), asked),
        answer_key(digest, setting, EXAMPLES[1]),
    ]
    assert answer_key(digest, Setting("another name", 640), asked) == keys[0]
    (model / "model.safetensors").write_bytes(b"others")
    keys.append(answer_key(model_digest(model), setting, asked))
    monkeypatch.setattr(accuracy_answers, "_pixels_digest", lambda scene: b"drawn otherwise")
    keys.append(answer_key(digest, setting, asked))
    monkeypatch.setattr(accuracy_answers, "method_digest", lambda: "changed")
    keys.append(answer_key(digest, setting, asked))
    assert len(set(keys)) == len(keys)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoint with weights"):
        model_digest(tmp_path)


def test_budgets_are_names_or_numbers() -> None:
    assert [setting.budget for setting in accuracy.parse_settings(["full", "low", "100"])] == ["full", 160, 100]
    with pytest.raises(ValueError, match="budget"):
        accuracy.parse_settings(["much"])


def test_a_report_is_written_from_answers_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(accuracy, "ask_engine", FakeAsk())
    common = ["--model", str(model), "--answers", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out")]
    assert accuracy.main([*common, "--questions", "24", "--report-only"]) == 2
    assert "have not been asked" in capsys.readouterr().err
    assert accuracy.main([*common, "--questions", "24"]) == 0
    assert accuracy.main([*common, "--questions", "12", "--report-only", "--budgets", "full", "low"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["exact_match"]["low"]["right"] == 12
    figures = json.loads((tmp_path / "out" / "accuracy.json").read_text())
    assert [setting["name"] for setting in figures["settings"]] == ["full", "low"]
    assert (tmp_path / "out" / "images" / "accuracy.png").exists()
    assert "<!-- table: begin kinds -->" in (tmp_path / "out" / "accuracy.md").read_text()


def test_bounds_hold_what_the_test_compares_with(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "ask_engine", FakeAsk())
    monkeypatch.setattr(accuracy, "BOUNDS", tmp_path / "bounds.json")
    arguments = ["--model", str(model), "--answers", str(tmp_path / "a.jsonl"), "--record-bounds"]
    assert accuracy.main(arguments) == 0
    bounds = json.loads((tmp_path / "bounds.json").read_text())
    assert bounds["right"] == {setting.name: accuracy.TESTED_QUESTIONS for setting in accuracy.TESTED}
    assert [len(answers) for answers in bounds["answers"].values()] == [accuracy.TESTED_QUESTIONS] * 3
