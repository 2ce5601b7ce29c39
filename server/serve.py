"""`visiondrop serve` and `visiondrop gateway`: the HTTP server's life, from the free port to the clean stop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import uvicorn

from server import engine_log
from server.app import create_app
from server.engine_client import HttpEngineClient
from server.engine_pool import EnginePool
from server.engine_process import EngineProcess
from server.errors import EngineFailedError, EngineUnreachableError, GatewayError
from server.progress import Progress
from server.settings import Settings

_POLL_SECONDS: Final = 0.3


class StartError(Exception):
    """Serving is not possible. The message is a sentence for the person at the terminal."""


@dataclass(frozen=True, slots=True)
class Address:
    host: str
    port: int


def run_serve(
    settings: Settings, address: Address, engine_command: Sequence[str], engine_log_path: Path | None = None
) -> None:
    """Start the engine as a child and serve it until told to stop.

    Args:
        engine_command: program and arguments; `--uds SOCKET` is added.

    Raises:
        StartError: the port is taken, the engine does not start, or it died on the way.
    """
    with _bound_socket(address) as listener:
        asyncio.run(_serve_child(settings, listener, engine_command, engine_log_path))


def run_gateway(settings: Settings, address: Address, engine_url: str) -> None:
    """Serve an engine that somebody else runs, once it answers.

    Raises:
        StartError: the port is taken, the URL is none, or the engine does not answer or fit.
    """
    with _bound_socket(address) as listener:
        asyncio.run(_serve_remote(settings, listener, engine_url))


async def _serve_child(
    settings: Settings, listener: socket.socket, command: Sequence[str], log_path: Path | None
) -> None:
    try:
        process = await EngineProcess.start(command, log_path)
    except OSError as error:
        raise StartError(f"the engine cannot be started: {error}") from None
    stop = _stop_on_signals(process.kill)
    client = HttpEngineClient.at(process.url)
    try:
        progress = Progress("visiondrop: the engine is starting", sys.stderr)
        ready = _wait_ready(client, settings, progress, lambda: engine_log.activity(process.log_path))
        try:
            await _first_of(ready, process.wait_exit(), stop.wait())
        except StartError:
            process.keep_log = True
            raise
        finally:
            progress.clear()
        if not stop.is_set() and not process.has_exited():
            say(f"engine ready after {progress.elapsed_seconds:.0f} s, its log: {process.log_path}")
            await _serve_until(stop, settings, listener, client, process.wait_exit())
            if process.has_exited() and not stop.is_set():
                raise StartError(process.describe_exit(while_loading=False))
        elif not stop.is_set():
            raise StartError(process.describe_exit(while_loading=True))
    finally:
        await client.aclose()
        await process.stop()


async def _serve_remote(settings: Settings, listener: socket.socket, engine_url: str) -> None:
    try:
        client = HttpEngineClient.at(engine_url)
    except ValueError as error:
        raise StartError(str(error)) from None
    stop = _stop_on_signals(lambda: None)
    try:
        progress = Progress("visiondrop: waiting for the engine", sys.stderr)
        try:
            await _first_of(_wait_ready(client, settings, progress, lambda: engine_url), stop.wait())
        finally:
            progress.clear()
        if not stop.is_set():
            await _serve_until(stop, settings, listener, client)
    finally:
        await client.aclose()


async def _wait_ready(
    client: HttpEngineClient, settings: Settings, progress: Progress, detail: Callable[[], str]
) -> None:
    """Return when the engine answers and its geometry has been read.

    Raises:
        StartError: the engine does not fit, or it takes too long.
    """
    while True:
        try:
            if await client.is_healthy():
                await client.geometry()
                return
        except (EngineUnreachableError, EngineFailedError):
            pass  # it went away in between; the time limit and the caller's watch on the process decide
        except GatewayError as error:
            raise StartError(error.message) from None
        if progress.elapsed_seconds > settings.engine_start_timeout_seconds:
            raise StartError(
                f"the engine was not ready after {settings.engine_start_timeout_seconds:g} s "
                "(a longer time can be given with --engine-start-timeout)"
            )
        progress.show(detail())
        await asyncio.sleep(_POLL_SECONDS)


async def _serve_until(
    stop: asyncio.Event,
    settings: Settings,
    listener: socket.socket,
    client: HttpEngineClient,
    engine_exit: Coroutine[None, None, None] | None = None,
) -> None:
    """Serve until told to stop or until the engine is gone; requests in flight are given some time to end."""
    config = uvicorn.Config(
        create_app(settings, EnginePool({"0": client}, settings)),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(settings.shutdown_seconds),  # 0: no wait
    )
    server = _Server(config)
    url = _url_of(listener)
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    ends = [stop.wait(), _announce(server, client, url)] + ([engine_exit] if engine_exit else [])
    try:
        await _first_of(asyncio.shield(serving), *ends)
        server.should_exit = True
        await serving
    except OSError as error:
        raise StartError(_why_not_bound(url, error)) from None


async def _announce(server: uvicorn.Server, client: HttpEngineClient, url: str) -> None:
    """Say what is served where, once it is; never returns."""
    while not server.started:  # noqa: ASYNC110  # uvicorn offers no event
        await asyncio.sleep(0.02)
    try:
        names = ", ".join(str(entry.get("id")) for entry in await client.models())
    except GatewayError as error:
        names = f"a model whose name is unknown ({error.message})"
    say(f"serving {names} at {url}/v1 (Ctrl-C stops)")
    await asyncio.Event().wait()


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: ours also look after the engine."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


async def _first_of(*awaitables: Awaitable[object]) -> None:
    """Wait for the first to finish and cancel the others. Errors of those that finished are raised."""
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


def _stop_on_signals(kill: Callable[[], None]) -> asyncio.Event:
    """An event that the first SIGINT or SIGTERM sets; at the second, `kill` is called and the process ends at once."""
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            kill()
            os._exit(130)
        stop.set()
        say("stopping (once more to stop at once)")

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    return stop


@contextlib.contextmanager
def _bound_socket(address: Address) -> Generator[socket.socket, None, None]:
    """Take the port before an engine is started for nothing. Nobody can connect until the server listens."""
    url = f"http://{address.host}:{address.port}"
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise StartError(_why_not_bound(url, error)) from None
    with listener:
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(target)
        except OSError as error:
            raise StartError(_why_not_bound(url, error)) from None
        yield listener


def _why_not_bound(url: str, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"{url} is already in use; choose another port with --port"
    return f"cannot listen on {url}: {error.strerror or error}"


def _url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def say(sentence: str) -> None:
    """Tell the person at the terminal; standard output is for the request log."""
    print(f"visiondrop: {sentence}", file=sys.stderr, flush=True)
