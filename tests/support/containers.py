"""Containers of a real engine, docker or podman, driven through its command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TAG = "test"


@cache
def program() -> str | None:
    """`docker` or `podman`, the first that works here; None if neither does."""
    wanted = os.environ.get("BUILDER")
    for name in [wanted] if wanted else ["docker", "podman"]:
        if shutil.which(name) and subprocess.run([name, "info"], capture_output=True, check=False).returncode == 0:
            return name
    return None


def require() -> str:
    """The program, or a skipped test."""
    found = program()
    if found is None:
        pytest.skip("neither docker nor podman works here (docker info, podman info)")
    return found


def call(*arguments: str, check: bool = True, seconds: float = 600) -> str:
    """Standard output of `docker ARGUMENTS`; both streams are in the message of a failure."""
    done = subprocess.run([require(), *arguments], capture_output=True, text=True, check=False, timeout=seconds)
    assert not check or done.returncode == 0, f"{' '.join(arguments)}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout.strip()


def build(*targets: str) -> str:
    """Build targets of the Dockerfile with TAG. Returns what was printed at the end: sizes and times."""
    environment = {**os.environ, "BUILDER": require(), "TAG": TAG}
    command = [str(ROOT / "deploy" / "images.sh"), *targets]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout[done.stdout.rindex("\nimage ") :]


def inspect(kind: str, name: str) -> Any:
    (data,) = json.loads(call(kind, "inspect", name))
    return data


@dataclass(frozen=True, slots=True)
class Container:
    name: str

    def logs(self) -> str:
        """Both streams of its process."""
        done = subprocess.run(
            [require(), "logs", self.name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        return done.stdout

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """A command inside it."""
        return subprocess.run([require(), "exec", self.name, *command], capture_output=True, text=True, check=False)

    def is_ready(self, url: str) -> bool:
        """What its health check says, for another URL than the image's own."""
        return self.run("python3", "/opt/visiondrop/healthcheck.py", url).returncode == 0

    def wait_ready(self, url: str, seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while not self.is_ready(url):
            assert self.is_running(), self.logs()[-3000:]
            assert time.monotonic() < deadline, self.logs()[-3000:]
            time.sleep(0.5)

    def is_running(self) -> bool:
        return bool(inspect("container", self.name)["State"]["Running"])

    def address(self, port: int) -> str:
        """HOST:PORT under which a published port is reached."""
        return call("port", self.name, f"{port}/tcp").splitlines()[0]

    def terminate(self) -> None:
        call("kill", "--signal", "TERM", self.name)

    def wait_status(self, seconds: float = 60) -> int:
        """The exit status, once it has ended."""
        return int(call("wait", self.name, seconds=seconds))


@contextmanager
def container(image: str, *command: str, options: tuple[str, ...] = ()) -> Iterator[Container]:
    """A running container with a read-only root and without capabilities, removed at the end."""
    confined = ("--read-only", "--tmpfs", "/tmp:mode=1777", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
    name = call("run", "--detach", *confined, *options, image, *command).splitlines()[-1]
    try:
        yield Container(name)
    finally:
        call("rm", "--force", "--volumes", name, check=False)


@contextmanager
def volume() -> Iterator[str]:
    name = call("volume", "create").splitlines()[-1]
    try:
        yield name
    finally:
        call("volume", "rm", "--force", name, check=False)
