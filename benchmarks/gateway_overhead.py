"""What the gateway itself costs: CPU time and added latency of a request, before an engine that answers at once.

The engine is a socket that swallows what it is sent, so that the difference between asking it directly and through the
gateway is the gateway. CPU time is the gateway process's own, over all its threads. The check of the image, measured by
itself, is part of both.

    python benchmarks/gateway_overhead.py [--requests 200]

Prints a table, and one line of JSON last.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from io import BytesIO
from pathlib import Path

import httpx
import psutil
from PIL import Image

from server.images.check import check_image
from server.settings import Settings
from vd_plugin.schedule import RULE_VERSION, DecoderShape, Geometry

GEOMETRY = Geometry(
    RULE_VERSION,
    336,
    14,
    ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)),
    (8, 16, 24),
    DecoderShape(32, 4096, 11008, 32, 32, 128),
)
_USAGE = {"prompt_tokens": 600, "completion_tokens": 1, "total_tokens": 601}
_CHOICE = {"index": 0, "message": {"role": "assistant", "content": "Red"}, "finish_reason": "stop"}
_ANSWERS = {
    b"/visiondrop/geometry": {"geometry": GEOMETRY.to_dict(), "plugin_version": "0"},
    b"/v1/models": {"data": [{"id": "nothing"}]},
    b"/v1/chat/completions": {"choices": [_CHOICE], "usage": _USAGE},
}


def engine(path: str) -> None:
    """Answers every request at once, whatever it says."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = re.search(rb"content-length: (\d+)", head)
        left = int(length[1]) if length else 0
        while left:
            left -= len(await reader.read(min(left, 1 << 20)))
        body = json.dumps(_ANSWERS.get(head.split()[1], {})).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n")
        writer.write(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        await writer.drain()
        writer.close()

    async def run() -> None:
        server = await asyncio.start_unix_server(serve, path, limit=1 << 20)
        await server.serve_forever()

    asyncio.run(run())


def image(num_bytes: int, kind: str) -> str:
    """A data URL with an image of noise, as large as can be below a number of bytes."""
    side, data = 16, b""
    while True:
        buffer = BytesIO()
        Image.effect_noise((side, side * 3 // 4), 60).convert("RGB").save(buffer, kind, quality=92)
        if buffer.tell() > num_bytes:
            return f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"
        data, side = buffer.getvalue(), side + max(side // 16, 4)


def check_seconds(*urls: str) -> float:
    """CPU time of checking images, which the gateway does, too: its median."""
    seconds = []
    for _ in range(15):
        began = time.process_time()
        for url in urls:
            check_image(url, Settings(), "here")
        seconds.append(time.process_time() - began)
    return statistics.median(seconds)


def chat(*urls: str) -> bytes:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content = [*parts, {"type": "text", "text": "What is this?"}]
    return json.dumps({"messages": [{"role": "user", "content": content}]}).encode()


def median_seconds(client: httpx.Client, body: bytes, num_requests: int) -> float:
    seconds = []
    for _ in range(num_requests):
        began = time.perf_counter()
        response = client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
        seconds.append(time.perf_counter() - began)
        assert response.status_code == 200, response.text
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=200)
    num_requests = parser.parse_args().requests
    urls = {
        "text": (),
        "100 KB JPEG": (image(100_000, "JPEG"),),
        "2 MB JPEG": (image(2_000_000, "JPEG"),),
        "2 MB PNG": (image(2_000_000, "PNG"),),
    }
    with tempfile.TemporaryDirectory() as folder:
        socket = f"{folder}/engine.sock"
        multiprocessing.Process(target=engine, args=(socket,), daemon=True).start()
        command = [sys.executable, "-m", "server.cli", "gateway", "--engine", f"unix:{socket}", "--port", "0"]
        said = Path(folder) / "said"
        with said.open("wb") as errors:
            gateway = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=os.environ)
        try:
            while not (match := re.search(r"at (http://\S+)/v1", said.read_text())):
                assert gateway.poll() is None, said.read_text()
                time.sleep(0.1)
            through = httpx.Client(base_url=match[1], timeout=60)
            direct = httpx.Client(transport=httpx.HTTPTransport(uds=socket), base_url="http://engine", timeout=60)
            process = psutil.Process(gateway.pid)
            rows = []
            print(
                f"{'request':<14}{'CPU of the gateway':>20}{'direct':>12}{'through':>12}{'added':>12}{'its check':>12}"
            )
            for name, sent in urls.items():
                body = chat(*sent)
                median_seconds(through, body, 10)
                before = sum(process.cpu_times()[:2])
                seconds = median_seconds(through, body, num_requests)
                cpu = (sum(process.cpu_times()[:2]) - before) / num_requests
                alone = median_seconds(direct, body, num_requests)
                figures = (cpu, alone, seconds, seconds - alone, check_seconds(*sent))
                print(
                    f"{name:<14}"
                    + "".join(
                        f"{value * 1e3:>{width}.1f} ms" for value, width in zip(figures, (17, 9, 9, 9, 9), strict=True)
                    )
                )
                names = ("cpu_seconds", "direct_seconds", "through_seconds", "added_seconds", "check_seconds")
                rows.append({"request": name, "bytes": len(body), **dict(zip(names, figures, strict=True))})
            print(json.dumps({"requests": num_requests, "rows": rows}))
        finally:
            gateway.terminate()
            gateway.wait()


if __name__ == "__main__":
    main()
