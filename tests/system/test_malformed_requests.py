"""A malformed request must not end the engine, nor change its neighbour's answer: the engine's own server, no gateway.

The operator of this server has allowed every argument of the image processor that can be allowed: beyond that, only the
checks of what comes out of it stand between a client and the engine core.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from engines import draw
from served import data_url, free_port, process, wait_until_ready

from vd_plugin.options import PROCESSOR_KWARGS

pytestmark = [pytest.mark.engine, pytest.mark.slow]

BUDGET = {"visual_token_budget": 160}
KWARGS: list[Any] = [
    {"size": {"height": 10, "width": 10}},
    {"size": {"shortest_edge": 64}},
    {"size": {"shortest_edge": 0}},
    {"size": -5},
    {"size": 100_000},
    {"size": "large"},
    {"crop_size": {"height": 10, "width": 10}},
    {"crop_size": 1},
    {"crop_size": {"height": 672, "width": 672}},
    {"crop_size": None},
    {"size": {"height": 64, "width": 64}, "crop_size": {"height": 64, "width": 64}},
    {"do_center_crop": False},
    {"do_resize": False},
    {"do_pad": False},
    {"do_rescale": False},
    {"do_normalize": False},
    {"do_rescale": False, "do_normalize": False},
    {"do_convert_rgb": False},
    {"return_tensors": "np"},
    {"return_tensors": "pt"},
    {"return_tensors": None},
    {"return_tensors": "jax"},
    {"rescale_factor": 1e38},
    {"rescale_factor": -1e38},
    {"rescale_factor": 1e30},
    {"rescale_factor": 1e3},
    {"rescale_factor": 0},
    {"rescale_factor": "NaN"},
    {"rescale_factor": []},
    {"image_std": [0, 0, 0]},
    {"image_std": [1e-30, 1e-30, 1e-30]},
    {"image_std": [1, 1]},
    {"image_mean": [1e38, 1e38, 1e38]},
    {"image_mean": "red"},
    {"image_mean": [0.5]},
    {"image_grid_pinpoints": []},
    {"image_grid_pinpoints": [[336, 336]]},
    {"image_grid_pinpoints": [[1, 1]]},
    {"image_grid_pinpoints": [[3360, 3360]]},
    {"image_grid_pinpoints": "many"},
    {"resample": 99},
    {"resample": "nearest"},
    {"data_format": "channels_last"},
    {"input_data_format": "channels_last"},
    {"input_data_format": 3},
    {"patch_size": 1},
    {"patch_size": 0},
    {"num_additional_image_tokens": 100},
    {"vision_feature_select_strategy": "full"},
    {"images_kwargs": {"size": 3}},
    {"images_kwargs": {"return_tensors": "np"}},
    {"images_kwargs": 3},
    # Never allowed
    {"device": "cuda"},
    {"visiondrop_requested": ["full"]},
    {"text_kwargs": {"truncation": True, "max_length": 2}},
    {"": 1},
    # Ours
    {"visual_token_budget": "x" * 800_000},
    {"visual_token_budget": [[[[[320]]]]]},
    {"visual_token_budget": 1e400},
    {"visual_token_budget": 10**400},
    {"visual_token_budget": -1},
    {"visual_token_budget": True},
    {"visual_token_budget": 320, "visual_token_schedule": [[4, 1]] * 4},
    {"visual_token_schedule": [["x" * 800_000]]},
    {"visual_token_schedule": [[10**30, 1]] * 4},
    {"visual_token_schedule": [[1, -1]] * 4},
    {"visual_token_schedule": [[40, 6], [0, 0], [0, 0], [0, 0]]},
    {"visual_token_schedule": []},
    {"visual_token_schedule": [[]]},
]
"""Values of `mm_processor_kwargs`, each sent with a budget and without."""

BODIES: list[dict[str, Any]] = [
    {"mm_processor_kwargs": 3},
    {"mm_processor_kwargs": [1]},
    {"mm_processor_kwargs": "visual_token_budget"},
    {"mm_processor_kwargs": BUDGET, "prompt_logprobs": 1},
    {"mm_processor_kwargs": BUDGET, "prompt_logprobs": -1},
    {"mm_processor_kwargs": BUDGET, "media_io_kwargs": {"image": {"image_mode": "L"}}},
    {"mm_processor_kwargs": BUDGET, "media_io_kwargs": {"image": {"image_mode": "CMYK"}}},
    {"mm_processor_kwargs": BUDGET, "media_io_kwargs": {"image": {"image_mode": "no mode"}}},
    {"mm_processor_kwargs": BUDGET, "media_io_kwargs": {"image": {"rgba_background_color": [1, 2]}}},
    {"mm_processor_kwargs": BUDGET, "truncate_prompt_tokens": 5},
    # vLLM's worker would end at these.
    {"stop_token_ids": list(range(3, 140)), "min_tokens": 1},
    {"allowed_token_ids": [5] * 1025},
    {"bad_words": ["red " * 1100]},
    {"seed": 2**63 - 1, "n": 2, "temperature": 1},
]


class Engine:
    def __init__(self, url: str) -> None:
        # No connection twice: the server closes idle ones while the next request is on its way.
        self.http = httpx.Client(base_url=url, timeout=120, limits=httpx.Limits(max_keepalive_connections=0))
        self.model = self.http.get("/v1/models").json()["data"][0]["id"]

    def chat(self, *content: dict[str, Any], **fields: Any) -> httpx.Response:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": [*content, {"type": "text", "text": "What is it?"}]}],
            "temperature": 0,
            "max_tokens": 2,
            **fields,
        }
        # Not httpx's own JSON: it refuses infinity.
        return self.http.post(
            "/v1/chat/completions", content=json.dumps(body), headers={"content-type": "application/json"}
        )

    def write(self, *content: dict[str, Any], num_tokens: int = 300, **fields: Any) -> list[tuple[str, float]]:
        """An answer, token by token with its log-probability; text alone where there is no content."""
        answer = self.chat(*content, max_tokens=num_tokens, ignore_eos=True, logprobs=True, **fields).json()
        return [(step["token"], step["logprob"]) for step in answer["choices"][0]["logprobs"]["content"]]


def image(seed: int, uuid: str | None = None) -> dict[str, Any]:
    part: dict[str, Any] = {"type": "image_url", "image_url": {"url": data_url(draw(100, 60, seed=seed))}}
    return {**part, "uuid": uuid} if uuid else part


@pytest.fixture(scope="module")
def engine(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    log, port = tmp_path_factory.mktemp("engine") / "log", free_port()
    overrides = json.dumps({"visiondrop": {"allow_processor_kwargs": sorted(PROCESSOR_KWARGS)}})
    options = ["--max-model-len", "4096", "--max-num-seqs", "4", "--enforce-eager", "--hf-overrides", overrides]
    options += ["--dtype", "float32"]  # in half precision, a neighbour changes the last digits
    with process("-m", "vd_plugin.engine", str(random_model), "--port", str(port), *options, log=log) as child:
        wait_until_ready(f"http://127.0.0.1:{port}/health", child, log)
        cores = psutil.Process(child.pid).children(recursive=True)
        yield Engine(f"http://127.0.0.1:{port}")
        assert child.poll() is None
        assert all(core.is_running() and core.status() != psutil.STATUS_ZOMBIE for core in cores)


def test_malformed_requests_are_refused_and_the_neighbour_does_not_notice(engine: Engine) -> None:
    alone = engine.write()
    answered = engine.write(image(0), mm_processor_kwargs=BUDGET, num_tokens=8)
    heard: list[list[tuple[str, float]]] = []
    stop = threading.Event()

    def listen() -> None:
        while not stop.is_set():
            heard.append(engine.write())

    neighbour = threading.Thread(target=listen)
    neighbour.start()
    failures: list[str] = []
    statuses: list[int] = []

    def send(*content: dict[str, Any], **fields: Any) -> None:
        response = engine.chat(*content, **fields)
        statuses.append(response.status_code)
        if response.status_code not in (200, 400) or len(response.content) > 4000:
            failures.append(f"{response.status_code} to {str(fields)[:200]}: {response.text[:300]}")

    try:
        for number, kwargs in enumerate(KWARGS):
            send(image(1), mm_processor_kwargs=kwargs)
            send(image(number + 2), mm_processor_kwargs={**BUDGET, **kwargs})
        for fields in BODIES:
            send(image(1), **fields)
        for identifier in ("a~visiondrop:1.1-1.1-1.1-1.1", "~visiondrop:", "x" * 10_000):
            send(image(3, identifier), mm_processor_kwargs=BUDGET)
    finally:
        stop.set()
        neighbour.join()
    assert not failures, "\n".join(failures)
    assert statuses.count(400) > 90
    assert statuses.count(200) > 5
    assert heard
    for answer in heard:
        assert_same(answer, alone)
    assert_same(engine.write(image(0), mm_processor_kwargs=BUDGET, num_tokens=8), answered)


def assert_same(one: list[tuple[str, float]], other: list[tuple[str, float]]) -> None:
    assert [token for token, _ in one] == [token for token, _ in other]
    assert [logprob for _, logprob in one] == pytest.approx([logprob for _, logprob in other], abs=1e-3)


@pytest.mark.parametrize(
    "kwargs",
    [{"visual_token_budget": "much"}, {"visual_token_budget": [320]}, {"visual_token_schedule": 7}, {"device": "cuda"}],
    ids=str,
)
def test_malformed_arguments_are_refused_without_an_image(engine: Engine, kwargs: dict[str, Any]) -> None:
    assert engine.chat(mm_processor_kwargs=kwargs).status_code == 400
    body = {"model": engine.model, "prompt": "Only text", "max_tokens": 1, "mm_processor_kwargs": kwargs}
    assert engine.http.post("/v1/completions", json=body).status_code in (200, 400), "completions know no such field"
    assert engine.chat(mm_processor_kwargs=BUDGET).status_code == 200


def test_the_sentence_says_what_to_do(engine: Engine) -> None:
    error = engine.chat(image(0), mm_processor_kwargs={**BUDGET, "device": "cuda"}).json()["error"]
    assert "mm_processor_kwargs may set visual_token_budget or visual_token_schedule" in error["message"]
    assert "allow_processor_kwargs" in error["message"]
    error = engine.chat(image(0), mm_processor_kwargs=BUDGET, prompt_logprobs=1).json()["error"]
    assert "prompt_logprobs are not available for prompts with pruned images" in error["message"]
    assert error["param"] == "prompt_logprobs"
