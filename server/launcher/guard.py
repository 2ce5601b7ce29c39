"""Runs the engine so that it never outlives the gateway, however the gateway dies.

A gateway killed with SIGKILL can clean up nothing, and the death signal that the kernel offers (PR_SET_PDEATHSIG)
reaches only its direct child: vLLM's API server would die and leave its EngineCore processes, with the GPU's memory,
behind. So this small process stands between. It leads the process group of the engine and holds the end of a pipe (its
standard input) whose other end the gateway holds: when the gateway is gone, the pipe ends, and the whole group goes.

    gateway --pipe--> guard --> engine's API server --> EngineCore, workers      (guard and all below it: one group)

Run as a script, by path, isolated from site-packages: standard library only, and no import of this package.

    python -I -S guard.py GRACE_SECONDS [--remove FOLDER] COMMAND...

The folder is what a gateway that was killed leaves behind; one that stops in an orderly way removes it itself.
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable

PR_SET_PDEATHSIG = 1  # linux/prctl.h
REMOVE_OPTION = "--remove"


def main(grace_seconds: float, command: list[str], folder: str | None = None) -> int:
    """Run `command` until it ends or the gateway does.

    Returns:
        The command's exit status; 128 + n if signal n ended it.
    """
    if os.getpgrp() != os.getpid():
        os.setpgrp()  # started by hand: the group to be killed must not be that of the shell
    wake_reader, wake_writer = os.pipe()
    os.set_blocking(wake_writer, False)
    signal.set_wakeup_fd(wake_writer)
    stops: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _frame: stops.append(received))
    signal.signal(signal.SIGCHLD, lambda *_: None)  # a handler, so that the wake-up pipe is written to

    engine = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_die_with(os.getpid()))
    watched = [wake_reader, sys.stdin.fileno()]
    while engine.poll() is None:
        ready, _, _ = select.select(watched, [], [])
        if wake_reader in ready:
            os.read(wake_reader, 4096)
        while stops:
            engine.send_signal(stops.pop())
        if sys.stdin.fileno() in ready and not os.read(sys.stdin.fileno(), 4096):
            _end_group(engine, grace_seconds, folder)
    if select.select([sys.stdin], [], [], 0)[0]:
        _end_group(engine, 0, folder)  # both went at once, and the engine may have left processes behind
    return engine.returncode if engine.returncode >= 0 else 128 - engine.returncode


def _die_with(parent: int) -> Callable[[], None]:
    """For the child, before exec: should the guard itself be killed, its direct child goes with it."""
    libc = ctypes.CDLL(None)

    def set_death_signal() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the guard died before the call
            os._exit(1)

    return set_death_signal


def _end_group(engine: subprocess.Popen[bytes], grace_seconds: float, folder: str | None) -> None:
    """Ask the engine to stop, then kill the group, this process included; `folder` is removed on the way."""
    engine.terminate()
    deadline = time.monotonic() + grace_seconds
    while engine.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    engine.kill()
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    _grace_seconds, *_command = sys.argv[1:]
    _folder = None
    if _command[0] == REMOVE_OPTION:
        _, _folder, *_command = _command
    sys.exit(main(float(_grace_seconds), _command, _folder))
