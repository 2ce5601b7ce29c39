"""The images, built and run: as somebody who is not root, with a read-only root and without capabilities.

The engine has no network at all: it shares a volume with the gateway, and in it a socket.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from threading import Event
from typing import Any

import openai
import pytest
from containers import TAG, Container, build, call, container, inspect, volume
from dockerfile import stages
from engines import draw
from served import ask

from vd_plugin.demo import MODEL_NAME

pytestmark = [pytest.mark.images, pytest.mark.slow]

BUILT = ("gateway", "engine-cpu")
NOBODY = "12345:23456"
"""User and group that no list of users knows."""
SOCKET = "/cache/engine.sock"
BASE_MB = 130
"""Size of python:3.11-slim-bookworm on amd64, where another image stands in for it."""
MODEL = "/opt/visiondrop/demo-model"
OPTIONS = ("--max-model-len", "6144", "--max-num-seqs", "4", "--shutdown-timeout", "60")


def image(target: str) -> str:
    return f"visiondrop-{target}:{TAG}"


@pytest.fixture(scope="module", autouse=True)
def report() -> str:
    """What building printed at its end: the images, their sizes, and how long it took."""
    text = build(*BUILT)
    print(text)
    return text


def test_report_lists_every_image(report: str) -> None:
    for target in BUILT:
        assert re.search(rf"^{image(target)} +\d+ MB +\d+ s$", report, flags=re.MULTILINE), report


def test_gateway_is_small() -> None:
    names = (image("gateway"), stages()["gateway"].base)
    ours, bases = (inspect("image", name)["Size"] / 1e6 for name in names)
    print(f"gateway: {ours:.0f} MB, of which {ours - bases:.0f} MB are not in its base")
    assert ours - bases + min(bases, BASE_MB) < 250


@pytest.mark.parametrize("module", ["torch", "vllm", "numpy", "pip", "openai"])
def test_gateway_holds_only_what_it_needs(module: str) -> None:
    with container(image("gateway"), "-c", f"import {module}", options=("--entrypoint", "python3")) as stopped:
        assert stopped.wait_status() == 1
        assert "ModuleNotFoundError" in stopped.logs()


def test_gateway_holds_no_weights() -> None:
    code = "from vd_plugin.demo import find_model; find_model()"
    with container(image("gateway"), "-c", code, options=("--entrypoint", "python3")) as stopped:
        assert stopped.wait_status() == 1
        assert "the weights of the demo model are not installed here" in stopped.logs()


@pytest.mark.parametrize("target", BUILT)
def test_nothing_of_the_building_machine_is_inside(target: str) -> None:
    left = ("/etc/pip.conf", "/src", "/wheels", "/root/.cache/pip")
    code = f"import os, sys; sys.exit(any(map(os.path.exists, {left})))"
    with container(image(target), "-c", code, options=("--entrypoint", "python3", "--user", "0")) as stopped:
        assert stopped.wait_status() == 0
    data = inspect("image", image(target))
    assert not [entry for entry in data["Config"]["Env"] if re.search(r"PIP_|UV_|PROXY|TOKEN", entry, re.IGNORECASE)]
    labels = data["Config"]["Labels"]
    assert labels["org.opencontainers.image.version"] == "0.1.0"
    assert re.match("[0-9a-f]{40}|unknown", labels["org.opencontainers.image.revision"])


@dataclass(slots=True)
class Pair:
    """An engine without a network, and gateways before it."""

    engine: Container
    start_gateway: Callable[[], Container]
    was_ready_at_once: bool

    def client(self, gateway: Container) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://{gateway.address(8000)}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def pair(report: str) -> Iterator[Pair]:
    with ExitStack() as stack:
        shared = stack.enter_context(volume())
        user = ("--user", NOBODY, "--volume", f"{shared}:/cache")
        command = (MODEL, "--served-model-name", MODEL_NAME, "--uds", SOCKET, *OPTIONS)
        engine = stack.enter_context(
            container(image("engine-cpu"), *command, options=(*user, "--network", "none", "--shm-size", "1g"))
        )

        def start_gateway() -> Container:
            options = (*user, "--publish", "127.0.0.1::8000")
            arguments = ("gateway", "--host", "0.0.0.0", "--engine", f"unix:{SOCKET}")
            gateway = stack.enter_context(container(image("gateway"), *arguments, options=options))
            nonlocal was_ready
            was_ready |= gateway.is_ready("http://127.0.0.1:9100/ready")
            gateway.wait_ready("http://127.0.0.1:9100/ready")
            return gateway

        was_ready = False
        first = start_gateway()
        remaining = [first]
        yield Pair(engine, lambda: remaining.pop() if remaining else start_gateway(), was_ready)


def ask_with_budget(client: openai.OpenAI, budget: str, *, ignore_eos: bool = False, **options: Any) -> Any:
    extra = {"visual_token_budget": budget, "ignore_eos": ignore_eos}
    return ask(client, MODEL_NAME, draw(672, 672), extra_body=extra, **options)


def stream(client: openai.OpenAI, began: Event) -> tuple[str | None, Any]:
    """Read a long answer about an image to its end; sets `began` in its midst.

    Returns:
        Why it ended, and its usage.
    """
    finish_reason, usage = None, None
    options = {"max_tokens": 60, "stream": True, "stream_options": {"include_usage": True}}
    for number, chunk in enumerate(ask_with_budget(client, "low", ignore_eos=True, **options)):
        if number == 5:
            began.set()
        if chunk.choices:
            finish_reason = chunk.choices[0].finish_reason
        usage = chunk.usage or usage
    return finish_reason, usage


def assert_finishes(client: openai.OpenAI, stopped: Container) -> None:
    """A stream is complete although the container is told to stop in its midst; then it exits with status 0."""
    began = Event()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(stream, client, began)
        assert began.wait(60), answer
        stopped.terminate()
        assert not answer.done(), "it must have been in flight"
        try:
            finish_reason, usage = answer.result(timeout=120)
        except openai.APIError as error:
            raise AssertionError(stopped.logs()[-5000:]) from error
    assert finish_reason in ("length", "stop")
    assert usage.visual_tokens["kept"] == 160
    assert stopped.wait_status() == 0, stopped.logs()[-3000:]


def test_image_question_is_answered_and_what_is_written_stays_in_the_volume(pair: Pair) -> None:
    """Then SIGTERM: the gateway, and after it the engine, finish a stream and exit with status 0."""
    assert not pair.was_ready_at_once, "an engine takes seconds at least: the check must be able to fail"
    gateway = pair.start_gateway()
    client = pair.client(gateway)
    for budget, kept in (("low", 160), ("full", 1312)):
        usage = ask_with_budget(client, budget).usage
        assert usage.visual_tokens["kept"] == kept
        assert usage.visual_tokens["full"] == 1312
    for each in (gateway, pair.engine):
        assert each.run("id", "-u").stdout.strip() == NOBODY.partition(":")[0]
        assert each.run("touch", "/opt/visiondrop/written").returncode != 0
        changed = set(call("diff", each.name).split()[1::2])
        assert not {
            path for path in changed if not path.startswith(("/cache", "/tmp", "/dev", "/etc", "/run", "/proc", "/sys"))
        }

    assert_finishes(client, gateway)
    assert '"/v1/chat/completions"' in gateway.logs(), "the request log"
    gateway = pair.start_gateway()
    assert_finishes(pair.client(gateway), pair.engine)
    gateway.terminate()
    assert gateway.wait_status() == 0
