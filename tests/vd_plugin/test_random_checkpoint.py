"""The random checkpoint: same bytes every time, published names and shapes, one <image> for each image."""

from __future__ import annotations

import hashlib
from pathlib import Path

import checkpoint_laws as laws
import pytest

from vd_plugin.tools import random_checkpoint
from vd_plugin.tools.random_checkpoint import build, main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("random") / "model"
    assert build(path)
    return path


def _hashes(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def test_is_small_and_the_same_every_time(model: Path, tmp_path: Path) -> None:
    build(tmp_path / "again")
    assert _hashes(tmp_path / "again") == _hashes(model)
    assert sum(file.stat().st_size for file in model.iterdir()) < 20e6


def test_second_build_does_nothing(model: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in model.iterdir()}
    assert not build(model)
    assert {file: file.stat().st_mtime_ns for file in model.iterdir()} == before


def test_another_version_is_replaced_whole(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "visiondrop_random.json").write_text('{"version": "older"}')
    (model / "left.over").touch()
    assert build(model)
    assert not (model / "left.over").exists()
    assert list(tmp_path.iterdir()) == [model]


def test_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_off(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(random_checkpoint, "_make_tensors", break_off)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_foreign_folder_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "precious.txt").touch()
    assert main([str(tmp_path)]) == 1
    assert "is no random checkpoint" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["precious.txt"]


def test_transformers_finds_every_tensor(model: Path) -> None:
    laws.assert_transformers_finds_every_tensor(model)


def test_tensors_have_published_names(model: Path) -> None:
    laws.assert_tensors_have_published_names(model)


def test_image_costs_as_much_as_in_the_real_model(model: Path) -> None:
    laws.assert_image_costs(model, 672, tokens=576 + 48 * 49)


@pytest.mark.parametrize("text", ["What is in the image?", "naïve 日本 😀\n\ttabs", "<image> USER:"])
def test_tokenizer_loses_nothing(model: Path, text: str) -> None:
    laws.assert_tokenizer_loses_nothing(model, text)


@pytest.mark.parametrize("kind", ["image", "image_url"])
def test_template_places_one_token_for_each_image(model: Path, kind: str) -> None:
    content = [{"type": "text", "text": "First: "}, {"type": kind}, {"type": "text", "text": "then: "}, {"type": kind}]
    assert laws.render(model, [{"role": "user", "content": content}]) == (
        "<s>USER: First: <image>\nthen: <image>\n ASSISTANT:"
    )


def test_template_takes_plain_text_and_a_conversation(model: Path) -> None:
    messages: list[dict[str, object]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image>\nWhat is it?"},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Sure?"},
    ]
    assert laws.render(model, messages) == (
        "<s>Be brief. USER: <image>\nWhat is it? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT:"
    )
