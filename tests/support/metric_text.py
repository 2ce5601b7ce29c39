"""Reading the gateway's metrics in tests."""

from __future__ import annotations

import asyncio

import httpx


def metric(text: str, series: str) -> float:
    values = [line.rpartition(" ")[2] for line in text.splitlines() if line.rpartition(" ")[0] == series]
    assert len(values) == 1, f"{series} occurs {len(values)} times"
    return float(values[0])


async def metrics_of(client: httpx.AsyncClient) -> str:
    return (await client.get("/metrics")).text


async def until_metric(client: httpx.AsyncClient, series: str, value: float) -> None:
    """Wait, five seconds at most, until a series has a value."""
    async with asyncio.timeout(5):
        while metric(await metrics_of(client), series) != value:  # noqa: ASYNC110  # it is seen from outside
            await asyncio.sleep(0.01)
