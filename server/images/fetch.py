"""Images that a request names by URL, fetched from the public internet and nowhere else.

1. read the URL                                           (url.py)
2. resolve its host once, and check every address         (addresses.py)
3. connect to a checked address: no second resolution that could answer otherwise
4. follow redirects by hand, each from step 1
5. read the image, up to its limit

All of it within one time limit. No proxy, cookie, credential or kept connection takes part. Whatever goes wrong after
step 1 is one sentence to the client, else the server could be used to probe its own network; the operator's log
has the reason. How long a failure takes is not hidden.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import cache
from ipaddress import ip_address
from typing import Final, NoReturn, TypeAlias

import httpcore
import httpx

from server.admission.party import Party
from server.errors import ImageUnavailableError, PayloadTooLargeError
from server.images.addresses import IPAddress, is_public
from server.images.places import ImagePlaces
from server.images.url import ImageUrlError, parse_image_url, port_of
from server.settings import Settings
from server.sockets import OwnedSocket
from server.version import package_version

Resolver: TypeAlias = Callable[[str, int], Awaitable[list[IPAddress]]]
"""(host, port) -> the host's addresses, best first.

Raises:
    OSError: there is no such host.
"""

_CODE: Final = "invalid_image_url"
_REDIRECTS: Final = (301, 302, 303, 307, 308)
_CONNECT_SECONDS: Final = 3.0
"""For one address, so that one that does not answer (often IPv6) leaves time for the next."""

_log = logging.getLogger("visiondrop")


class ImageFetcher:
    """Fetches images, a bounded number at a time, shared fairly among parties.

    Args:
        resolve, is_allowed, ssl_context: seams for tests; servers leave them alone.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        resolve: Resolver | None = None,
        is_allowed: Callable[[IPAddress], bool] = is_public,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._settings = settings
        self._resolve = resolve or self._look_up
        self._is_allowed = is_allowed
        self._ssl_context = ssl_context or _default_ssl_context()
        self._headers = [
            (b"User-Agent", f"visiondrop/{package_version()}".encode("ascii")),
            (b"Accept", b"image/*"),
            (b"Accept-Encoding", b"identity"),
            (b"Connection", b"close"),
        ]
        self._places = ImagePlaces(settings, settings.fetch_concurrency, "fetching")
        # Not the loop's own threads: names that take long to resolve would hold up whatever else needs those.
        self._threads = ThreadPoolExecutor(settings.fetch_concurrency, thread_name_prefix="resolve")

    async def fetch(self, url: str, param: str, party: Party, hold: Callable[[int], None] = lambda _: None) -> bytes:
        """The bytes behind the URL, whatever they are. Cancelling it closes its connection.

        Args:
            param: path of the URL in the request, for the error object.
            party: whose request it is.
            hold: called with the size of every chunk that arrives; what it raises ends the fetch.

        Raises:
            ImageUnavailableError: the URL is not admitted, or does not lead to a public server that sends a file.
            PayloadTooLargeError: the file has too many bytes.
            OverloadedError: too many images are being fetched.
        """
        if not self._settings.fetch_images:
            raise ImageUnavailableError(
                "this server does not fetch images; send the image itself as a data URL (data:image/png;base64,...)",
                param=param,
                code=_CODE,
            )
        try:
            target = parse_image_url(url, self._settings)
        except ImageUrlError as error:
            raise ImageUnavailableError(str(error), param=param, code=_CODE) from None
        async with self._places.hold(party):
            try:
                async with asyncio.timeout(self._settings.fetch_seconds):
                    return await self._follow(target, hold)
            except _TooLargeError:
                limit = self._settings.max_image_bytes
                raise PayloadTooLargeError(
                    f"the image has more than {limit} bytes; at most {limit} are accepted",
                    param=param,
                    code="image_too_large",
                ) from None
            except _FAILURES as error:
                # The host alone: paths and queries may hold secrets.
                reason = str(error) or type(error).__name__
                _log.info("image not fetched from %s: %r", target.raw_host.decode("ascii"), reason)
                self._refuse(param)

    async def aclose(self) -> None:
        """Let go of the threads. No fetch may be under way."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _refuse(self, param: str) -> NoReturn:
        seconds, redirects = self._settings.fetch_seconds, self._settings.fetch_redirects
        raise ImageUnavailableError(
            f"the image could not be fetched; its URL must lead to a public server that sends it within {seconds:g} "
            f"seconds, uncompressed (redirects: at most {redirects})",
            param=param,
            code=_CODE,
        ) from None

    async def _follow(self, url: httpx.URL, hold: Callable[[int], None]) -> bytes:
        for _ in range(self._settings.fetch_redirects + 1):
            async with self._get(url) as response:
                if response.status not in _REDIRECTS:
                    return await self._read(response, hold)
                location = _header(response, b"location")
            url = parse_image_url(location.decode(), self._settings, base=url)
        raise _UnavailableError("too many redirects")

    @asynccontextmanager
    async def _get(self, url: httpx.URL) -> AsyncIterator[httpcore.Response]:
        scheme, host, port = url.raw_scheme, url.raw_host, port_of(url)
        headers = [(b"Host", url.netloc), *self._headers]
        pinned = _PinnedSocket(await self._checked_addresses(host.decode("ascii"), port))
        connection = httpcore.AsyncHTTPConnection(
            httpcore.Origin(scheme, host, port), ssl_context=self._ssl_context, network_backend=pinned
        )
        target = httpcore.URL(scheme=scheme, host=host, port=port, target=url.raw_path)
        try:
            async with connection.stream("GET", target, headers=headers) as response:
                yield response
        finally:
            await pinned.aclose()

    async def _checked_addresses(self, host: str, port: int) -> list[IPAddress]:
        addresses = await self._resolve(host, port)
        if not addresses:
            raise _UnavailableError(f"{host} has no address")
        for address in addresses:
            # One is enough: nobody's public server has a second address inside.
            if not self._is_allowed(address):
                raise _UnavailableError(f"{host} has the address {address}, which is not public")
        return addresses

    async def _look_up(self, host: str, port: int) -> list[IPAddress]:
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._threads, _getaddrinfo, host, port)
        return [ip_address(address) for address in found]

    async def _read(self, response: httpcore.Response, hold: Callable[[int], None]) -> bytes:
        if response.status != 200:
            raise _UnavailableError(f"status {response.status}")
        if _header(response, b"content-encoding").lower() not in (b"", b"identity"):
            raise _UnavailableError("the answer is compressed")
        limit = self._settings.max_image_bytes
        if int(_header(response, b"content-length") or b"0") > limit:
            raise _TooLargeError
        data = bytearray()
        async for piece in response.aiter_stream():
            data += piece
            if len(data) > limit:
                raise _TooLargeError
            hold(len(piece))
            # A server may send chunks of one byte, which arrive by the thousand: others must get their turn.
            await asyncio.sleep(0)
        return bytes(data)


class _UnavailableError(Exception): ...


class _TooLargeError(Exception): ...


_FAILURES: Final = (
    _UnavailableError,
    ImageUrlError,  # of a redirect
    OSError,  # no such host, TLS, a timeout
    UnicodeError,  # a redirect to bytes that are no text
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.TimeoutException,
)


class _PinnedSocket(OwnedSocket):
    """Connects to one of the given addresses, whatever the host is called. TLS still verifies the name."""

    def __init__(self, addresses: list[IPAddress]) -> None:
        super().__init__()
        self._addresses = addresses

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 (httpcore's signature)
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        failure: Exception = httpcore.ConnectError("no address")
        for address in self._addresses:
            try:
                return await super().connect_tcp(str(address), port, _CONNECT_SECONDS)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure


@cache
def _default_ssl_context() -> ssl.SSLContext:
    # Reading all authorities takes some 50 ms.
    return httpx.create_ssl_context()


def _getaddrinfo(host: str, port: int) -> list[str]:
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def _header(response: httpcore.Response, name: bytes) -> bytes:
    return next((value for key, value in response.headers if key.lower() == name), b"")
