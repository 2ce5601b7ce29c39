"""The questions that each server is asked, and what its answers must have in common with those of another one."""

from __future__ import annotations

import base64
import contextlib
import json
import statistics
import time
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import httpx

from benchmarks.gpu.server import Server, why_ended
from benchmarks.gpu.step import StepError
from server.demo import Task
from vd_plugin.demo import MODEL_PATH

Asked: TypeAlias = int | str | None
"""A budget; None for a question without an image."""

BUDGETS: Final[tuple[Asked, ...]] = (160, 320, 640, "full", None)
LEAST_EQUAL: Final = 0.8
"""Share of answers that must be those of another engine, token for token. Kernels round differently, and in half
precision either of two nearly equal patches or words may be chosen; wrong keys, slots or positions change most."""

_LEAST_RIGHT: Final = 0.75
"""Of the demo model's answers in full; on a CPU all are right."""
_NUM_TOKENS: Final = 16


@dataclass(frozen=True, slots=True)
class Reply:
    """One streamed answer."""

    name: str
    """Of the question: the same for all servers."""
    asked: Asked
    tokens: tuple[str, ...]
    is_right: bool
    """Whether it is the scene's answer, which only the demo model knows."""
    first_token_seconds: float


def ask_all(server: Server, tasks: Sequence[Task]) -> list[Reply]:
    """Each question at each budget, one request at a time.

    Raises:
        StepError: a request failed, or its visual tokens are not those of its budget.
    """
    return [ask(server, task, asked) for task in tasks for asked in BUDGETS]


def ask_at_once(server: Server, tasks: Sequence[Task]) -> list[Reply]:
    """All in flight together, at all budgets in turn.

    Raises:
        StepError: likewise.
    """

    def one(number: int) -> Reply:
        return ask(server, tasks[number], BUDGETS[number % len(BUDGETS)])

    with ThreadPoolExecutor(len(tasks)) as pool:
        return list(pool.map(one, range(len(tasks))))


def ask(server: Server, task: Task, asked: Asked) -> Reply:
    """One request.

    Raises:
        StepError: it failed, or its visual tokens are not those of its budget.
    """
    content: list[dict[str, Any]] = [{"type": "text", "text": task.question}]
    body: dict[str, Any] = {
        "model": server.model,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": _NUM_TOKENS,
        "logprobs": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if asked is not None:
        url = f"data:image/png;base64,{base64.b64encode(task.png()).decode()}"
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
        body["visual_token_budget"] = asked
    start = time.perf_counter()
    seconds, text = None, ""
    tokens: list[str] = []
    counts: Mapping[str, int] = {}
    for chunk in _stream(server, body):
        for choice in chunk["choices"]:
            text += choice["delta"].get("content") or ""
            if logprobs := choice.get("logprobs"):
                seconds = seconds or time.perf_counter() - start
                tokens += [entry["token"] for entry in logprobs["content"]]
        if usage := chunk.get("usage"):
            counts = usage.get("visual_tokens", {})
    if seconds is None:
        raise StepError(f"an answer without a token, at budget {asked}")
    check_counts(asked, counts)
    return Reply(f"{task.scene.seed} at {asked or 'text'}", asked, tuple(tokens), task.is_right(text), seconds)


def _stream(server: Server, body: Mapping[str, Any]) -> Generator[dict[str, Any]]:
    try:
        with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                response.read()
                raise StepError(_complaint(server, f"status {response.status_code}: {response.text[:500]}"))
            for line in response.iter_lines():
                data = line.removeprefix("data: ")
                if not line.startswith("data: ") or data == "[DONE]":
                    continue
                chunk = json.loads(data)
                if "error" in chunk:
                    raise StepError(_complaint(server, chunk["error"].get("message")))
                yield chunk
    except httpx.TransportError as error:
        raise StepError(_complaint(server, repr(error))) from None


def _complaint(server: Server, what: object) -> str:
    why = why_ended(server.log)
    return f"a request failed with {what}" + (f"; the engine's last error: {why}" if why else "")


def check_counts(asked: Asked, counts: Mapping[str, int]) -> None:
    """What a budget promises.

    Raises:
        StepError: the counts of an answer are not so.
    """
    full, kept = counts.get("full", 0), counts.get("kept", 0)
    match asked:
        case None:
            good = full == kept == 0
        case int():
            good = 0 < kept <= asked
        case _:
            good = 0 < kept == full
    if not good:
        raise StepError(f"at budget {asked}, {kept} of {full} visual tokens are kept")


def first_token_ms(replies: Sequence[Reply]) -> dict[str, float]:
    """Medians by budget."""
    return {
        str(asked or "text"): round(
            1e3 * statistics.median(reply.first_token_seconds for reply in replies if reply.asked == asked), 1
        )
        for asked in BUDGETS
        if any(reply.asked == asked for reply in replies)
    }


def check_right(model: str, replies: Sequence[Reply]) -> str | None:
    """How many questions about images were answered rightly; None if the model is another than the demo model.

    Raises:
        StepError: too few of those in full.
    """
    if not is_demo_model(model):
        return None
    full = [reply.is_right for reply in replies if reply.asked == "full"]
    if sum(full) < _LEAST_RIGHT * len(full):
        raise StepError(f"the demo model answers {sum(full)} of {len(full)} questions in full rightly")
    judged = [reply.is_right for reply in replies if reply.asked is not None]
    return f"{sum(judged)} of {len(judged)}"


def is_demo_model(model: str) -> bool:
    return Path(model).resolve() == MODEL_PATH.resolve()


def share_equal(ours: Mapping[str, Sequence[str]], theirs: Mapping[str, Sequence[str]]) -> float:
    """Share of the questions asked of both that have the same tokens for an answer.

    Raises:
        StepError: it is below `LEAST_EQUAL`, or there is no such question.
    """
    names = ours.keys() & theirs.keys()
    if not names:
        raise StepError("the two have no question in common")
    different = sorted(name for name in names if list(ours[name]) != list(theirs[name]))
    share = 1 - len(different) / len(names)
    if share < LEAST_EQUAL:
        raise StepError(f"{len(different)} of {len(names)} answers differ: {', '.join(different[:8])}")
    return round(share, 3)


class Answers:
    """Those of each step, kept in the folder of the run for later steps to compare with."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def keep(self, step: str, replies: Sequence[Reply]) -> None:
        self._path(step).write_text(json.dumps(tokens_of(replies)))

    def of(self, step: str) -> dict[str, list[str]] | None:
        """None if the step did not get that far."""
        with contextlib.suppress(FileNotFoundError):
            answers: dict[str, list[str]] = json.loads(self._path(step).read_text())
            return answers
        return None

    def _path(self, step: str) -> Path:
        return self._folder / f"{step}.answers.json"


def tokens_of(replies: Sequence[Reply]) -> dict[str, list[str]]:
    """By the name of the question."""
    return {reply.name: list(reply.tokens) for reply in replies}
