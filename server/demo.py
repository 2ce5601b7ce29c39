"""`visiondrop demo [MODEL]`: a server of its own, questions about drawn images at every preset, and what that saved.

1. `visiondrop serve` is started as a child on a free port, and waited for.
2. Scenes are drawn, so nothing is fetched and the right answers are known. No image is asked about twice at the same
   budget: it would come out of the engine's caches, and the figures would flatter.
3. Every budget is asked once unmeasured, then once for each image; the table shows medians. The answers of the demo
   model, which knows such scenes, are compared with the right ones. Another model answers in words of its own, and its
   answers are only shown.
4. The server is stopped as with Ctrl-C.

It is a client like any other: it talks to the server through the `openai` package alone.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Final

import httpx

from server.launcher.serve import say, say_error
from vd_plugin.demo import MODEL_PATH, find_model
from vd_plugin.demo.questions import make_questions, normalize
from vd_plugin.demo.scenes import FIRST_HELD_OUT_SEED, Scene, draw, make_scene
from vd_plugin.schedule import FULL, PRESETS

if TYPE_CHECKING:
    from openai import OpenAI

_SCENES: Final = ((51, "color"), (106, "number"), (87, "neighbor"), (19, "position"))
"""Scenes, counted from the first held-out seed, and what kind of question is asked about each. The demo model knows
the answers; how often it does not, docs/accuracy.md tells."""
_WARM_UP: Final = (16, "color")
_BACKGROUNDS: Final = 1000
"""From one seed to the next with the same scene: only the background differs."""
_FONTS: Final = ("Aileron",)
"""The one that comes with Pillow."""
_BUDGETS: Final = (FULL, *sorted(PRESETS, key=lambda name: -PRESETS[name]))
_STOP_SECONDS: Final = 30.0


class DemoError(Exception):
    """The demo cannot go on. The message is a sentence."""


@dataclass(frozen=True, slots=True)
class Task:
    """A question about an image."""

    scene: Scene
    question: str
    right_answer: str

    def png(self) -> bytes:
        buffer = io.BytesIO()
        draw(self.scene).save(buffer, format="PNG")
        return buffer.getvalue()

    def is_right(self, text: str) -> bool:
        return normalize(text) == normalize(self.right_answer)


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed answer: its text, what the server counted, and what the client's clock said."""

    text: str
    full: int
    kept: int
    saved: int
    first_token_seconds: float
    total_seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Serve MODEL, ask about drawn images at every preset, and print the answers and what was saved."
    )
    parser.usage = "visiondrop demo [MODEL] [options] [-- ENGINE OPTIONS]"
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="a folder with a LLaVA checkpoint, or its name on the hub "
        "(default: the demo model that comes with the package, whose right answers are counted)",
    )
    parser.add_argument("--max-tokens", type=int, default=24, metavar="N", help="length of an answer (default: 24)")
    parser.add_argument(
        "--repeats",
        type=int,
        default=1,
        metavar="N",
        help=f"ask about N times {len(_SCENES)} images; the backgrounds differ from time to time (default: 1)",
    )
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="write the images there (default: nowhere)")


def run(arguments: argparse.Namespace) -> int:
    try:
        from openai import OpenAI, OpenAIError
    except ImportError:
        say_error("the demo needs the openai package: pip install openai")
        return 1
    if arguments.repeats < 1 or arguments.max_tokens < 1:
        say_error("--repeats and --max-tokens must be at least 1")
        return 2
    try:
        if arguments.model is None:
            find_model()
        tasks = make_tasks(arguments.repeats)
        if arguments.images is not None:
            _write_images(arguments.images, tasks)
        with _terminations_as_interrupts(), _server(arguments.model, getattr(arguments, "engine_options", [])) as url:
            client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
            judged = _is_demo_model(arguments.model)
            answers = _ask_all(client, tasks, arguments.max_tokens, judged=judged)
            print(f"\n{_table(answers)}\n\nMedians of {len(tasks)}, one request at a time.")
            if judged:
                print(_score(tasks, answers))
            if arguments.images is None:
                print("To see the images, give --images FOLDER.")
            else:
                print(f"The images are in {arguments.images}.")
    except (DemoError, OpenAIError, httpx.HTTPError, FileNotFoundError) as error:
        say_error(error)
        return 1
    return 0


def make_tasks(repeats: int = 1) -> list[Task]:
    """A question about each image. No two images have the same pixels."""
    return [_make_task(number, kind, repeat) for repeat in range(repeats) for number, kind in _SCENES]


def _make_task(number: int, kind: str, repeat: int = 0) -> Task:
    seed = FIRST_HELD_OUT_SEED + number
    scene = make_scene(seed, fonts=_FONTS)
    question = next(question for question in make_questions(scene, seed) if question.kind == kind)
    return Task(replace(scene, seed=seed + repeat * _BACKGROUNDS), question.text, question.answer)


def _write_images(folder: Path, tasks: Sequence[Task]) -> None:
    """Write demo-1.png and so on.

    Raises:
        DemoError: they cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, task in enumerate(tasks, 1):
            (folder / f"demo-{number}.png").write_bytes(task.png())
    except OSError as error:
        raise DemoError(f"the images cannot be written: {error}") from None


def _is_demo_model(model: str | None) -> bool:
    return model is None or Path(model).resolve() == MODEL_PATH.resolve()


def _ask_all(client: OpenAI, tasks: Sequence[Task], max_tokens: int, *, judged: bool) -> dict[str, list[Answer]]:
    """Ask everything at every budget, and print the answers as they come; those of a budget are in the tasks' order."""
    models = client.models.list().data
    if not models:
        raise DemoError("the server offers no model")
    model = models[0].id
    say("warming up")
    for budget in _BUDGETS:
        _ask(client, model, _make_task(*_WARM_UP), budget, max_tokens)
    answers: dict[str, list[Answer]] = {budget: [] for budget in _BUDGETS}
    what = "right" if judged else "drawn"
    for number, task in enumerate(tasks, 1):
        print(f"\nImage {number}: {task.question} ({what}: {task.right_answer})", flush=True)
        for budget in _BUDGETS:
            answer = _ask(client, model, task, budget, max_tokens)
            answers[budget].append(answer)
            mark = "   <- wrong" if judged and not task.is_right(answer.text) else ""
            print(f"{budget:>8}: {_printable(answer.text)}{mark}", flush=True)
    return answers


def _ask(client: OpenAI, model: str, task: Task, budget: str, max_tokens: int) -> Answer:
    """One request.

    Raises:
        DemoError: the stream held no count of visual tokens.
    """
    data_url = f"data:image/png;base64,{base64.b64encode(task.png()).decode()}"
    started = time.perf_counter()
    first_token_seconds = counts = None
    text = ""
    with client.chat.completions.create(
        model=model,
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": data_url}},
                    {"type": "text", "text": task.question},
                ],
            }
        ],
        temperature=0,
        max_tokens=max_tokens,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"visual_token_budget": budget},
    ) as stream:
        for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                text += chunk.choices[0].delta.content
                if first_token_seconds is None:
                    first_token_seconds = time.perf_counter() - started
            if chunk.usage is not None:
                counts = (chunk.usage.model_extra or {}).get("visual_tokens")
    total_seconds = time.perf_counter() - started
    if counts is None:
        raise DemoError("the server's usage holds no visual_tokens")
    if first_token_seconds is None:
        first_token_seconds = total_seconds  # an answer without a word
    return Answer(text, counts["full"], counts["kept"], counts["saved"], first_token_seconds, total_seconds)


def _score(tasks: Sequence[Task], answers: Mapping[str, Sequence[Answer]]) -> str:
    shares = []
    for budget, given in answers.items():
        num_right = sum(task.is_right(answer.text) for task, answer in zip(tasks, given, strict=True))
        shares.append(f"{budget} {num_right} of {len(tasks)}")
    return f"Right answers: {', '.join(shares)}."


def _table(answers: Mapping[str, Sequence[Answer]]) -> str:
    """Counts are the same for all requests of a budget; times are medians."""
    lines = [
        f"{'budget':<8}{'visual tokens':>14}{'kept':>8}{'saved':>8}{'':>9}{'first token':>14}{'total':>10}",
        "-" * 71,
    ]
    for budget, measured in answers.items():
        counts = measured[0]
        share = counts.saved / counts.full if counts.full else 0.0
        first_token = statistics.median(answer.first_token_seconds for answer in measured)
        total = statistics.median(answer.total_seconds for answer in measured)
        lines.append(
            f"{budget:<8}{counts.full:>14,}{counts.kept:>8,}{counts.saved:>8,}{share:>9.1%}"
            f"{first_token:>12.3f} s{total:>8.3f} s"
        )
    return "\n".join(lines)


@contextlib.contextmanager
def _server(model: str | None, engine_options: Sequence[str]) -> Generator[str, None, None]:
    """A running `visiondrop serve`; gives its URL once it is ready, and stops it in the end.

    Raises:
        DemoError: it did not start.
    """
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    named = [] if model is None else [model]
    command = [sys.executable, "-m", "server.cli", "serve", *named, "--port", str(port)]
    if engine_options:
        command += ["--", *engine_options]
    # A process group of its own, so that Ctrl-C reaches the server once, from here: a second one would mean "at once".
    # Its standard output is the request log; its messages to people are on standard error.
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, process_group=0)
    try:
        _wait_ready(process, url)
        yield url
    finally:
        _stop(process)


def _wait_ready(process: subprocess.Popen[bytes], url: str) -> None:
    """The server reports its progress, and gives up by itself when the engine takes too long."""
    while process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/ready", timeout=5, trust_env=False).status_code == 200:
                return
        time.sleep(0.2)
    raise DemoError(f"the server did not start (exit status {process.returncode}); its own message is above")


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGINT)
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # the second one ends the server and its engine at once
        process.wait()


@contextlib.contextmanager
def _terminations_as_interrupts() -> Generator[None, None, None]:
    """SIGTERM and a closed terminal stop the server, too."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, interrupt) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _printable(text: str) -> str:
    """On one line. A model's words may hold control characters, which are not the terminal's to obey."""
    line = " ".join(text.split()) or "(nothing)"
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in line)
