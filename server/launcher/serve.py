"""`visiondrop serve` and `visiondrop gateway`: the HTTP server's life, from the free port to the clean stop.

1. The ports are taken, so that a conflict is reported before an engine loads.
2. The engine is started, or contacted, and waited for.
3. Requests are served. A child engine that stops is started again (supervisor.py).
4. The first SIGINT, SIGTERM or SIGHUP begins the drain: newcomers get a 503, what is in flight may finish within the
   grace time, and is cut off then.
5. The server ends, then the engine. A second signal, at any time, ends everything at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fastapi import FastAPI

from server.admission.drain import Drain
from server.app import create_app, keys_of, metrics_app_of
from server.engine.client import HttpEngineClient
from server.engine.pool import EnginePool
from server.errors import EngineFailedError, EngineUnreachableError, GatewayError
from server.http.connection import ConnectionLimits
from server.http.listener import Address, StartError, bound_socket, url_of, why_not_bound
from server.http.server import HttpServer, allowed_connections, serve_metrics, silence_late_results
from server.launcher.output import escaped, num_dropped_lines
from server.launcher.progress import Progress
from server.launcher.supervisor import Backoff, Supervisor
from server.settings import Settings
from vd_plugin.wire import ERROR_PREFIX

_POLL_SECONDS: Final = 0.3
_OTHERS_SECONDS: Final = 1.0
"""What other engines get to answer, too, before those that do not are reported."""

BACKOFF: Final = Backoff()


def run_serve(
    settings: Settings, address: Address, engine_command: Sequence[str], engine_log_path: Path | None = None
) -> None:
    """Start the engine as a child and serve it until stopped.

    Args:
        engine_command: program and arguments; `--uds SOCKET` is added.

    Raises:
        StartError: a port is taken, or the engine does not start.
    """
    with _bound_sockets(settings, address) as listeners:
        asyncio.run(_serve_child(settings, listeners, engine_command, engine_log_path))


def run_gateway(settings: Settings, address: Address, engine_urls: Sequence[str]) -> None:
    """Serve engines that somebody else runs, once one of them answers.

    Raises:
        StartError: a port is taken, a URL is invalid or duplicated, or no engine answers and fits.
    """
    with _bound_sockets(settings, address) as listeners:
        asyncio.run(_serve_remote(settings, listeners, engine_urls))


async def _serve_child(
    settings: Settings, listeners: _Listeners, command: Sequence[str], log_path: Path | None
) -> None:
    try:
        supervisor = await Supervisor.start(command, log_path, BACKOFF, say)
    except OSError as error:
        raise StartError(f"the engine cannot be started: {error}") from None
    stop = _stop_on_signals(supervisor.kill)
    client = HttpEngineClient.at(supervisor.url)
    pool = EnginePool({"0": client}, settings)
    try:
        progress = Progress("visiondrop: the engine is starting", sys.stderr)
        ready = _wait_ready(client, settings, progress, supervisor.activity)
        try:
            await _first_of(ready, supervisor.wait_exit(), stop.wait())
        except StartError as error:
            supervisor.keep_logs()
            raise StartError(f"{error}. Its log: {supervisor.log_path}") from None
        finally:
            progress.clear()
        if stop.is_set():
            return
        if supervisor.has_exited():
            raise StartError(supervisor.describe_exit(while_loading=True))
        say(f"engine ready after {progress.elapsed_seconds:.0f} s, its log: {supervisor.log_path}")

        async def is_ready() -> bool:
            await pool.check()  # at once, instead of at its next probe
            return pool.is_up("0")

        watch = supervisor.run(is_ready, settings.engine_start_timeout_seconds)
        await _serve_until(stop, settings, listeners, pool, watch)
    finally:
        await pool.aclose()
        await supervisor.stop()


async def _serve_remote(settings: Settings, listeners: _Listeners, urls: Sequence[str]) -> None:
    engines = _clients_of(urls)
    pool = EnginePool(engines, settings)
    stop = _stop_on_signals(lambda: None)
    try:
        progress = Progress("visiondrop: waiting for the engine", sys.stderr)
        wait = _wait_any_ready(dict(zip(urls, engines.values(), strict=True)), settings, progress)
        try:
            await _first_of(wait, stop.wait())
        finally:
            progress.clear()
        if not stop.is_set():
            await _serve_until(stop, settings, listeners, pool)
    finally:
        await pool.aclose()


def _clients_of(urls: Sequence[str]) -> dict[str, HttpEngineClient]:
    """Clients of the engines, named "0", "1", ...

    Raises:
        StartError: a URL is invalid or duplicated.
    """
    for number, url in enumerate(urls):
        if url.rstrip("/") in {other.rstrip("/") for other in urls[:number]}:
            raise StartError(f"the engine {url} is duplicated")
    try:
        return {str(number): HttpEngineClient.at(url) for number, url in enumerate(urls)}
    except ValueError as error:
        raise StartError(str(error)) from None


async def _wait_any_ready(engines: Mapping[str, HttpEngineClient], settings: Settings, progress: Progress) -> None:
    """Return when one engine answers and fits, and report which others do not, by their URLs.

    Raises:
        StartError: none does.
    """
    waits = {
        url: asyncio.ensure_future(_wait_ready(client, settings, progress, lambda: ", ".join(engines)))
        for url, client in engines.items()
    }
    try:
        for wait in asyncio.as_completed(waits.values()):
            with contextlib.suppress(StartError):
                await wait
                break
        else:
            await next(iter(waits.values()))
        await asyncio.wait(waits.values(), timeout=_OTHERS_SECONDS)
    finally:
        for task in waits.values():
            task.cancel()
        await asyncio.gather(*waits.values(), return_exceptions=True)
    progress.clear()
    for url, task in waits.items():
        if task.cancelled():
            say(f"the engine {url} does not answer yet")
        elif error := task.exception():
            say(f"the engine {url} cannot be used: {error}")


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
    listeners: _Listeners,
    pool: EnginePool,
    watch: Coroutine[None, None, None] | None = None,
) -> None:
    """Serve until stopped; requests in flight are given some time to end. `watch` runs until then."""
    drain = Drain()
    app = create_app(settings, pool, drain, num_dropped_lines=num_dropped_lines)
    limits = ConnectionLimits.of(settings, allowed_connections(settings.max_connections))
    server = HttpServer(app, limits)
    url = url_of(listeners.main)
    try:
        async with serve_metrics(metrics_app_of(app), listeners.metrics):
            serving = asyncio.ensure_future(server.serve(sockets=[listeners.main]))
            ends = [stop.wait(), _announce(server, pool, app, listeners)] + ([watch] if watch else [])
            try:
                await _first_of(asyncio.shield(serving), *ends)
                await _finish(server, drain, settings.shutdown_seconds)
            finally:
                server.should_exit = True
                await serving
    except OSError as error:
        raise StartError(why_not_bound(url, error)) from None


async def _finish(server: HttpServer, drain: Drain, grace_seconds: float) -> None:
    """Turn newcomers away, and give what is in flight the grace time."""
    drain.begin()
    if drain.num_inflight:
        say(f"waiting up to {grace_seconds:g} s for {_requests(drain.num_inflight)}")
    try:
        await asyncio.wait_for(drain.wait_idle(), grace_seconds)
    except TimeoutError:
        say(f"{_requests(drain.num_inflight)} cut off after {grace_seconds:g} s")
        server.cut_off()


def _requests(number: int) -> str:
    return "1 request" if number == 1 else f"{number} requests"


async def _announce(server: HttpServer, pool: EnginePool, app: FastAPI, listeners: _Listeners) -> None:
    """Report what is served where and to whom, once it is; never returns."""
    while not server.started:  # noqa: ASYNC110  # uvicorn offers no event
        await asyncio.sleep(0.02)
    await pool.check()
    try:
        names = ", ".join(str(entry.get("id")) for entry in await pool.models())
    except GatewayError as error:
        names = f"a model whose name is unknown ({error.message})"
    url = url_of(listeners.main)
    if listeners.metrics is not None:
        say(f"metrics at {url_of(listeners.metrics)}/metrics, for everybody who can reach it")
    num_keys = len(keys_of(app).names)
    keys = "1 API key" if num_keys == 1 else f"{num_keys} API keys"
    say(f"open to {f'holders of {keys}' if num_keys else f'everybody who can reach {url}'}")
    say(f"serving {names} at {url}/v1 (Ctrl-C stops)")
    await asyncio.Event().wait()


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
    """An event that the first signal to stop sets; at the second, `kill` is called and the process ends at once."""
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            kill()
            os._exit(130)
        stop.set()
        say("shutting down; press Ctrl-C again to force quit")

    loop = asyncio.get_running_loop()
    silence_late_results(loop)
    is_hangup_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # as nohup has it
    for number in (signal.SIGINT, signal.SIGTERM, *(() if is_hangup_ignored else (signal.SIGHUP,))):
        loop.add_signal_handler(number, on_signal)
    return stop


@dataclass(frozen=True, slots=True)
class _Listeners:
    main: socket.socket
    metrics: socket.socket | None


@contextlib.contextmanager
def _bound_sockets(settings: Settings, address: Address) -> Generator[_Listeners, None, None]:
    with contextlib.ExitStack() as stack:
        main = stack.enter_context(bound_socket(address))
        metrics = None
        if settings.metrics_port is not None:
            metrics_address = Address(settings.metrics_host, settings.metrics_port)
            metrics = stack.enter_context(bound_socket(metrics_address, "--metrics-port"))
        yield _Listeners(main, metrics)


def say_error(sentence: object) -> None:
    """Why a command fails."""
    print(f"{ERROR_PREFIX}{escaped(str(sentence))}", file=sys.stderr)


def say(sentence: str) -> None:
    """For the person at the terminal; standard output is for the request log."""
    print(f"visiondrop: {escaped(sentence)}", file=sys.stderr, flush=True)
