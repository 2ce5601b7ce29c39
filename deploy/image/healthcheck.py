"""A container's health check: `python3 healthcheck.py URL` exits with 0 if the URL answers with 200.

Standard library only: images have no curl.
"""

from __future__ import annotations

import sys
import urllib.error
import urllib.request

_SECONDS = 4.0  # below the check's own time limit, so that the reason is printed


def main(url: str) -> int:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the container itself, never a proxy
    try:
        with opener.open(url, timeout=_SECONDS) as answer:
            return 0 if answer.status == 200 else 1
    except urllib.error.HTTPError as error:
        print(error.read(1000).decode(errors="replace"))
    except OSError as error:
        print(error)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
