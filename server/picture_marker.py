"""LLaVA's prompts hold `<image>` where a picture goes. As text in a request it would take the place of a picture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from server.errors import InvalidRequestError

MARKER: Final = "<image>"

_URLS: Final = ("image_url", "input_image")


def refuse_markers(value: Any, param: str) -> None:
    """For a request with pictures: no text in it may hold the marker. vLLM would put the first picture there.

    Without pictures the marker is a token like any other.

    Raises:
        InvalidRequestError: some text holds it; its path begins with `param`.
    """
    for path, text in _texts(value, param):
        if MARKER in text:
            raise InvalidRequestError(
                f"{path} holds {MARKER!r}, which stands for a picture in this model's prompts; "
                "with pictures in the request it cannot be text, too",
                param=path,
            )


def _texts(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield path, name
            yield from _texts(item, f"{path}.{name}")
    elif isinstance(value, list):
        parts = [item for item in value if isinstance(item, dict)]
        for place, item in enumerate(value):
            if not (isinstance(item, dict) and item.get("type") in _URLS):
                yield from _texts(item, f"{path}[{place}]")
        # Templates join the parts of a turn.
        yield path, "".join(part["text"] for part in parts if isinstance(part.get("text"), str))
