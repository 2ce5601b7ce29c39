"""What URLs of images are read as, before anything is looked up."""

from __future__ import annotations

import re

import httpx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from server.images.url import ImageUrlError, parse_image_url
from server.settings import Settings

SETTINGS = Settings(fetch_http=True)


@pytest.mark.parametrize(
    ("text", "host", "target"),
    [
        ("https://example.com", "example.com", "/"),
        ("  https://example.com/a.png\n", "example.com", "/a.png"),
        ("HTTPS://EXAMPLE.com./A.png?q=%20#top", "example.com", "/A.png?q=%20"),
        ("https://bücher.example/ü", "xn--bcher-kva.example", "/%C3%BC"),
        ("https://my_bucket.example:8443/?", "my_bucket.example", "/?"),
        ("http://[2606:4700::1111]:80/a/../b", "2606:4700::1111", "/b"),
    ],
)
def test_urls_have_one_reading(text: str, host: str, target: str) -> None:
    url = parse_image_url(text, SETTINGS)
    assert (url.raw_host.decode(), url.raw_path.decode()) == (host, target)


PARTS = ("https://", "http:", "//", "/", "@", ":", "[", "]", "::1", ".", "..", "a", "ü", "%", "?", "#", "\\", " ", "1")


@given(st.one_of(st.text(), st.lists(st.sampled_from(PARTS)).map("".join), st.text().map("https://{}".format)))
@example("https://\ud800/")
@example("https://[::1]]/")
def test_every_text_is_a_plain_url_or_a_refusal(text: str) -> None:
    for base in (None, httpx.URL("https://example.com/a/b")):
        try:
            url = parse_image_url(text, SETTINGS, base)
        except ImageUrlError:
            continue
        assert url.scheme in ("https", "http")
        assert re.fullmatch(rb"[a-z0-9_.-]+|[0-9a-f:.]+", url.raw_host)
        assert re.fullmatch(rb"/[!-~]*", url.raw_path)
        assert not url.userinfo
        assert parse_image_url(str(url), SETTINGS) == url


@pytest.mark.parametrize(
    ("hosts", "url", "is_listed"),
    [
        ("example.com", "https://example.com/", True),
        ("example.com", "https://EXAMPLE.com./", True),
        ("example.com", "https://a.example.com/", False),
        ("example.com", "https://example.com.evil.test/", False),
        ("*.example.com", "https://a.example.com/", True),
        ("*.example.com", "https://b.a.example.com/", True),
        ("*.example.com", "https://example.com/", False),
        ("*.example.com", "https://evilexample.com/", False),
        ("a.test, Example.com", "https://example.com/", True),
        ("", "https://anything.test/", True),
    ],
)
def test_listed_hosts_match_exactly_or_as_subdomains(
    monkeypatch: pytest.MonkeyPatch, hosts: str, url: str, is_listed: bool
) -> None:
    monkeypatch.setenv("VISIONDROP_FETCH_HOSTS", hosts)
    settings = Settings()
    if is_listed:
        parse_image_url(url, settings)
    else:
        with pytest.raises(ImageUrlError, match="listed hosts only"):
            parse_image_url(url, settings)
