"""What the laws of every Python client share. Loaded as a pytest plugin, inside the clients' own environment."""

from __future__ import annotations

import ipaddress
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

BLOCKED_EVENTS = ("socket.connect", "socket.getaddrinfo")


def _stay_at_home(event: str, arguments: tuple[Any, ...]) -> None:
    """No client may phone out, neither when it is imported nor later."""
    if event not in BLOCKED_EVENTS:
        return
    host = arguments[0] if event == "socket.getaddrinfo" else arguments[1]
    host = host[0] if isinstance(host, tuple) else host
    if host in (None, "localhost") or (isinstance(host, str) and host.startswith("/")):
        return
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback:
        print(f"a client wants to reach {host}", file=sys.__stderr__, flush=True)
        os._exit(70)  # an exception could be swallowed


sys.addaudithook(_stay_at_home)


@pytest.fixture(scope="session")
def here() -> SimpleNamespace:
    """Written by test_clients.py: addresses, an image and its schedules."""
    path = Path(os.environ["CLIENT_LAWS"])
    return json.loads(path.read_text(), object_hook=lambda fields: SimpleNamespace(**fields))


@pytest.fixture
def engine_sees_it_abandoned(here: SimpleNamespace) -> Callable[[Callable[[], None]], bool]:
    """Whether the engine notices, within two seconds, that an answer is wanted no more."""

    def count() -> int:
        with httpx.Client(transport=httpx.HTTPTransport(uds=here.engine_socket)) as client:
            return int(client.get("http://engine/seen").json()["abandoned"])

    def check(abandon: Callable[[], None]) -> bool:
        before = count()
        abandon()
        deadline = time.monotonic() + 2
        while count() == before and time.monotonic() < deadline:
            time.sleep(0.02)
        return count() == before + 1

    return check
