"""Steps of `make gpu` that serve a model: with which options, and what fails them. The servers are made up."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.gpu import little_memory, serving
from benchmarks.gpu.context import Context
from benchmarks.gpu.server import Server
from benchmarks.gpu.step import StepError, read_figures
from server.demo import make_tasks
from vd_plugin.demo import MODEL_PATH
from vd_plugin.flashinfer import SWITCH

ROOT = Path(__file__).parents[2]
RIGHT = {task.question: task.right_answer for task in make_tasks()}


@dataclass
class Servers:
    """Stands for `serve`: each server answers as `answer` does, and has `log` for its engine's log."""

    answer: Callable[[Any], httpx.Response]
    log: Callable[[Sequence[str]], str] = lambda options: ""
    started: list[tuple[list[str], Mapping[str, str] | None]] = field(default_factory=list)
    bodies: list[Any] = field(default_factory=list)

    @contextmanager
    def __call__(
        self, model: str, log: Path, options: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ) -> Generator[Server]:
        self.started.append((list(options), environment))
        log.write_text(self.log(options))
        with httpx.Client(transport=httpx.MockTransport(self._reply), base_url="http://server") as client:
            yield Server(client, "m", log, 0, 1.0)

    def _reply(self, request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return self.answer(None)
        body = json.loads(request.content)
        self.bodies.append(body)
        return self.answer(body)


def knowing(body: Any) -> httpx.Response:
    """The demo's answers, streamed if asked for."""
    budget = body.get("visual_token_budget")
    content = body["messages"][0]["content"]
    word = RIGHT[content if isinstance(content, str) else content[-1]["text"]]
    logprobs = {"content": [{"token": word}]}
    if not body.get("stream"):
        return httpx.Response(200, json={"choices": [{"logprobs": logprobs}]})
    kept = 1312 if budget == "full" else budget
    usage = {"visual_tokens": {"full": 1312, "kept": kept}} if budget else {}
    chunks = [{"choices": [{"delta": {"content": word}, "logprobs": logprobs}]}, {"choices": [], "usage": usage}]
    return httpx.Response(200, text="".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks))


def hesitant(body: Any) -> httpx.Response:
    """Right answers, and another word before each."""
    told = knowing(body).text.split("\n\n")
    first = {"choices": [{"delta": {"content": ""}, "logprobs": {"content": [{"token": " "}]}}]}
    return httpx.Response(200, text="\n\n".join([f"data: {json.dumps(first)}", *told]))


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context("eager", str(MODEL_PATH), tmp_path, 1)


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Servers:
    servers = Servers(knowing)
    monkeypatch.setattr(serving, "serve", servers)
    return servers


def figures(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return read_figures(capsys.readouterr().out)


def test_the_first_server_is_eager_and_takes_waits_for_the_gpu_as_errors(
    context: Context, servers: Servers, capsys: pytest.CaptureFixture[str]
) -> None:
    serving.eager(context)
    assert servers.started == [(["--enforce-eager"], {"VLLM_GPU_SYNC_CHECK": "error"})]
    told = figures(capsys)
    assert told["right"] == "16 of 16"
    assert "equal_to_eager" not in told
    assert len(servers.bodies) == 25, "four images and one before them, at four budgets and without"
    urls = [part["image_url"]["url"] for body in servers.bodies for part in body["messages"][0]["content"][:-1]]
    assert len(set(urls)) == 5


def test_later_servers_must_answer_as_the_first(
    context: Context, servers: Servers, capsys: pytest.CaptureFixture[str]
) -> None:
    serving.eager(context)
    later = replace(context, step="defaults")
    serving.defaults(later)
    assert servers.started[1] == ([], None)
    assert figures(capsys)["equal_to_eager"] == 1
    servers.answer = hesitant
    with pytest.raises(StepError, match="20 of 20 answers differ"):
        serving.defaults(later)
    assert figures(capsys)["right"] == "16 of 16"


def test_another_back_end_must_be_the_one_that_was_asked_for(context: Context, servers: Servers) -> None:
    servers.log = lambda options: f"Using {options[1]} attention backend out of potential backends: ['X']."
    serving.triton(context)
    assert servers.started == [(["--attention-backend", "TRITON_ATTN"], None)]
    servers.log = lambda options: "Using FLASH_ATTN attention backend out of potential backends: ['X']."
    with pytest.raises(StepError, match="FLASH_ATTN instead"):
        serving.triton(context)


@pytest.mark.parametrize(("num_gpus", "sizes"), [(1, (3, 9, 200)), (0, (3, 9))])
def test_a_burst_has_new_images_at_all_budgets(
    context: Context, servers: Servers, capsys: pytest.CaptureFixture[str], num_gpus: int, sizes: tuple[int, ...]
) -> None:
    serving.burst(replace(context, num_gpus=num_gpus))
    assert len(servers.bodies) == sum(sizes)
    urls = [part["image_url"]["url"] for body in servers.bodies for part in body["messages"][0]["content"][:-1]]
    assert len(set(urls)) == len(urls)
    assert {f"{size}_at_once_seconds" for size in sizes} <= figures(capsys).keys()


def test_the_bare_start_has_no_path_and_no_choice_of_a_sampler(
    context: Context, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SWITCH, "0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    serving.bare_path(context)
    ((_, environment),) = servers.started
    assert environment is not None
    assert environment["PATH"] == "/usr/bin:/bin"
    assert SWITCH not in environment
    assert environment["CUDA_VISIBLE_DEVICES"] == "3"
    assert servers.bodies[0]["top_p"] < 1
    servers.answer = lambda body: httpx.Response(500, text="nvcc is not found")
    with pytest.raises(StepError, match="nvcc is not found"):
        serving.bare_path(context)


def mode(options: Sequence[str]) -> str:
    compiles = json.loads(options[-1])["visiondrop"]["compile"]
    return f"config: {{'mode': <CompilationMode.{'VLLM_COMPILE: 3' if compiles else 'NONE: 0'}>}}\n"


def test_compiled_stages_take_turns_with_others(
    context: Context, servers: Servers, capsys: pytest.CaptureFixture[str]
) -> None:
    servers.log = mode
    serving.compiled(context)
    told = figures(capsys)
    assert (told["compiled_compilation"], told["not_compiled_compilation"]) == ("VLLM_COMPILE", "NONE")
    assert told["equal"] == 1
    assert told["compiled_first_token_ms"].keys() == told["not_compiled_first_token_ms"].keys()
    for options, _ in servers.started:
        share = float(options[options.index("--gpu-memory-utilization") + 1])
        assert share * 2 < 0.9, "both fit one GPU"
    servers.log = lambda options: "'mode': <CompilationMode.NONE: 0>"
    with pytest.raises(StepError, match="both engines have compilation mode NONE"):
        serving.compiled(context)


def test_the_7b_is_compared_with_random_weights(
    context: Context, servers: Servers, capsys: pytest.CaptureFixture[str]
) -> None:
    servers.log = mode
    servers.answer = hesitant
    serving.compiled_7b(context)
    told = figures(capsys)
    assert told["compiled_first_token_ms"]
    assert "equal" not in told
    assert told["right"] is None
    assert all(options[options.index("--load-format") + 1] == "dummy" for options, _ in servers.started)


@pytest.mark.parametrize(
    ("preemptions", "words", "sentence"),
    [((0, 4), ("a", "a"), None), ((3, 3), ("a", "a"), "nothing was preempted"), ((0, 4), ("a", "b"), "answers differ")],
)
def test_little_memory_preempts_and_answers_as_alone(
    context: Context,
    monkeypatch: pytest.MonkeyPatch,
    preemptions: tuple[int, int],
    words: tuple[str, str],
    sentence: str | None,
) -> None:
    counts = iter(preemptions)

    def answer(body: Any) -> httpx.Response:
        if body is None:
            return httpx.Response(200, text=f'vllm:num_preemptions_total{{engine="0"}} {float(next(counts))}\n')
        word = words[len(servers.bodies) > 12]
        return httpx.Response(200, json={"choices": [{"logprobs": {"content": [{"token": word}]}}]})

    servers = Servers(answer)
    monkeypatch.setattr(little_memory, "serve_engine", servers)
    if sentence is None:
        little_memory.little_memory(context)
    else:
        with pytest.raises(StepError, match=sentence):
            little_memory.little_memory(context)
    assert len(servers.bodies) == 24


@pytest.mark.engine
@pytest.mark.slow
def test_the_first_steps_pass_on_the_real_engine(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--only", "machine,eager", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout
    machine, eager = json.loads(done.stdout.splitlines()[-1])["steps"]
    assert machine["figures"]["torch"]
    assert eager["figures"]["graphs"] == "NONE"
    assert eager["figures"]["images"].keys() == {"full", "high", "medium", "low"}
    assert eager["figures"]["kv_cache_tokens"]
    assert eager["figures"]["layout"]
