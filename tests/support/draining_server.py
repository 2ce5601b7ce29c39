"""A server with the engine's drain, without a model: `python draining_server.py PORT SHUTDOWN_TIMEOUT NOTICE_SECONDS`.

It is run as vLLM runs its own (launcher.py, serve_http): uvicorn takes no signals, handlers are registered before the
server begins, and the app knows its server and arguments.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from argparse import Namespace
from collections.abc import AsyncIterator, Generator

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from vd_plugin import drain

VLLMS_OWN_STATUS = 7
"""Exit status if the handlers that were there before are the ones that got the signal."""

TAKEN_BACK = "taken back"
"""What the log says of work that was told to end."""


class Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


app = FastAPI()
app.add_middleware(drain.DrainMiddleware)


@app.get("/health")
@app.get("/metrics")
async def answer() -> dict[str, str]:
    return {}


@app.post("/work")
async def work(request: Request, seconds: float) -> StreamingResponse:
    """A byte now, the number of bytes received after so many seconds."""
    size = len(await request.body())

    async def parts() -> AsyncIterator[str]:
        yield " "
        await compute(seconds)
        yield str(size)

    return StreamingResponse(parts())


@app.post("/whole")
async def whole(seconds: float) -> dict[str, str]:
    """Nothing until it is done."""
    await compute(seconds)
    return {}


async def compute(seconds: float) -> None:
    try:
        await asyncio.sleep(seconds)
    except asyncio.CancelledError:
        print(TAKEN_BACK, flush=True)
        raise


async def main(port: int, shutdown_timeout: int, notice_seconds: float) -> None:
    drain.NOTICE_SECONDS = notice_seconds
    server = Server(uvicorn.Config(app, port=port, log_level="warning"))
    app.state.args, app.state.server = Namespace(shutdown_timeout=shutdown_timeout), server
    serving = asyncio.ensure_future(server.serve())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, sys.exit, VLLMS_OWN_STATUS)
    await serving


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
