"""The whole way on the real engine: `visiondrop serve` as a process of its own, asked by the official OpenAI client."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from bad_images import image_cases
from engines import draw
from openai.types.chat import ChatCompletion
from PIL import Image
from served import START_SECONDS, Server, data_url, free_port, process, served_model, wait_until_ready

from vd_plugin.demo import MODEL_NAME
from vd_plugin.demo.questions import normalize
from vd_plugin.demo.scenes import draw as draw_scene
from vd_plugin.demo.split import evaluation_split
from vd_plugin.schedule import FULL, PRESETS, Geometry, Schedule, parse_budget, resolve

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.fixture(scope="module")
def server(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served_model(random_model, tmp_path_factory.mktemp("server")) as server:
        yield server
        child = server.child
        descendants = psutil.Process(child.pid).children(recursive=True)
        assert len(descendants) >= 2, "an API server and an engine core"
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=30) == 0
        assert not psutil.wait_procs(descendants, timeout=5)[1], "no orphan"


@pytest.fixture(scope="module")
def geometry(random_model: Path) -> Geometry:
    from transformers import AutoConfig

    from vd_plugin.options import read_geometry

    return read_geometry(AutoConfig.from_pretrained(random_model))


def visual_tokens(answer: ChatCompletion) -> dict[str, Any]:
    assert answer.usage is not None
    return answer.usage.model_dump()["visual_tokens"]


def expected(*schedules: Schedule) -> dict[str, Any]:
    return {
        "images": len(schedules),
        "full": sum(schedule.full for schedule in schedules),
        "kept": sum(schedule.kept for schedule in schedules),
        "saved": sum(schedule.saved for schedule in schedules),
        "per_image": [
            {
                "budget": FULL if schedule.is_full else schedule.budget,
                "full": schedule.full,
                "kept": schedule.kept,
                "stages": list(schedule.rows),
            }
            for schedule in schedules
        ],
    }


@pytest.mark.parametrize("budget", [*PRESETS, FULL, 32, 100_000, None])
def test_each_budget_is_served_and_reported(server: Server, geometry: Geometry, budget: str | int | None) -> None:
    image = draw(672, 672)
    extra = {} if budget is None else {"visual_token_budget": budget}
    answer = server.ask(image, extra_body=extra)
    schedule = resolve(geometry, 672, 672, parse_budget("high" if budget is None else budget))
    assert answer.choices[0].message.content
    assert visual_tokens(answer) == expected(schedule)
    details = answer.usage.model_dump()["prompt_tokens_details"]
    assert details["image_tokens"] == schedule.num_placeholders
    assert details["text_tokens"] + details["image_tokens"] == answer.usage.prompt_tokens


def test_two_images_and_no_image(server: Server, geometry: Geometry) -> None:
    answer = server.ask(draw(300, 500, 1), draw(800, 200, 2), extra_body={"visual_token_budget": 320})
    assert visual_tokens(answer) == expected(resolve(geometry, 500, 300, 320), resolve(geometry, 200, 800, 320))
    answer = server.ask(question="Hello?")
    assert answer.choices[0].message.content
    assert visual_tokens(answer) == {"images": 0, "full": 0, "kept": 0, "saved": 0, "per_image": []}


def test_stream_tells_the_same(server: Server) -> None:
    image = draw(336, 672, 3)
    options = {"extra_body": {"visual_token_budget": "low"}, "max_tokens": 6}
    whole = server.ask(image, **options)
    chunks = list(server.ask(image, stream=True, stream_options={"include_usage": True}, **options))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.model_dump()["visual_tokens"] == visual_tokens(whole)
    assert not any(chunk.usage for chunk in server.ask(image, stream=True, **options))


def test_turns_with_images_in_the_history(server: Server) -> None:
    def user(image: Image.Image, text: str) -> dict[str, Any]:
        url = {"type": "image_url", "image_url": {"url": data_url(image)}}
        return {"role": "user", "content": [url, {"type": "text", "text": text}]}

    messages: list[Any] = [user(draw(336, 336, 1), "One?"), {"role": "assistant", "content": "one"}]
    messages.append(user(draw(400, 400, 2), "Two?"))
    answer = server.client.chat.completions.create(
        model=server.model, messages=messages, max_tokens=2, extra_body={"visual_token_budget": "low"}
    )
    assert visual_tokens(answer)["images"] == 2


@pytest.mark.parametrize("budget", [0, 31, -1, 1.5, True, "lots"])
def test_bad_budgets_get_one_sentence_and_serving_goes_on(server: Server, budget: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        server.ask(draw(64, 64), extra_body={"visual_token_budget": budget})
    assert refusal.value.param == "visual_token_budget"
    assert "Traceback" not in str(refusal.value)
    assert server.ask(draw(64, 64)).choices


def test_an_image_that_is_none_is_refused(server: Server) -> None:
    url = "data:image/png;base64," + base64.b64encode(b"no picture").decode()
    content: Any = [{"type": "image_url", "image_url": {"url": url}}]
    with pytest.raises(openai.BadRequestError) as refusal:
        server.client.chat.completions.create(model=server.model, messages=[{"role": "user", "content": content}])
    assert refusal.value.param == "messages[0].content[0].image_url.url"


def test_metrics_count_what_was_saved(server: Server) -> None:
    def saved() -> float:
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        prefix = 'visiondrop_visual_tokens_saved_total{budget_class="medium"}'
        return float(next(line for line in lines if line.startswith(prefix)).split()[-1])

    before = saved()
    answer = server.ask(draw(500, 500), extra_body={"visual_token_budget": "medium"})
    assert saved() - before == visual_tokens(answer)["saved"] > 0
    mismatches = [line for line in httpx.get(f"{server.url}/metrics").text.splitlines() if "mismatch_total" in line]
    assert float(mismatches[-1].split()[-1]) == 0


@pytest.mark.parametrize(
    ("model", "sentence"), [("/no/such/model", "no such model folder"), ("EMPTY", "holds no config.json")]
)
def test_unusable_models_end_with_one_sentence(tmp_path: Path, model: str, sentence: str) -> None:
    folder = str(tmp_path) if model == "EMPTY" else model
    port = str(free_port())
    command = [sys.executable, "-m", "server.cli", "serve", folder, "--port", port]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert sentence in run.stderr.splitlines()[-1]
    assert "Traceback" not in run.stderr


def series(url: str, name: str) -> float:
    """The sum of a metric's series."""
    lines = [line for line in httpx.get(url).text.splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
    assert lines, name
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def wait_for(is_so: Callable[[], bool], seconds: float) -> float:
    """Seconds until it is so."""
    began = time.monotonic()
    while not is_so():
        assert time.monotonic() - began < seconds, f"not so after {seconds} s"
        time.sleep(0.05)
    return time.monotonic() - began


def test_images_of_one_request_choose_for_themselves_as_announced(server: Server, geometry: Geometry) -> None:
    wishes = [{"detail": "low"}, {"visual_token_budget": 100}, {"detail": "original"}, {}]
    content: list[Any] = [
        {"type": "image_url", "image_url": {"url": data_url(draw(500, 400, seed)), **wish}}
        for seed, wish in enumerate(wishes)
    ]
    messages: list[Any] = [{"role": "user", "content": content}]
    body = {"model": server.model, "messages": messages, "visual_token_budget": "medium"}
    announced = httpx.post(f"{server.url}/v1/visual_tokens/count", json=body).json()
    answer = server.client.chat.completions.create(
        model=server.model, messages=messages, max_tokens=2, extra_body={"visual_token_budget": "medium"}
    )
    assert visual_tokens(answer) == announced["requested"]
    budgets: list[Any] = [160, 100, FULL, 320]
    assert announced["requested"] == expected(*(resolve(geometry, 400, 500, budget) for budget in budgets))
    assert series(f"{server.url}/metrics", "visiondrop_schedule_mismatch_total") == 0


def test_engine_takes_every_image_that_the_gateway_lets_pass(server: Server) -> None:
    """The corpus of bad images: what is refused never reaches the engine, what is accepted is answered."""
    before = series(f"{server.url}/metrics/engine/0", "vllm:request_success_total")
    num_accepted = 0
    for case in image_cases():
        body = {
            "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": case.url}}]}],
            "max_tokens": 1,
            "visual_token_budget": 32,
        }
        response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
        assert response.status_code == case.status, (case.name, response.text)
        num_accepted += case.status == 200
    assert num_accepted > 20
    served = series(f"{server.url}/metrics/engine/0", "vllm:request_success_total") - before
    assert num_accepted <= served <= num_accepted + 5, "canaries may have been among them"
    assert series(f"{server.url}/metrics", "visiondrop_schedule_mismatch_total") == 0


@pytest.mark.parametrize("stream", [True, False])
def test_engine_aborts_within_a_second_of_the_clients_leaving(server: Server, stream: bool) -> None:
    def running() -> float:
        return series(f"{server.url}/metrics/engine/0", "vllm:num_requests_running")

    body = {
        "messages": [{"role": "user", "content": "Tell me everything."}],
        "max_tokens": 3000,
        "ignore_eos": True,
        "stream": stream,
    }
    wait_for(lambda: running() == 0, 10)
    with httpx.Client() as client:
        if stream:
            with client.stream("POST", f"{server.url}/v1/chat/completions", json=body) as response:
                lines = response.iter_lines()  # kept, since letting go of it closes the connection
                next(lines)
                wait_for(lambda: running() == 1, 5)
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(f"{server.url}/v1/chat/completions", json=body, timeout=1)
    assert wait_for(lambda: running() == 0, 5) < 1
    assert series(f"{server.url}/metrics", "visiondrop_inflight_requests") == 0


def test_engine_that_hangs_or_dies_is_noticed_and_comes_back(random_model: Path, tmp_path: Path) -> None:
    log, port = tmp_path / "log", free_port()
    command = ("-m", "server.cli", "serve", str(random_model), "--port", str(port), "--", "--skip-mm-profiling")
    with process(*command, log=log, VISIONDROP_ENGINE_STALL_SECONDS="6") as child:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(f"{url}/ready", child, log)

        def is_ready() -> bool:
            return httpx.get(f"{url}/ready").status_code == 200

        first = psutil.Process(child.pid).children(recursive=True)
        (core,) = [item for item in first if "EngineCore" in " ".join(item.cmdline()) or "EngineCore" in item.name()]
        core.suspend()
        assert wait_for(lambda: not is_ready(), 12) < 10, "the API process still says that all is well"
        core.resume()
        wait_for(is_ready, 10)

        body = {"messages": [{"role": "user", "content": "Go on."}], "max_tokens": 3000, "ignore_eos": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json={**body, "stream": True}, timeout=60) as response:
            lines = (line for line in response.iter_lines() if line)
            assert "choices" in next(lines)
            core.kill()
            last = list(lines)[-1]
        assert "error" in json.loads(last.removeprefix("data: ")), "not silence"
        wait_for(lambda: "engine ready again after" in log.read_text(), START_SECONDS)
        assert "the engine stopped (its process EngineCore ended unexpectedly)" in log.read_text()
        wait_for(is_ready, 10)
        answer = httpx.post(f"{url}/v1/chat/completions", json={**body, "max_tokens": 2}, timeout=60)
        assert answer.status_code == 200
        assert not psutil.wait_procs(first, timeout=5)[1], "nothing of the first engine is left"
        second = psutil.Process(child.pid).children(recursive=True)
        child.send_signal(signal.SIGTERM)
        assert child.wait(timeout=30) == 0
        assert not psutil.wait_procs(second, timeout=5)[1], "no orphan"


def test_vllms_own_server_serves_budgets_without_a_gateway(random_model: Path, tmp_path: Path) -> None:
    log, port = tmp_path / "log", free_port()
    overrides = '{"architectures": ["VisionDropLlavaNextForConditionalGeneration"]}'
    options = ["--hf-overrides", overrides, "--trust-request-mm-kwargs", "--enable-prompt-tokens-details"]
    server = ["--model", str(random_model), "--port", str(port), "--host", "127.0.0.1", "--max-num-seqs", "4"]
    command = ("-m", "vllm.entrypoints.openai.api_server", *server, *options)
    with process(*command, log=log, VLLM_PLUGINS="visiondrop") as child:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(f"{url}/health", child, log)
        told = httpx.get(f"{url}/visiondrop/geometry").json()
        assert told["geometry"]["rule_version"] == 1
        limits = told["limits"]
        assert limits["max_model_len"] == httpx.get(f"{url}/v1/models").json()["data"][0]["max_model_len"]
        assert (limits["max_num_seqs"], limits["max_chars_per_token"]) == (4, 10), "as the tokenizer's longest token"
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        part = {"type": "image_url", "image_url": {"url": data_url(draw(672, 672))}}
        messages: list[Any] = [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]

        def image_tokens(**kwargs: Any) -> dict[str, int]:
            extra = {"mm_processor_kwargs": kwargs} if kwargs else {}
            answer = client.chat.completions.create(
                model=str(random_model), messages=messages, max_tokens=2, extra_body=extra
            )
            return answer.usage.model_dump()["prompt_tokens_details"]["multimodal_tokens"]

        assert image_tokens() == image_tokens(visual_token_budget="full") == {"image": 2928}
        assert image_tokens(visual_token_budget=320) == {"image": 480}
        with pytest.raises(openai.BadRequestError, match="at least 32"):
            image_tokens(visual_token_budget=31)
        assert image_tokens(visual_token_budget=[160]) == {"image": 240}


def test_demo_model_answers_at_the_default_budget(tmp_path: Path) -> None:
    """Questions about images that it was not trained on."""
    examples = [example for example in evaluation_split(60) if example.question.easy][:12]
    with served_model(None, tmp_path) as server:
        assert "no MODEL is named" in server.log.read_text()
        assert server.model == MODEL_NAME
        wrong = []
        for example in examples:
            question = example.question
            answer = server.ask(draw_scene(example.scene), question=question.text, max_tokens=32)
            text = answer.choices[0].message.content
            if normalize(text) != normalize(question.answer):
                wrong.append((question.text, question.answer, text))
            assert answer.choices[0].finish_reason == "stop", "it knows where an answer ends"
            counts = visual_tokens(answer)
            assert counts["kept"] <= PRESETS["high"]
            assert counts["saved"] == counts["full"] - counts["kept"]
    assert len(examples) == 12
    assert len(wrong) <= 2, wrong  # docs/accuracy.md: 84 % of the easy questions


def run_demo(folder: Path, *arguments: str) -> str:
    """Standard output of `visiondrop demo`."""
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    command = [sys.executable, "-m", "server.cli", "demo", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment, cwd=folder)
    assert run.returncode == 0, run.stderr[-2000:]
    for name in (FULL, *PRESETS):
        assert any(line.split()[:1] == [name] for line in run.stdout.splitlines()), run.stdout
    return run.stdout


def test_demo_is_right_at_the_default_budget(tmp_path: Path) -> None:
    out = run_demo(tmp_path, "--images", "images")
    assert "high 4 of 4" in out, out
    assert out.splitlines()[-1] == "The images are in images."
    assert len(list((tmp_path / "images").iterdir())) == 4


def test_demo_of_another_model_judges_nothing(random_model: Path, tmp_path: Path) -> None:
    out = run_demo(tmp_path, str(random_model), "--max-tokens", "4")
    assert "wrong" not in out
    assert "right:" not in out
    assert "Right answers" not in out
    assert out.count("Image ") == 4
