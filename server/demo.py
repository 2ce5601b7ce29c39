"""`visiondrop demo MODEL`: a server of its own, a drawn image, one question at every preset, and what that saved.

1. `visiondrop serve` is started as a child on a free port, and waited for.
2. Images are drawn, so nothing is fetched. Each request of a budget gets another one: an image that the engine has
   seen at the same budget would come out of its caches, and the figures would flatter.
3. Every budget is asked once unmeasured, then `--repeats` times; the table shows medians. The first measured answer is
   printed as it streams in.
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
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Final

import httpx
from PIL import Image, ImageDraw

from server.launcher.serve import say, say_error
from vd_plugin.schedule import FULL, PRESETS
from vd_plugin.wire import DEMO_MARKER

if TYPE_CHECKING:
    from openai import OpenAI

_QUESTION: Final = "Which shapes are in the image, and which of them is the largest?"
_SIDE: Final = 672
_COLOURS: Final = ("crimson", "royalblue", "seagreen", "darkorange", "purple", "teal")
_BUDGETS: Final = (FULL, *sorted(PRESETS, key=lambda name: -PRESETS[name]))
_STOP_SECONDS: Final = 30.0


class DemoError(Exception):
    """The demo cannot go on. The message is a sentence."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed answer: what the server counted, and what the client's clock said."""

    full: int
    kept: int
    saved: int
    first_token_seconds: float
    total_seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Serve MODEL, ask about a drawn image at every preset, and print what each saved."
    parser.add_argument("model", metavar="MODEL", help="a folder with a LLaVA checkpoint, or its name on the hub")
    parser.add_argument("--max-tokens", type=int, default=24, metavar="N", help="length of an answer (default: 24)")
    parser.add_argument(
        "--repeats", type=int, default=3, metavar="N", help="measured requests for each budget (default: 3)"
    )


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
        with _terminations_as_interrupts(), _server(arguments.model, getattr(arguments, "engine_options", [])) as url:
            client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
            answers = _ask_all(client, arguments.max_tokens, arguments.repeats)
            print(f"\n{_table(answers)}\n\nMedians of {arguments.repeats}, one request at a time.")
            if Path(arguments.model, DEMO_MARKER).exists():
                print("The demo checkpoint has random weights: its words are noise, the counts and times are real.")
    except (DemoError, OpenAIError, httpx.HTTPError) as error:
        say_error(error)
        return 1
    return 0


def _ask_all(client: OpenAI, max_tokens: int, repeats: int) -> dict[str, list[Answer]]:
    models = client.models.list().data
    if not models:
        raise DemoError("the server offers no model")
    model = models[0].id
    say("warming up")
    for budget in _BUDGETS:
        _ask(client, model, 0, budget, max_tokens, show=False)
    say(f"asking about a {_SIDE} x {_SIDE} image: {_QUESTION}")
    answers: dict[str, list[Answer]] = {budget: [] for budget in _BUDGETS}
    for number in range(1, repeats + 1):
        for budget in _BUDGETS:
            if number == 1:
                print(f"\n{budget:>6}: ", end="", flush=True)
            answers[budget].append(_ask(client, model, number, budget, max_tokens, show=number == 1))
    print(flush=True)
    return answers


def _ask(client: OpenAI, model: str, image: int, budget: str, max_tokens: int, *, show: bool) -> Answer:
    """One request about image number `image`.

    Raises:
        DemoError: the stream held no text, or no count of visual tokens.
    """
    data_url = f"data:image/png;base64,{base64.b64encode(_png(image)).decode()}"
    started = time.perf_counter()
    first_token_seconds = counts = None
    with client.chat.completions.create(
        model=model,
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": data_url}},
                    {"type": "text", "text": _QUESTION},
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
            text = chunk.choices[0].delta.content if chunk.choices else None
            if text:
                if first_token_seconds is None:
                    first_token_seconds = time.perf_counter() - started
                if show:
                    print(_printable(text), end="", flush=True)
            if chunk.usage is not None:
                counts = (chunk.usage.model_extra or {}).get("visual_tokens")
    total_seconds = time.perf_counter() - started
    if first_token_seconds is None:
        raise DemoError(f"the answer at budget {budget} is empty")
    if counts is None:
        raise DemoError("the server's usage holds no visual_tokens")
    return Answer(counts["full"], counts["kept"], counts["saved"], first_token_seconds, total_seconds)


def _png(number: int) -> bytes:
    """Image `number`: a circle, a square, a triangle and a line of text. No two numbers give the same pixels."""
    image = Image.new("RGB", (_SIDE, _SIDE), "white")
    draw = ImageDraw.Draw(image)
    circle, square, triangle = (_COLOURS[(number + place) % len(_COLOURS)] for place in (0, 1, 2))
    draw.ellipse((60, 60, 340 + number, 340 + number), fill=circle)
    draw.rectangle((400, 90, 580, 270), fill=square)
    draw.polygon([(180, 560), (320, 400), (460, 560)], fill=triangle)
    draw.text((60, 600), f"VisionDrop, image {number}", fill="black", font_size=36)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _table(answers: dict[str, list[Answer]]) -> str:
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
def _server(model: str, engine_options: Sequence[str]) -> Generator[str, None, None]:
    """A running `visiondrop serve`; gives its URL once it is ready, and stops it in the end.

    Raises:
        DemoError: it did not start.
    """
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "server.cli", "serve", model, "--port", str(port)]
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
    """A model's words may hold control characters, which are not the terminal's to obey."""
    return "".join(
        character if character.isprintable() or character == "\n" else "\N{REPLACEMENT CHARACTER}" for character in text
    )
