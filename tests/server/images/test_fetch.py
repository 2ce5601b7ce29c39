"""Fetching images: from public servers only, within every limit, and with one sentence for whatever fails."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from ipaddress import ip_address
from typing import Any

import httpcore
import pytest
import trustme
from bad_urls import BAD_URLS, DNS, UNAVAILABLE, BadUrl
from departures import sockets_left_by
from origin import Origin, deaf_port, redirect, reply

from server.admission.party import Party
from server.errors import GatewayError, ImageUnavailableError, OverloadedError, PayloadTooLargeError
from server.images.addresses import IPAddress
from server.images.fetch import ImageFetcher, Resolver
from server.settings import Settings
from server.version import package_version

pytestmark = pytest.mark.anyio

PARAM = "messages[0].content[1].image_url.url"
PARTY = Party("a")
IMAGE = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
OUTSIDE, INSIDE = "127.0.0.1", "127.0.0.2"
"""Stand for a public and for a private address where a test needs servers behind both."""


DISTRUSTING = ssl.create_default_context()


def is_outside(address: IPAddress) -> bool:
    return str(address) == OUTSIDE


class Names:
    """DNS. Each name has answers for one question after the other; the last is for all that follow."""

    def __init__(self, **answers: list[list[str]]) -> None:
        self.answers = {"pictures.example": [[OUTSIDE]], **{f"{name}.example": says for name, says in answers.items()}}
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> list[IPAddress]:
        self.asked.append(host)
        if host not in self.answers:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        answers = self.answers[host]
        return [ip_address(text) for text in (answers.pop(0) if len(answers) > 1 else answers[0])]


@asynccontextmanager
async def fetching(
    names: Resolver | None = None, *, is_allowed: Callable[[IPAddress], bool] | None = is_outside, **settings: Any
) -> AsyncIterator[Callable[[str], Awaitable[bytes]]]:
    """A fetcher that takes http and lives on loopback. `is_allowed=None` is the real rule."""
    context = settings.pop("ssl_context", DISTRUSTING)
    rule = {} if is_allowed is None else {"is_allowed": is_allowed}
    fetcher = ImageFetcher(
        Settings(**{"fetch_http": True, "fetch_seconds": 5.0, **settings}),
        resolve=Names() if names is None else names,
        ssl_context=context,
        **rule,
    )
    try:
        yield lambda url: fetcher.fetch(url, PARAM, PARTY)
    finally:
        await fetcher.aclose()


@pytest.fixture
async def origin(anyio_backend: str) -> AsyncIterator[Origin]:
    async with Origin() as server:
        server.pages["/a.png"] = reply(IMAGE)
        yield server


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


def server_context(authority: trustme.CA, *names: str) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(*names).configure_cert(context)
    return context


async def refusal(fetch: Awaitable[bytes]) -> str:
    with pytest.raises(ImageUnavailableError) as caught:
        await fetch
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "invalid_image_url", PARAM)
    return caught.value.message


# What is asked, and of whom


async def test_image_arrives_as_it_was_sent(origin: Origin) -> None:
    origin.pages["/a.png?size=1"] = reply(IMAGE)
    async with fetching() as fetch:
        assert await fetch(f"http://pictures.example:{origin.port}/a.png?size=1#top") == IMAGE
    asked = origin.requests[0]
    assert asked.line == "GET /a.png?size=1 HTTP/1.1"
    assert asked.headers == {
        "Host": f"pictures.example:{origin.port}",
        "User-Agent": f"visiondrop/{package_version()}",
        "Accept": "image/*",
        "Accept-Encoding": "identity",
        "Connection": "close",
    }


async def test_connection_goes_to_the_checked_address_and_tls_to_the_name(
    authority: trustme.CA, trusting: ssl.SSLContext
) -> None:
    names = Names()
    async with (
        Origin(tls=server_context(authority, "pictures.example")) as origin,
        fetching(names, ssl_context=trusting, fetch_http=False) as fetch,
    ):
        origin.pages["/a.png"] = reply(IMAGE)
        assert await fetch(f"https://pictures.example:{origin.port}/a.png") == IMAGE
    assert names.asked == ["pictures.example"]


@pytest.mark.parametrize("certified", ["other.example", OUTSIDE])
async def test_certificate_of_another_name_is_refused(
    authority: trustme.CA, trusting: ssl.SSLContext, certified: str
) -> None:
    async with (
        Origin(tls=server_context(authority, certified)) as origin,
        fetching(ssl_context=trusting) as fetch,
    ):
        assert UNAVAILABLE in await refusal(fetch(f"https://pictures.example:{origin.port}/a.png"))
        assert origin.requests == []


async def test_certificate_of_an_unknown_authority_is_refused(authority: trustme.CA) -> None:
    async with Origin(tls=server_context(authority, "pictures.example")) as origin, fetching() as fetch:
        assert UNAVAILABLE in await refusal(fetch(f"https://pictures.example:{origin.port}/a.png"))
        assert origin.requests == []


async def test_proxies_of_the_environment_are_not_asked(origin: Origin, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Origin() as trap, fetching() as fetch:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{trap.port}")
            monkeypatch.setenv(name.lower(), f"http://127.0.0.1:{trap.port}")
        assert await fetch(f"http://pictures.example:{origin.port}/a.png") == IMAGE
        assert trap.requests == []


async def test_one_fetch_keeps_no_connection_for_the_next(origin: Origin) -> None:
    names = Names(moving=[[OUTSIDE], [INSIDE]])
    async with fetching(names) as fetch:
        url = f"http://moving.example:{origin.port}/a.png"
        assert await fetch(url) == IMAGE
        assert UNAVAILABLE in await refusal(fetch(url))


async def test_further_address_serves_where_the_first_do_not(origin: Origin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.images.fetch._CONNECT_SECONDS", 0.1)
    with deaf_port(INSIDE, origin.port):
        names = Names(two=[[INSIDE, "127.0.0.3", OUTSIDE]])  # one is deaf, one refuses
        async with fetching(names, is_allowed=lambda address: address.is_loopback) as fetch:
            start = time.monotonic()
            assert await fetch(f"http://two.example:{origin.port}/a.png") == IMAGE
            assert time.monotonic() - start < 2


# Addresses


@pytest.fixture
def no_connections(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every connection of the fetcher goes through this one method of httpcore."""
    tried: list[str] = []

    async def connect_tcp(self: httpcore.AnyIOBackend, host: str, *_: object) -> httpcore.AsyncNetworkStream:
        tried.append(host)
        raise httpcore.ConnectError

    monkeypatch.setattr(httpcore.AnyIOBackend, "connect_tcp", connect_tcp)
    return tried


async def real_dns(host: str, port: int) -> list[IPAddress]:
    """What the system's resolver makes of odd spellings, and the names of the corpus."""
    numeric = not DNS.get(host)
    found = [
        str(entry[4][0])
        for text in DNS.get(host, (host,))
        for entry in socket.getaddrinfo(text, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    ]
    assert numeric or len(found) == len(DNS[host])
    return [ip_address(text) for text in found]


@pytest.mark.parametrize("bad", BAD_URLS, ids=[repr(bad.url[:60]) for bad in BAD_URLS])
async def test_bad_urls_are_refused_before_any_connection(bad: BadUrl, no_connections: list[str]) -> None:
    async with fetching(real_dns, is_allowed=None, fetch_http=False) as fetch:
        assert bad.says in await refusal(fetch(bad.url))
    assert no_connections == []


async def test_the_corpus_is_large_and_a_public_host_would_be_asked(no_connections: list[str]) -> None:
    assert len(set(BAD_URLS)) == len(BAD_URLS) >= 60
    async with fetching(real_dns, is_allowed=None, fetch_http=False) as fetch:
        await refusal(fetch("https://93.184.215.14/picture.png"))
        await refusal(fetch("https://[2606:4700::1111]/picture.png"))
    assert no_connections == ["93.184.215.14", "2606:4700::1111"]


@pytest.mark.parametrize("host", ["127.1", "2130706433", "0x7f.1", "0177.1", "localhost", "127.0.0.1"])
async def test_the_systems_own_resolver_is_checked_as_well(origin: Origin, host: str) -> None:
    url = f"http://{host}:{origin.port}/a.png"
    settings = Settings(fetch_http=True)
    strict = ImageFetcher(settings, ssl_context=DISTRUSTING)
    lax = ImageFetcher(settings, ssl_context=DISTRUSTING, is_allowed=lambda address: address.is_loopback)
    try:
        assert UNAVAILABLE in await refusal(strict.fetch(url, PARAM, PARTY))
        assert origin.requests == []
        assert await lax.fetch(url, PARAM, PARTY) == IMAGE
    finally:
        await strict.aclose()
        await lax.aclose()


@pytest.mark.parametrize("answer", [[OUTSIDE, INSIDE], [INSIDE, OUTSIDE], []])
async def test_one_private_address_among_public_ones_refuses_the_host(origin: Origin, answer: list[str]) -> None:
    async with fetching(Names(mixed=[answer])) as fetch:
        assert UNAVAILABLE in await refusal(fetch(f"http://mixed.example:{origin.port}/a.png"))
    assert origin.requests == []


async def test_rebound_name_is_never_resolved_twice(origin: Origin) -> None:
    names = Names(rebound=[[OUTSIDE], [INSIDE]])
    async with Origin(INSIDE, origin.port) as inside, fetching(names) as fetch:
        assert await fetch(f"http://rebound.example:{origin.port}/a.png") == IMAGE
        assert names.asked == ["rebound.example"]
        assert inside.requests == []


# Redirects


@pytest.mark.parametrize("status", ["301 A", "302 B", "303 C", "307 D", "308 E"])
async def test_redirects_are_followed_each_with_its_own_resolution(origin: Origin, status: str) -> None:
    names = Names(cdn=[[OUTSIDE]])
    origin.pages["/start"] = redirect(f"http://cdn.example:{origin.port}/deep/down", status)
    origin.pages["/deep/down"] = redirect("../a.png#there", status)
    async with fetching(names) as fetch:
        assert await fetch(f"http://pictures.example:{origin.port}/start") == IMAGE
    assert names.asked == ["pictures.example", "cdn.example", "cdn.example"]
    assert [asked.headers["Host"].split(":")[0] for asked in origin.requests] == names.asked
    assert all("Referer" not in asked.headers and "Cookie" not in asked.headers for asked in origin.requests)


@pytest.mark.parametrize(("allowed", "is_reached"), [(0, False), (2, False), (3, True)])
async def test_redirects_are_counted(origin: Origin, allowed: int, is_reached: bool) -> None:
    for step in range(3):
        origin.pages[f"/{step}"] = redirect(f"/{step + 1}")
    origin.pages["/3"] = reply(IMAGE)
    async with fetching(fetch_redirects=allowed) as fetch:
        fetched = fetch(f"http://pictures.example:{origin.port}/0")
        if is_reached:
            assert await fetched == IMAGE
        else:
            assert UNAVAILABLE in await refusal(fetched)
    assert len(origin.requests) == allowed + 1


@pytest.mark.parametrize(
    "location",
    [
        "http://inside.example:{port}/a.png",
        "//inside.example:{port}/a.png",
        "http://127.0.0.2:{port}/a.png",
        "http://rebound.example:{port}/a.png",
        "http://nowhere.example/",
        "http://user@pictures.example:{port}/a.png",
        "http://pictures.example:22/",
        "\\\\inside.example:{port}\\a.png",
        "file:///etc/passwd",
        "ftp://pictures.example/a.png",
        "data:image/png;base64,iVBORw0KGgo=",
        "javascript:alert(1)",
        "http://[::1",
        "http://",
        "/loop",
        "",
        "/\xff",
        "/" + "a" * 9000,
    ],
)
async def test_redirects_pass_the_same_checks(origin: Origin, location: str) -> None:
    names = Names(inside=[[INSIDE]], rebound=[[OUTSIDE], [INSIDE]])
    names.answers["127.0.0.2"] = [[INSIDE]]
    origin.pages["/loop"] = redirect(location.format(port=origin.port))
    async with Origin(INSIDE, origin.port) as inside, fetching(names) as fetch:
        host = "rebound" if "rebound" in location else "pictures"
        assert UNAVAILABLE in await refusal(fetch(f"http://{host}.example:{origin.port}/loop"))
        assert inside.requests == []


async def test_redirect_without_a_location_is_refused(origin: Origin) -> None:
    origin.pages["/lost"] = reply(status="302 Found")
    async with fetching() as fetch:
        assert UNAVAILABLE in await refusal(fetch(f"http://pictures.example:{origin.port}/lost"))


@pytest.mark.parametrize("fetch_http", [False, True])
async def test_redirect_from_https_to_http_needs_http_switched_on(
    authority: trustme.CA, trusting: ssl.SSLContext, origin: Origin, fetch_http: bool
) -> None:
    async with (
        Origin(tls=server_context(authority, "pictures.example")) as secure,
        fetching(ssl_context=trusting, fetch_http=fetch_http) as fetch,
    ):
        secure.pages["/down"] = redirect(f"http://pictures.example:{origin.port}/a.png")
        fetched = fetch(f"https://pictures.example:{secure.port}/down")
        if fetch_http:
            assert await fetched == IMAGE
        else:
            assert UNAVAILABLE in await refusal(fetched)
            assert origin.requests == []


# Policy


async def test_fetching_can_be_switched_off() -> None:
    names = Names()
    async with fetching(names, fetch_images=False) as fetch:
        assert "data URL" in await refusal(fetch("https://pictures.example/a.png"))
    assert names.asked == []


async def test_http_is_off_unless_switched_on(origin: Origin) -> None:
    async with fetching(fetch_http=False) as fetch:
        assert "must begin with https://" in await refusal(fetch(f"http://pictures.example:{origin.port}/a.png"))
    assert origin.requests == []


async def test_list_of_hosts_narrows_and_never_widens(origin: Origin) -> None:
    names = Names(other=[[OUTSIDE]], inside=[[INSIDE]])
    origin.pages["/away"] = redirect(f"http://other.example:{origin.port}/a.png")
    base = f"example:{origin.port}"
    async with fetching(names, fetch_hosts=("pictures.example", "inside.example")) as fetch:
        assert await fetch(f"http://pictures.{base}/a.png") == IMAGE
        assert "listed hosts only" in await refusal(fetch(f"http://other.{base}/a.png"))
        assert UNAVAILABLE in await refusal(fetch(f"http://pictures.{base}/away"))
        assert UNAVAILABLE in await refusal(fetch(f"http://inside.{base}/a.png"))


# Limits


async def test_size_is_refused_by_its_announcement_alone(origin: Origin) -> None:
    origin.pages["/big"] = lambda writer: _write(writer, b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n")
    origin.pages["/huge"] = lambda writer: _write(
        writer, b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 20 + b"\r\n\r\n"
    )
    async with fetching(max_image_bytes=1000) as fetch:
        for path in ("big", "huge"):
            with pytest.raises(PayloadTooLargeError) as caught:
                await fetch(f"http://pictures.example:{origin.port}/{path}")
            assert (caught.value.status, caught.value.code, caught.value.param) == (413, "image_too_large", PARAM)


@pytest.mark.parametrize("is_chunked", [True, False])
async def test_endless_image_is_cut_at_the_limit(origin: Origin, is_chunked: bool) -> None:
    sent = 0

    async def pour(writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\n" + (b"Transfer-Encoding: chunked\r\n" if is_chunked else b"") + b"\r\n")
        while True:
            writer.write((b"4000\r\n%b\r\n" if is_chunked else b"%b") % bytes(0x4000))
            await writer.drain()
            sent += 0x4000

    origin.pages["/endless"] = pour
    async with fetching(max_image_bytes=100_000) as fetch:
        with pytest.raises(PayloadTooLargeError):
            await fetch(f"http://pictures.example:{origin.port}/endless")
        await asyncio.wait_for(origin.left.wait(), 2)
    assert sent < 30_000_000  # what fits into the buffers of two sockets


@pytest.mark.parametrize("size", [0, 1, 999, 1000])
@pytest.mark.parametrize("sized", [True, False])
async def test_images_up_to_the_limit_arrive_whole(origin: Origin, size: int, sized: bool) -> None:
    origin.pages["/fits"] = reply(bytes(size), sized=sized)
    async with fetching(max_image_bytes=1000) as fetch:
        assert await fetch(f"http://pictures.example:{origin.port}/fits") == bytes(size)


async def _write(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(data)


async def _drip(writer: asyncio.StreamWriter, start: bytes, drop: bytes) -> None:
    writer.write(start)
    while True:
        await asyncio.sleep(0.02)
        writer.write(drop)


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_client_that_leaves_at_any_point_leaves_no_socket(scheme: str) -> None:
    async with Origin(is_mute=True) as origin, fetching() as fetch:
        url = f"{scheme}://pictures.example:{origin.port}/a.png"
        assert await sockets_left_by(lambda: fetch(url)) == 0


@asynccontextmanager
async def slow_server(kind: str) -> AsyncIterator[str]:
    """A URL that takes for ever, although (where it can) something happens all the time."""
    if kind == "connect":
        with deaf_port() as port:
            yield f"http://pictures.example:{port}/"
        return
    async with Origin(is_mute=kind in ("handshake", "answer")) as origin:
        scheme = "https" if kind == "handshake" else "http"
        start = b"HTTP/1.1 200 OK\r\n"
        origin.pages["/headers"] = lambda writer: _drip(writer, start, b"X: y\r\n")
        origin.pages["/interim"] = lambda writer: _drip(writer, b"", b"HTTP/1.1 103 Early Hints\r\n\r\n")
        origin.pages["/body"] = lambda writer: _drip(writer, start + b"Content-Length: 999\r\n\r\n", b"x")
        origin.pages["/redirects"] = _slow_redirect
        yield f"{scheme}://pictures.example:{origin.port}/{kind}"
        await asyncio.wait_for(origin.left.wait(), 1)


async def _slow_redirect(writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(0.1)
    writer.write(redirect("/redirects"))


@pytest.mark.parametrize("kind", ["connect", "handshake", "answer", "headers", "interim", "body", "redirects"])
async def test_time_is_limited_in_all(kind: str) -> None:
    async with slow_server(kind) as url, fetching(fetch_seconds=0.3, fetch_redirects=100) as fetch:
        start = time.monotonic()
        assert UNAVAILABLE in await refusal(fetch(url))
        assert 0.2 < time.monotonic() - start < 1.5


async def test_slow_resolver_is_cut() -> None:
    async def never(host: str, port: int) -> list[IPAddress]:
        await asyncio.Event().wait()
        return []

    async with fetching(never, fetch_seconds=0.1) as fetch:
        assert UNAVAILABLE in await refusal(fetch("http://pictures.example/"))


@pytest.mark.parametrize("kind", ["connect", "handshake", "answer", "headers", "body"])
async def test_cancelled_fetch_closes_its_connection_at_once(kind: str) -> None:
    async with slow_server(kind) as url, fetching(fetch_seconds=60) as fetch:
        task = asyncio.ensure_future(fetch(url))
        await asyncio.sleep(0.1)
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # slow_server waits for the connection's end


async def test_fetches_at_a_time_are_bounded(origin: Origin) -> None:
    gate = asyncio.Event()

    async def wait(writer: asyncio.StreamWriter) -> None:
        await gate.wait()
        writer.write(reply(IMAGE))

    origin.pages["/wait"] = wait
    async with fetching(fetch_concurrency=2) as fetch:
        tasks = [asyncio.ensure_future(fetch(f"http://pictures.example:{origin.port}/wait")) for _ in range(6)]
        await asyncio.sleep(0.1)
        assert len(origin.requests) == 2
        tasks.pop().cancel()
        gate.set()
        assert await asyncio.gather(*tasks) == [IMAGE] * 5
    assert len(origin.requests) == 5


async def test_fetch_that_waits_too_long_for_its_turn_is_turned_away(origin: Origin) -> None:
    origin.pages["/hang"] = lambda writer: _write(writer, b"")
    url = f"http://pictures.example:{origin.port}"
    async with fetching(fetch_concurrency=1, queue_seconds=0.1) as fetch:
        task = asyncio.ensure_future(fetch(f"{url}/hang"))
        await origin.heard.wait()
        start = time.monotonic()
        with pytest.raises(OverloadedError) as caught:
            await fetch(f"{url}/a.png")
        assert (caught.value.status, caught.value.reason) == (503, "queue_timeout")
        assert caught.value.message == "the server is fetching too many images; try again later"
        assert time.monotonic() - start < 2
        task.cancel()
        await asyncio.wait((task,))
        assert await fetch(f"{url}/a.png") == IMAGE


async def test_image_in_tiny_chunks_leaves_others_their_turn(origin: Origin) -> None:
    origin.pages["/crumbs"] = reply(b"1\r\nx\r\n" * 20_000 + b"0\r\n\r\n", sized=False, Transfer_Encoding="chunked")
    turns = 0
    async with fetching() as fetch:
        task = asyncio.ensure_future(fetch(f"http://pictures.example:{origin.port}/crumbs"))
        while not task.done():
            await asyncio.sleep(0)
            turns += 1
        assert await task == b"x" * 20_000
    assert turns > 19_000


# What goes wrong looks the same


GARBAGE = {
    "status-404": reply(IMAGE, "404 Not Found"),
    "status-206": reply(IMAGE, "206 Partial Content"),
    "status-204": b"HTTP/1.1 204 No Content\r\n\r\n",
    "status-304": b"HTTP/1.1 304 Not Modified\r\n\r\n",
    "status-500": reply(b"secret", "500 Internal Server Error"),
    "switched": reply(status="101 Switching Protocols", Upgrade="tcp", Connection="upgrade"),
    "gzip": reply(IMAGE, Content_Encoding="gzip"),
    "brotli": reply(IMAGE, Content_Encoding="br"),
    "gzip-transfer": reply(IMAGE, sized=False, Transfer_Encoding="gzip, chunked"),
    "nothing": b"",
    "half-a-header": b"HTTP/1.1 200 OK\r\nContent-Le",
    "not-http": b"220 mail.example ESMTP\r\n",
    "ssh": b"SSH-2.0-OpenSSH_9.2\r\n",
    "binary": bytes(range(256)) * 10,
    "http-2": b"\x00\x00\x12\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x64",
    "huge-header": reply(IMAGE, X="y" * 200_000),
    "huge-redirect": reply(status="302 Found", Location="/" + "a" * 200_000),
    "two-lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "bad-length": b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\nab",
    "hex-length": b"HTTP/1.1 200 OK\r\nContent-Length: 0x10\r\n\r\nab",
    "bad-chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nab",
    "cut-short": b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nab",
    "cut-chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
    "header-of-nulls": b"HTTP/1.1 200 OK\r\nX: \x00\r\n\r\n",
}


@pytest.mark.parametrize("name", GARBAGE)
async def test_answers_that_are_no_image_are_refused(origin: Origin, name: str) -> None:
    origin.pages["/garbage"] = GARBAGE[name]
    async with fetching() as fetch:
        assert UNAVAILABLE in await refusal(fetch(f"http://pictures.example:{origin.port}/garbage"))


async def test_every_failure_on_the_network_is_one_sentence(origin: Origin, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server((OUTSIDE, 0)) as unused:
        closed_port = unused.getsockname()[1]
    origin.pages["/inside"] = redirect(f"http://inside.example:{origin.port}/")
    origin.pages["/file"] = redirect("file:///etc/passwd")
    origin.pages["/slow"] = lambda writer: _write(writer, b"")
    origin.pages["/garbage"] = b"SSH-2.0-OpenSSH_9.2\r\n"
    causes = {
        "no such name": "http://nowhere.example/?token=secret",
        "private": f"http://inside.example:{origin.port}/?token=secret",
        "refused": f"http://pictures.example:{closed_port}/?token=secret",
        "not TLS": f"https://pictures.example:{origin.port}/?token=secret",
        "status": f"http://pictures.example:{origin.port}/none?token=secret",
        "redirect inside": f"http://pictures.example:{origin.port}/inside",
        "redirect to a file": f"http://pictures.example:{origin.port}/file",
        "time": f"http://pictures.example:{origin.port}/slow",
        "not HTTP": f"http://pictures.example:{origin.port}/garbage",
    }
    caplog.set_level(logging.INFO, "visiondrop")
    async with fetching(Names(inside=[[INSIDE]]), fetch_seconds=0.3) as fetch:
        messages = {cause: await refusal(fetch(url)) for cause, url in causes.items()}
    assert len(set(messages.values())) == 1
    assert messages["time"] == (
        "the image could not be fetched; its URL must lead to a public server that sends it within 0.3 seconds, "
        "uncompressed (redirects: at most 3)"
    )
    lines = [record.getMessage() for record in caplog.records if record.name == "visiondrop"]
    assert len(lines) == len(causes)
    assert len({line.partition(": ")[2] for line in lines}) == len(causes) - 1  # two lead to the same private address
    assert "127.0.0.2, which is not public" in lines[1]
    assert "secret" not in "".join(lines)


async def test_errors_carry_no_trace_of_their_cause() -> None:
    async with fetching() as fetch:
        with pytest.raises(GatewayError) as caught:
            await fetch("http://nowhere.example/")
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
