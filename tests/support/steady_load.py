"""Clients that ask all the time, each question known by its id, and what every one of them got."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from engines import draw
from images import data_url, encode

CHAT = "/v1/chat/completions"
STREAMED = {"stream": True, "stream_options": {"include_usage": True}}
BUDGETS: tuple[str | int, ...] = ("low", "medium", "high", "full", 100)


@dataclass(frozen=True)
class Question:
    """A request whose answer is the same whenever it is asked."""

    name: str
    path: str
    body: dict[str, Any] = field(compare=False)


@dataclass
class Outcome:
    """`parts` are the texts of the answer and the log-probability of each token.

    `failure` says what the client saw of a request that failed: a status, an error event, or a broken connection.
    """

    question: Question
    request_id: str
    began_at: float
    text: str = ""
    logprobs: list[float] = field(default_factory=list)
    failure: str | None = None

    def is_as(self, other: Outcome) -> bool:
        """Whether the answers are equal: every token, and its log-probability up to rounding."""
        pairs = list(zip(self.logprobs, other.logprobs, strict=False))
        same_length = len(self.logprobs) == len(other.logprobs)
        return self.text == other.text and same_length and all(abs(ours - theirs) < 1e-3 for ours, theirs in pairs)


def streams(num_tokens: int) -> list[Question]:
    """A stream about an image at every budget."""
    return [_chat(f"stream at {budget}", seed, budget, num_tokens, **STREAMED) for seed, budget in enumerate(BUDGETS)]


def long_answers(num_tokens: int) -> list[Question]:
    """Two whole answers that take as long as streams do."""
    return [_chat(f"long answer at {budget}", 20 + seed, budget, num_tokens) for seed, budget in enumerate(BUDGETS[:2])]


def short_questions() -> list[Question]:
    """Whole answers on every generating route, with images at every budget and without any."""
    found = [_chat(f"answer at {budget}", 50 + seed, budget, 3) for seed, budget in enumerate(BUDGETS)]
    text = {"prompt": "one two three", "max_tokens": 3, "ignore_eos": True, "temperature": 0}
    found.append(Question("completion", "/v1/completions", text))
    found.append(Question("streamed completion", "/v1/completions", {**text, **STREAMED}))
    response = {"input": "one two three", "max_output_tokens": 3, "temperature": 0}
    found.append(Question("response", "/v1/responses", response))
    return found


class SteadyLoad:
    """Asks the gateway at `url`. While it runs, `outcomes` grows, and `in_progress` has what is being answered."""

    def __init__(self, url: str, first_number: int = 0) -> None:
        self._client = httpx.Client(base_url=url, timeout=240)
        self._numbers = itertools.count(first_number)
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self.outcomes: list[Outcome] = []
        self.in_progress: dict[str, Outcome] = {}

    def ask(self, question: Question) -> Outcome:
        """One question alone; not among `outcomes`."""
        with self._lock:
            outcome = Outcome(question, f"load-{next(self._numbers)}", time.monotonic())
            self.in_progress[outcome.request_id] = outcome
        try:
            self._ask(outcome)
        except httpx.HTTPError as error:
            outcome.failure = repr(error)
        finally:
            with self._lock:
                del self.in_progress[outcome.request_id]
        return outcome

    @contextmanager
    def running(self, *clients: Sequence[Question], pause_seconds: float = 0.0) -> Iterator[None]:
        """Each client asks its questions over and over. At the end, what has begun is answered."""

        def run(questions: Sequence[Question]) -> None:
            for question in itertools.cycle(questions):
                if self._is_over.is_set():
                    return
                outcome = self.ask(question)
                with self._lock:
                    self.outcomes.append(outcome)
                time.sleep(pause_seconds)

        self._is_over.clear()
        threads = [threading.Thread(target=run, args=(questions,)) for questions in clients]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._is_over.set()
            for thread in threads:
                thread.join()

    def close(self) -> None:
        self._client.close()

    def _ask(self, outcome: Outcome) -> None:
        question = outcome.question
        headers = {"X-Request-Id": outcome.request_id}
        if not question.body.get("stream"):
            response = self._client.post(question.path, json=question.body, headers=headers)
            if response.status_code != 200:
                outcome.failure = f"status {response.status_code}: {response.text}"
                return
            _read_whole(response.json(), outcome)
            return
        with self._client.stream("POST", question.path, json=question.body, headers=headers) as response:
            if response.status_code != 200:
                outcome.failure = f"status {response.status_code}: {response.read().decode()}"
                return
            last = ""
            for line in response.iter_lines():
                if line.startswith("data: "):
                    last = line.removeprefix("data: ")
                    _read_event(last, outcome)
            if last != "[DONE]":
                outcome.failure = f"event: {last}"


def _chat(name: str, seed: int, budget: str | int, num_tokens: int, **fields: Any) -> Question:
    url = data_url(encode(draw(672, 672, seed)))
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": num_tokens, "ignore_eos": True}
    options = {"temperature": 0, "logprobs": True, "visual_token_budget": budget}
    return Question(name, CHAT, {**body, **options, **fields})


def _read_event(data: str, outcome: Outcome) -> None:
    if data == "[DONE]":
        return
    event = json.loads(data)
    for choice in event.get("choices", ()):
        _read_choice(choice, choice.get("delta", {}), outcome)


def _read_whole(answer: dict[str, Any], outcome: Outcome) -> None:
    for choice in answer.get("choices", ()):
        _read_choice(choice, choice.get("message", {}), outcome)
    for item in answer.get("output", ()):
        outcome.text += "".join(part.get("text", "") for part in item.get("content") or ())
    if answer.get("status") not in (None, "completed", "incomplete"):
        outcome.failure = f"status {answer['status']!r} of a response"


def _read_choice(choice: dict[str, Any], message: dict[str, Any], outcome: Outcome) -> None:
    outcome.text += message.get("content") or choice.get("text") or ""
    found = (choice.get("logprobs") or {}).get("content") or ()
    outcome.logprobs += [token["logprob"] for token in found]
    if choice.get("finish_reason") not in (None, "stop", "length"):
        outcome.failure = f"finish reason {choice['finish_reason']!r}"
