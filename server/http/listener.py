"""A port, taken before an engine is started for nothing."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Generator
from dataclasses import dataclass


class StartError(Exception):
    """Serving is not possible. The message is a sentence for the person at the terminal."""


@dataclass(frozen=True, slots=True)
class Address:
    host: str
    port: int


@contextlib.contextmanager
def bound_socket(address: Address, option: str = "--port") -> Generator[socket.socket, None, None]:
    """A socket that holds the port; nobody can connect until a server listens on it.

    Args:
        option: of the command line, by which another port can be chosen.

    Raises:
        StartError: the port is taken, or the host is none of ours.
    """
    url = _url(address.host, address.port)
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise StartError(why_not_bound(url, error, option)) from None
    with listener:
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(target)
        except OSError as error:
            raise StartError(why_not_bound(url, error, option)) from None
        yield listener


def why_not_bound(url: str, error: OSError, option: str = "--port") -> str:
    if error.errno == errno.EADDRINUSE:
        return f"{url} is already in use; choose another port with {option}"
    return f"cannot listen on {url}: {error.strerror or error}"


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return _url(host, port)


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
