"""The URL of an image, checked against this server's settings. Nothing is resolved here."""

from __future__ import annotations

import re
from typing import Final

import httpx

from server.settings import Settings

_LONGEST_URL: Final = 8192
_NAME: Final = re.compile(r"(?=.{1,253}\Z)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")
_DEFAULT_PORTS: Final = {"https": 443, "http": 80}


class ImageUrlError(ValueError):
    """A URL that is not fetched. The message is a sentence."""


def parse_image_url(text: str, settings: Settings, base: httpx.URL | None = None) -> httpx.URL:
    """Read an image's URL. Later steps use only what is returned, so that none can read the URL differently.

    Args:
        base: what a relative URL is relative to, for redirects.

    Raises:
        ImageUrlError: not a URL, or one that the settings do not admit.
    """
    text = text.strip()
    if len(text) > _LONGEST_URL:
        raise ImageUrlError(f"the image's URL has more than {_LONGEST_URL} characters")
    # Browsers drop or turn some of these, so that other readers of the URL may see another host.
    if not text.isprintable() or " " in text or "\\" in text:
        raise ImageUrlError("the image's URL has white space, control characters or backslashes; percent-encode them")
    try:
        url = base.join(text) if base is not None else httpx.URL(text)
    except (httpx.InvalidURL, ValueError):
        raise ImageUrlError("the image's URL is not valid") from None
    if url.scheme != "https" and not (url.scheme == "http" and settings.fetch_http):
        schemes = "https:// or http://" if settings.fetch_http else "https://"
        raise ImageUrlError(f"the image's URL must begin with {schemes}, or be a data URL (data:image/png;base64,...)")
    if url.userinfo:
        raise ImageUrlError("the image's URL must not have a user name or a password")
    host = url.raw_host.decode("ascii").removesuffix(".")
    if not (_NAME.fullmatch(host) or (":" in host and "%" not in host)):
        raise ImageUrlError("the image's URL has no valid host name or address")
    # Below 1024 are other protocols, whose servers no client may make us contact. Above, images are served.
    port = port_of(url)
    if port not in _DEFAULT_PORTS.values() and not 1024 <= port <= 65535:
        raise ImageUrlError("the port in the image's URL must be 80, 443, or one from 1024 to 65535")
    if settings.fetch_hosts and not any(_matches(host, pattern) for pattern in settings.fetch_hosts):
        raise ImageUrlError(f"this server fetches images from listed hosts only, and {host} is not one of them")
    return url.copy_with(host=host)


def port_of(url: httpx.URL) -> int:
    return _DEFAULT_PORTS[url.scheme] if url.port is None else url.port


def _matches(host: str, pattern: str) -> bool:
    return host.endswith(pattern[1:]) if pattern.startswith("*.") else host == pattern
