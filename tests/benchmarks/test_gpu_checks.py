"""What the steps of `make gpu` make of what they find: fake programs on the PATH, answers and logs made up."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_programs import put

from benchmarks.gpu import machine, programs
from benchmarks.gpu.context import Context
from benchmarks.gpu.engine_log import _LATE_COMPILATION, facts_of
from benchmarks.gpu.half_precision import share_equal as share_of_patches
from benchmarks.gpu.machine import find_gpus
from benchmarks.gpu.processes import run
from benchmarks.gpu.profile import profile_gpu, shares_of_stacks
from benchmarks.gpu.questions import (
    BUDGETS,
    Answers,
    Reply,
    ask,
    ask_all,
    ask_at_once,
    check_right,
    first_token_ms,
    share_equal,
)
from benchmarks.gpu.server import Server, serve
from benchmarks.gpu.step import SKIPPED_STATUS, StepError, read_figures, read_reason, tail, tell, tell_reason
from server.demo import make_tasks
from vd_plugin.demo import MODEL_PATH

ROOT = Path(__file__).parents[2]


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context("eager", str(MODEL_PATH), tmp_path, 1)


def figures(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return read_figures(capsys.readouterr().out)


def test_a_step_s_output_tells_its_figures_and_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    tell(graphs="FULL", seconds=1.5)
    print("starting\nloading")
    tell(seconds=2.5)
    output = capsys.readouterr().out
    assert read_figures(output) == {"graphs": "FULL", "seconds": 2.5}
    assert read_reason(output) == "loading"
    tell_reason("one\n  two")
    output += capsys.readouterr().out
    assert read_reason(output) == "one two"
    assert tail(output, 1) == "loading"


# The machine


def test_gpus_are_those_that_nvidia_smi_lists(programs_folder: Path) -> None:
    assert find_gpus() == []
    put(programs_folder, "nvidia-smi", "echo 'NVIDIA L40, 550.54.15, 46068'; echo 'NVIDIA L40, 550.54.15, 46068'")
    first, second = find_gpus()
    assert first == second
    assert str(first) == "NVIDIA L40, 45 GiB, driver 550.54.15"
    assert not first.has_new_driver
    put(programs_folder, "nvidia-smi", "echo 'no devices were found'; exit 6")
    assert find_gpus() == []


@pytest.mark.parametrize(
    ("driver", "sentence"),
    [("570.86.15", r"the driver 570.86.15 is older than 580"), ("580.65.06", r"the packages here are for CPUs")],
)
def test_a_gpu_that_cannot_be_used_fails_the_first_step(
    context: Context, programs_folder: Path, capsys: pytest.CaptureFixture[str], driver: str, sentence: str
) -> None:
    import torch

    if torch.version.cuda is not None:
        pytest.skip("the packages here are for GPUs")
    put(programs_folder, "nvidia-smi", f"echo 'NVIDIA H100, {driver}, 81559'")
    put(programs_folder, "nvcc", "echo 'Cuda compilation tools, release 13.0, V13.0.48'")
    with pytest.raises(StepError, match=sentence):
        machine.machine(context)
    told = figures(capsys)
    assert told["gpus"] == [f"NVIDIA H100, 80 GiB, driver {driver}"]
    assert (told["nvcc"], told["ninja"], told["torch"]) == ("13.0", "not found", torch.__version__)


# Questions


Answer = Callable[[Any], httpx.Response]


def server(answer: Answer, log: Path = Path("/nowhere")) -> Server:
    """A server that is a function of a request's body."""
    transport = httpx.MockTransport(lambda request: answer(json.loads(request.content)))
    return Server(httpx.Client(transport=transport, base_url="http://server"), "m", log, 0, 1.0)


def stream(words: list[str], counts: dict[str, int] | None = None) -> httpx.Response:
    chunks: list[dict[str, Any]] = [
        {"choices": [{"delta": {"content": word}, "logprobs": {"content": [{"token": word}]}}]} for word in words
    ]
    chunks.append({"choices": [], "usage": {"visual_tokens": counts} if counts else {}})
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
    return httpx.Response(200, text="".join([*lines, "data: [DONE]\n\n"]))


def knowing(body: Any) -> httpx.Response:
    """The demo's answers, with the counts of its images."""
    content = body["messages"][0]["content"]
    answers = {task.question: task.right_answer for task in make_tasks()}
    budget = body.get("visual_token_budget")
    counts = None if budget is None else {"full": 1312, "kept": 1312 if budget == "full" else budget}
    assert len(content) == (1 if budget is None else 2)
    return stream([answers[content[-1]["text"]]], counts)


def test_every_question_is_asked_at_every_budget() -> None:
    replies = ask_all(server(knowing), make_tasks())
    assert [reply.asked for reply in replies] == [*BUDGETS] * 4
    assert len({reply.name for reply in replies}) == 20
    assert check_right(str(MODEL_PATH), replies) == "16 of 16"
    assert check_right("another", replies) is None
    assert first_token_ms(replies).keys() == {"160", "320", "640", "full", "text"}


def test_many_are_asked_at_once() -> None:
    tasks = make_tasks(3)[:9]
    replies = ask_at_once(server(knowing), tasks)
    assert [reply.asked for reply in replies] == [*BUDGETS, *BUDGETS[:4]]
    assert [reply.name.partition(" ")[0] for reply in replies] == [str(task.scene.seed) for task in tasks]


@pytest.mark.parametrize(
    ("asked", "counts"),
    [
        (320, {"full": 1312, "kept": 321}),
        (320, {"full": 0, "kept": 0}),
        (320, None),
        ("full", {"full": 1312, "kept": 1311}),
        (None, {"full": 1312, "kept": 640}),
    ],
)
def test_an_answer_with_other_counts_than_its_budget_s_fails(asked: Any, counts: dict[str, int] | None) -> None:
    with pytest.raises(StepError, match="visual tokens are kept"):
        ask(server(lambda _: stream(["red"], counts)), make_tasks()[0], asked)


def test_a_request_that_fails_says_why_the_engine_did(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    log.write_text("ERROR RuntimeError: GPU<->CPU sync detected - avoid it\n")

    def dies(_: Any) -> httpx.Response:
        raise httpx.ReadError("gone")

    failures: list[tuple[Answer, str]] = [
        (lambda _: httpx.Response(502, text="the engine is gone"), "status 502: the engine is gone"),
        (lambda _: httpx.Response(200, text='data: {"error": {"message": "cut"}}\n\n'), "cut"),
        (dies, "gone"),
    ]
    for answer, words in failures:
        with pytest.raises(StepError, match=words) as error:
            ask(server(answer, log), make_tasks()[0], 160)
        assert "GPU<->CPU sync detected" in str(error.value)
    with pytest.raises(StepError, match="without a token"):
        ask(server(lambda _: stream([])), make_tasks()[0], 160)


def reply(asked: Any, *, right: bool) -> Reply:
    return Reply("a question", asked, ("red",), right, 0.1)


def test_a_demo_model_that_answers_wrongly_in_full_fails() -> None:
    wrong_at_160 = [reply(160, right=False)] * 4
    assert check_right(str(MODEL_PATH), [*wrong_at_160, *[reply("full", right=True)] * 4]) == "4 of 8"
    with pytest.raises(StepError, match="2 of 4 questions in full"):
        check_right(str(MODEL_PATH), [reply("full", right=number < 2) for number in range(4)])


def test_answers_are_compared_with_those_of_an_earlier_step(tmp_path: Path) -> None:
    answers = Answers(tmp_path)
    assert answers.of("eager") is None
    answers.keep("eager", [reply(160, right=True)])
    assert answers.of("eager") == {"a question": ["red"]}
    ours = {str(number): ["a", "b"] for number in range(10)}
    assert share_equal(ours, ours) == 1
    assert share_equal(ours, {**ours, "3": ["a"], "7": ["b", "b"]}) == 0.8
    with pytest.raises(StepError, match="3 of 10 answers differ: 1, 3, 7"):
        share_equal(ours, {**ours, "1": ["c"], "3": ["a"], "7": ["b", "b"]})
    with pytest.raises(StepError, match="no question in common"):
        share_equal(ours, {})


def test_a_server_that_does_not_start_fails_with_its_engine_s_sentence(tmp_path: Path) -> None:
    with (
        pytest.raises(StepError, match=r"did not start: .*no such model folder"),
        serve("/no/such/folder", tmp_path / "engine.log"),
    ):
        pass


# Logs and tables of others


LOG = """\
(EngineCore) INFO [core.py:133] Initializing a V1 LLM engine with config: dtype=torch.bfloat16, max_seq_len=8192, \
compilation_config={'mode': <CompilationMode.VLLM_COMPILE: 3>, 'cudagraph_mode': <CUDAGraphMode.FULL_AND_PIECEWISE: \
(2, 1)>, 'cudagraph_capture_sizes': [1, 2, 4, 512], 'x': 1}
(Worker) INFO [cuda.py:506] Using FLASH_ATTN attention backend out of potential backends: ['FLASH_ATTN', 'TRITON_ATTN'].
(EngineCore) INFO [utils.py:347] Using LBHNC KV cache layout.
(EngineCore) INFO [kv_cache_utils.py:2327] GPU KV cache size: 462,144 tokens, Maximum concurrency for 8,192: 32.00x
(Worker) INFO [model_runner.py:1126] Graph capturing finished in 12 secs, took 0.53 GiB
(Worker) INFO VisionDrop: the KV cache of 8192 blocks holds images of 448x448: 186 at full (44 blocks each), \
372 at high (22 blocks each)
(Worker) WARNING [jit_monitor.py:140] Triton kernel JIT compilation during inference: f. This causes a latency spike
"""


def test_an_engine_s_log_tells_what_vllm_made_of_its_defaults(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    assert facts_of(log) == {"late_compilations": 0}
    log.write_text(LOG)
    assert facts_of(log) == {
        "compilation": "VLLM_COMPILE",
        "graphs": "FULL_AND_PIECEWISE",
        "dtype": "bfloat16",
        "backend": "FLASH_ATTN",
        "layout": "LBHNC",
        "kv_cache_tokens": "462,144",
        "graph_seconds": "12",
        "graph_gib": "0.53",
        "images": {"full": 186, "high": 372},
        "graph_sizes": "4 up to 512",
        "late_compilations": 1,
    }


def test_the_words_of_the_log_are_vllms_own() -> None:
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")
    folder = Path(spec.origin).parent
    for file, words in (
        ("platforms/cuda.py", '"Using %s attention backend out of'),
        ("v1/attention/backends/utils.py", '"Using %s KV cache layout."'),
        ("v1/core/kv_cache_utils.py", '"%s KV cache size: %s tokens, "'),
        ("v1/worker/gpu/model_runner.py", '"Graph capturing finished in %.0f secs, took %.2f GiB"'),
        ("v1/metrics/loggers.py", '"vllm:num_preemptions"'),
        ("config/attention.py", "flash_attn_version: Literal[2, 3, 4] | None"),
    ):
        assert words in (folder / file).read_text(), file
    monitor = (folder / "utils/jit_monitor.py").read_text()
    assert '"%s %s during inference' in monitor
    assert f'event="{_LATE_COMPILATION.removesuffix(" during inference")}"' in monitor


def test_shares_of_a_profile_count_its_samples() -> None:
    stacks = """\
run (core.py:1);step (core.py:2);schedule (vllm/v1/core/sched/scheduler.py:3);allocate (vd_plugin/kv_cache.py:9) 30
run (core.py:1);step (core.py:2);execute_model (worker.py:4) 60
idle (threading.py:7) 10
"""
    assert shares_of_stacks(stacks) == {
        "samples": 100, "share_plugin": 0.3, "share_schedule": 0.3, "share_execute_model": 0.6
    }  # fmt: skip


def explanation(*columns: int, rows: int = 4) -> dict[str, Any]:
    kept = [{"view": "base", "row": 0, "column": column} for column in columns]
    return {"stages": [{"rows": rows, "dominant": kept}]}


def test_equal_patches_are_counted_stage_by_stage() -> None:
    ours = [explanation(1, 2, 3, 4), explanation(1, 2, 3, 4)]
    assert share_of_patches(ours, ours) == {"stage 0": 1}
    assert share_of_patches(ours, [ours[0], explanation(1, 2, 5, 6)]) == {"stage 0": 0.75}
    with pytest.raises(StepError, match="stage 0 has 4 rows in one and 5 in the other"):
        share_of_patches(ours[:1], [explanation(1, 2, 3, 4, rows=5)])


# Programs


@pytest.mark.parametrize(
    ("body", "counts", "sentence"),
    [
        ("def test_one(): pass\ndef test_two(): pass", {"passed": 2}, None),
        ("def test_one(): pass\ndef test_two(): assert 0", {"passed": 1, "failed": 1}, "1 tests failed: test_two"),
        ("import pytest\n@pytest.mark.skip\ndef test_one(): pass", {"skipped": 1}, "no test to its end"),
        ("import os\ndef test_one(): os.abort()", {}, "no test to its end"),
    ],
)
def test_tests_are_counted_and_those_that_fail_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    body: str,
    counts: dict[str, int],
    sentence: str | None,
) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_law.py").write_text(body)
    monkeypatch.chdir(tmp_path)
    try:
        programs.run_tests("test_law.py", VISIONDROP_TEST_DTYPE="float32")
        said = None
    except StepError as error:
        said = str(error)
    assert figures(capsys) == counts
    assert said == sentence or (sentence is not None and sentence in str(said))


def test_laws_run_with_the_variables_of_the_tests(
    tmp_path: Path, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in programs.LAWS:
        assert (ROOT / "tests" / file).is_file()
    (tmp_path / "tests").mkdir()
    names = ("VISIONDROP_TEST_DTYPE", "VISIONDROP_TEST_EAGER")
    law = f"import os\ndef test_it(): open('seen', 'a').write(str([os.environ.get(name) for name in {names}]))"
    (tmp_path / "tests" / "test_law.py").write_text(law)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(programs, "LAWS", ("test_law.py",))
    programs.laws_float32(context)
    programs.laws_bfloat16(context)
    assert (tmp_path / "seen").read_text() == "['float32', None]['bfloat16', '0']"


def test_a_benchmark_s_marks_and_decode_steps_are_figures(
    context: Context, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    marks = [{"name": "stock / 320", "value": 4.12345, "bound": 4.9, "met": False}]
    decode = {"64 of text": {"text": {"stock": {"seconds": [2.0, 4.0, 1.0]}, "ours": {"seconds": [3.0, 4.0, 5.0]}}}}

    def fake(command: list[str]) -> str:
        asked.extend(command)
        return f"a table\n{json.dumps({'marks': marks, 'results': {'decode': decode}})}\n"

    from benchmarks.bench.__main__ import _parse
    from benchmarks.bench.report import PARTS

    monkeypatch.setattr(programs, "run_program", fake)
    for part in ("prefill", "decode", "throughput"):
        asked.clear()
        programs.bench(part)(context)
        assert figures(capsys) == {"stock / 320": 4.123, "step of 64 of text at text, ours / stock": 1.5}
        options = _parse(asked[3:])
        assert (asked[2], options.only, options.shape, options.model) == ("benchmarks.bench", part, "7b", None)
        assert part in PARTS
    asked.clear()
    programs.decode(context)
    assert _parse(asked[3:]).model == MODEL_PATH


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("echo '========= ERROR SUMMARY: 0 errors'", None),
        ("echo '========= Invalid __global__ read of size 4'; exit 9", "compute-sanitizer ended with status 9"),
        ("echo '========= ERROR SUMMARY: 2 errors'", "no summary without errors"),
        ("echo 'nothing was watched'", "no summary without errors"),
    ],
)
def test_memory_is_checked_if_the_tool_says_so(
    context: Context, programs_folder: Path, script: str, sentence: str | None
) -> None:
    put(
        programs_folder,
        "compute-sanitizer",
        f"echo $PYTORCH_NO_CUDA_MEMORY_CACHING $@ >{programs_folder}/asked\n{script}",
    )
    if sentence is None:
        programs.memcheck(context)
    else:
        with pytest.raises(StepError, match=sentence):
            programs.memcheck(context)
    asked = (programs_folder / "asked").read_text().split()
    assert asked[0] == "1"
    assert asked[asked.index(sys.executable) :] == [*programs.batch(context, 5, 4), "--eager"]


def test_a_gpu_s_profile_is_of_a_batch(context: Context, programs_folder: Path) -> None:
    put(programs_folder, "nsys", f"echo $@ >{programs_folder}/asked")
    profile_gpu(context)
    asked = (programs_folder / "asked").read_text().split()
    assert asked[asked.index(sys.executable) :] == programs.batch(context, 20, 32)


def test_a_program_that_fails_fails_its_step(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StepError, match="ended with status 9"):
        programs.run_program([sys.executable, "-c", "print('a violation'); raise SystemExit(9)"])
    assert "a violation" in capsys.readouterr().out, "the log of the step has it"


def test_what_a_step_raises_is_its_outcome(tmp_path: Path) -> None:
    """As the command that the runner starts: where FlashInfer is missing, and where a driver is old."""
    put(tmp_path, "nvidia-smi", "echo 'NVIDIA H100, 570.86.15, 81559'")
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    options = ["--model", str(MODEL_PATH), "--folder", str(tmp_path), "--gpus", "1"]
    for step, status, words in (
        ("flashinfer", SKIPPED_STATUS, "flashinfer is not installed"),
        ("machine", 1, "is older than 580"),
    ):
        if step == "flashinfer" and find_spec("flashinfer") is not None:
            continue
        log = tmp_path / "log"
        command = [sys.executable, "-m", "benchmarks.gpu.check", step, *options]
        assert run(command, log, 120, environment) == status
        assert words in read_reason(log.read_text())
