"""Servers as processes of their own, asked over HTTP."""

from __future__ import annotations

import base64
import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from PIL import Image

START_SECONDS = 240


@contextmanager
def process(*arguments: str, log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A Python process with the environment of a user, stopped at the end in whatever state it is."""
    clean = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    with log.open("wb") as output:
        child = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**clean, **environment},
            start_new_session=True,
        )
        try:
            yield child
        finally:
            tree = [*psutil.Process(child.pid).children(recursive=True)] if child.poll() is None else []
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # also what a child that has died has left behind
            child.wait()
            for orphan in tree:
                if orphan.is_running():
                    orphan.kill()


def wait_until_ready(url: str, child: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert child.poll() is None, log.read_text()[-3000:]
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.3)
    pytest.fail(f"not ready in {START_SECONDS} s: {log.read_text()[-3000:]}")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Server:
    def __init__(self, child: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.child, self.log = child, log
        self.url = f"http://127.0.0.1:{port}"
        wait_until_ready(f"{self.url}/ready", child, log)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)
        self.model = self.client.models.list().data[0].id

    def ask(self, *images: Image.Image, question: str = "What is this?", **options: Any) -> Any:
        return ask(self.client, self.model, *images, question=question, **options)


def ask(
    client: openai.OpenAI, model: str, *images: Image.Image, question: str = "What is this?", **options: Any
) -> Any:
    """A short greedy answer about some images."""
    content: list[Any] = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    content.append({"type": "text", "text": question})
    options = {"max_tokens": 4, "temperature": 0, **options}
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": content}], **options)


@contextmanager
def served_model(model: Path | None, folder: Path, *more: str) -> Iterator[Server]:
    """`visiondrop serve`, started as fast as it can; without a model, it serves the demo model.

    Args:
        more: options of the engine.
    """
    log, port = folder / "log", free_port()
    named = [] if model is None else [str(model)]
    options = ("--", "--max-model-len", "6144", "--max-num-seqs", "4", "--enforce-eager", "--skip-mm-profiling")
    with process("-m", "server.cli", "serve", *named, "--port", str(port), *options, *more, log=log) as child:
        yield Server(child, port, log)


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
