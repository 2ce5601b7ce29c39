"""LLaVA's prompts hold `<image>` where an image goes. As text in a request it would take the place of an image."""

from __future__ import annotations

from typing import Any, Final

from server.errors import InvalidRequestError

MARKER: Final = "<image>"

_URLS: Final = ("image_url", "input_image")


def refuse_markers(value: Any, param: str) -> None:
    """For a request with images: no text in it may hold the marker. vLLM would put the first image there.

    Without images the marker is a token like any other.

    Raises:
        InvalidRequestError: some text holds it; its path begins with `param`.
    """
    steps = _find(value)
    if steps is not None:
        path = param + steps
        raise InvalidRequestError(
            f"{path} holds {MARKER!r}, which stands for an image in this model's prompts; "
            "it cannot be used as text in a request with images",
            param=path,
        )


def _find(value: Any) -> str | None:
    """The path to the first text that holds the marker; None if there is none.

    The path is put together on the way back, when there is one: names can have megabytes, and values be many.
    """
    if isinstance(value, str):
        return "" if MARKER in value else None
    if isinstance(value, dict):
        for name, item in value.items():
            if MARKER in name:
                return ""
            if (steps := _find(item)) is not None:
                return f".{name}{steps}"
    elif isinstance(value, list):
        for place, item in enumerate(value):
            is_image = isinstance(item, dict) and item.get("type") in _URLS
            if not is_image and (steps := _find(item)) is not None:
                return f"[{place}]{steps}"
        # Templates join the parts of a turn.
        texts = (part.get("text") for part in value if isinstance(part, dict))
        if MARKER in "".join(text for text in texts if isinstance(text, str)):
            return ""
    return None
