"""Programs with a time limit, of which nothing is left in the end: not their children, nor children of those.

An engine consists of several processes in several process groups, and one that hangs inside CUDA does not react to
signals that it could handle. So whoever calls this becomes the new parent of orphaned descendants (`adopt_orphans`),
finds all of them as its own descendants, and kills them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Final

import psutil

_PR_SET_CHILD_SUBREAPER: Final = 36  # linux/prctl.h
_GRACE_SECONDS: Final = 10.0
"""From the interrupt to the kill: a server stops its engine in this time."""
_KILL_SECONDS: Final = 10.0
"""How long killed processes may take to go; one that hangs in the kernel may stay."""


def adopt_orphans() -> None:
    """Processes whose parent ends become children of this one, instead of the machine's first.

    Raises:
        OSError: the kernel does not know this (before Linux 3.4).
    """
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def run(command: Sequence[str], log: Path, limit_seconds: float, environment: Mapping[str, str]) -> int | None:
    """Run a program to its end, with its output in a file.

    When the time is up, and on KeyboardInterrupt, it gets an interrupt and a few seconds; then all that is left of it
    is killed. So is what a program leaves behind that ends by itself.

    Returns:
        Its exit status, below zero if a signal ended it; None if the time was up.

    Raises:
        OSError: it cannot be started.
    """
    others = _descendants()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            process_group=0,  # Ctrl-C reaches it from here, once
        )
    try:
        return process.wait(max(limit_seconds, 0))
    except subprocess.TimeoutExpired:
        _interrupt(process)
        return None
    except KeyboardInterrupt:
        _interrupt(process)
        raise
    finally:
        _kill(others)


@contextlib.contextmanager
def running(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Generator[subprocess.Popen[bytes]]:
    """A program that runs meanwhile; in the end it is stopped as with Ctrl-C, and killed if it does not stop."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            process_group=0,
        )
    try:
        yield process
    finally:
        _interrupt(process)


def _interrupt(process: subprocess.Popen[bytes]) -> None:
    """Its whole group, because a program that waits for another one does not pass the signal on."""
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(_GRACE_SECONDS)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.kill()
        process.wait()


def _descendants() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def _kill(others: set[int]) -> None:
    """Kill all descendants but `others`: again and again, as those that are killed may just have started some."""
    deadline = time.monotonic() + _KILL_SECONDS
    while (left := _descendants() - others) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in left:
            with contextlib.suppress(ChildProcessError):  # not ours: its parent has to go first
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.02)
