"""Answers of `benchmarks/accuracy.py`: what each depends on, and the file that keeps them. Needs no engine."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import vd_plugin
from benchmarks.accuracy_report import is_right
from vd_plugin.demo.scenes import Scene, draw
from vd_plugin.demo.split import Example
from vd_plugin.schedule import Budget

MAX_TOKENS: Final = 24
"""Of an answer; the longest right one has 16."""

_METHOD: Final = ("decoder", "image_batches", "schedule", "selection", "vision")
"""Modules of the plugin that decide which tokens are kept."""


@dataclass(frozen=True)
class Setting:
    """One way to serve the questions. Those with equal `engine` share a running engine."""

    name: str
    budget: Budget
    engine: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `vd_plugin.engine_args` beside those that every setting has: {"visiondrop": {"layers": []}}."""

    @property
    def engine_key(self) -> str:
        return json.dumps(self.engine, sort_keys=True)


@dataclass(frozen=True, slots=True)
class Answer:
    """A line of the file of answers."""

    key: str
    """See `answer_key`."""
    number: int
    """Of the example."""
    setting: str
    budget: Budget
    kept: int
    """Visual tokens in a decoder layer, on average."""
    kind: str
    question: str
    expected: str
    answer: str

    @property
    def is_right(self) -> bool:
        return is_right(self.answer, self.expected)


class AnswerFile:
    """Answers by key, one JSON object a line, appended as they come."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._answers: dict[str, Answer] = {}
        self._is_torn = False
        if path.exists():
            text = path.read_text()
            self._is_torn = bool(text) and not text.endswith("\n")
            for line in text.splitlines():
                try:
                    answer = Answer(**json.loads(line))
                except (json.JSONDecodeError, TypeError):
                    continue  # torn where a run was killed, or of another version: asked again
                self._answers[answer.key] = answer

    def get(self, key: str) -> Answer | None:
        return self._answers.get(key)

    def add(self, answer: Answer) -> None:
        self._answers[answer.key] = answer
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(("\n" if self._is_torn else "") + json.dumps(asdict(answer), ensure_ascii=False) + "\n")
        self._is_torn = False


def model_digest(model: str | Path) -> str:
    """Of all files of a checkpoint that answers depend on.

    Raises:
        ValueError: not the folder of a checkpoint, or one without weights.
    """
    folder = Path(model)
    files = sorted(path for path in folder.glob("*") if path.suffix in (".json", ".jinja", ".safetensors"))
    if not any(path.suffix == ".safetensors" for path in files):
        raise ValueError(f"no checkpoint with weights (*.safetensors) in {folder}")
    return _digest(*(part for path in files for part in (path.name.encode(), path.read_bytes())))


@functools.cache
def method_digest() -> str:
    """A change of these sources makes old answers worthless."""
    folder = Path(vd_plugin.__file__).parent
    return _digest(*((folder / f"{name}.py").read_bytes() for name in _METHOD))


def answer_key(model: str, setting: Setting, example: Example) -> str:
    """Of all that an answer depends on: weights, plugin and its options, question, and the image's very pixels.

    Args:
        model: what `model_digest` returns.
    """
    told = (model, method_digest(), package_version("vllm"), str(setting.budget), setting.engine_key, str(MAX_TOKENS))
    return _digest(*(part.encode() for part in told), example.digest.encode(), _pixels_digest(example.scene))[:24]


@functools.lru_cache(maxsize=4096)
def _pixels_digest(scene: Scene) -> bytes:
    return hashlib.sha256(draw(scene).tobytes()).digest()


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def package_version(package: str) -> str:
    for name in (package, f"{package}-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return ""
