"""What the demo asks, and what it says about the answers. tests/system/test_server.py runs it on the real engine."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from server import cli, demo
from vd_plugin.demo import MODEL_PATH
from vd_plugin.demo.questions import make_questions
from vd_plugin.demo.scenes import FONTS
from vd_plugin.schedule import FULL, PRESETS


def test_questions_are_of_four_kinds_about_what_is_easy_to_see() -> None:
    tasks = demo.make_tasks()
    kinds = []
    for task in tasks:
        (question,) = (q for q in make_questions(task.scene, task.scene.seed) if q.text == task.question)
        assert question.answer == task.right_answer
        assert question.evidence
        kinds.append(question.kind)
        assert {sign.font for sign in task.scene.signs} <= {FONTS[0]}, "the font that comes with Pillow"
    assert sorted(kinds) == ["color", "neighbor", "number", "position"]


def test_no_two_images_are_alike() -> None:
    tasks = [*demo.make_tasks(3), demo._make_task(*demo._WARM_UP)]
    assert len({hashlib.sha256(task.png()).digest() for task in tasks}) == len(tasks) == 13
    assert all(Image.open(io.BytesIO(task.png())).size == (448, 448) for task in tasks)
    assert [task.right_answer for task in tasks[:4]] == [task.right_answer for task in tasks[4:8]]
    assert tasks[0].scene.things == tasks[4].scene.things, "only the background differs"


def test_an_answer_is_right_whatever_its_case_and_article() -> None:
    task = next(task for task in demo.make_tasks() if " " in task.right_answer)
    assert task.is_right(f" The {task.right_answer.title()}.")
    assert not task.is_right(f"not {task.right_answer}")
    assert not task.is_right("")


@contextmanager
def stream(budget: str, words: str) -> Iterator[list[Any]]:
    """An answer as two chunks."""
    choices = [SimpleNamespace(delta=SimpleNamespace(content=words))] if words else []
    kept = {FULL: 1312, **PRESETS}[budget]
    counts = {"visual_tokens": {"full": 1312, "kept": kept, "saved": 1312 - kept}}
    yield [
        SimpleNamespace(choices=choices, usage=None),
        SimpleNamespace(choices=[], usage=SimpleNamespace(model_extra=counts)),
    ]


class FakeClient:
    """Knows every answer; at `low` it says nothing."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.models = SimpleNamespace(list=lambda: SimpleNamespace(data=[SimpleNamespace(id="m")]))
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=self.create))

    def create(self, **request: Any) -> AbstractContextManager[list[Any]]:
        image, text = request["messages"][0]["content"]
        budget = request["extra_body"]["visual_token_budget"]
        self.asked.append((image["image_url"]["url"], budget))
        answers = {task.question: task.right_answer for task in demo.make_tasks()}
        return stream(budget, "" if budget == "low" else answers.get(text["text"], "who knows"))


@pytest.mark.parametrize("judged", [True, False])
def test_report(judged: bool, capsys: pytest.CaptureFixture[str]) -> None:
    client: Any = FakeClient()
    tasks = demo.make_tasks(2)
    answers = demo._ask_all(client, tasks, 24, judged=judged)
    assert len(set(client.asked)) == len(client.asked) == 4 * (1 + len(tasks)), "no image twice at the same budget"
    out = capsys.readouterr().out
    assert out.count("<- wrong") == (len(tasks) if judged else 0)
    assert ("right: " in out) == judged
    assert out.count(f"{'low':>8}: (nothing)") == len(tasks)
    assert all(task.question in out for task in tasks)
    assert demo._score(tasks, answers) == "Right answers: full 8 of 8, high 8 of 8, medium 8 of 8, low 0 of 8."
    row = demo._table(answers).splitlines()[-1].split()
    assert row[:5] == ["low", "1,312", "160", "1,152", "87.8%"]


def test_words_of_a_model_stay_on_their_line() -> None:
    assert demo._printable("\x1b[2J two\n lines ") == "\N{REPLACEMENT CHARACTER}[2J two lines"


def test_only_the_demo_model_is_judged(tmp_path: Path) -> None:
    assert demo._is_demo_model(None)
    assert demo._is_demo_model(str(MODEL_PATH))
    assert not demo._is_demo_model(str(tmp_path))
    assert not demo._is_demo_model("llava-hf/llava-v1.6-vicuna-7b-hf")


def test_images_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def give_up(*_: object) -> None:
        raise demo.DemoError("far enough")

    monkeypatch.setattr(demo, "_server", give_up)
    assert cli.main(["demo", "m", "--images", str(tmp_path / "new" / "folder")]) == 1
    assert "far enough" in capsys.readouterr().err
    files = sorted((tmp_path / "new" / "folder").iterdir())
    assert [file.name for file in files] == [f"demo-{number}.png" for number in (1, 2, 3, 4)]
    assert files[0].read_bytes() == demo.make_tasks()[0].png()
    assert cli.main(["demo", "m", "--images", str(files[0])]) == 1
    assert "visiondrop: error: the images cannot be written: " in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--repeats", "--max-tokens"])
def test_wrong_usage_gets_a_sentence(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "m", option, "0"]) == 2
    assert capsys.readouterr().err == "visiondrop: error: --repeats and --max-tokens must be at least 1\n"
