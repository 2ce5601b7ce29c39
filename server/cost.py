"""What a request will cost the engine, in tokens, before the engine has seen it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from vd_plugin.schedule import Schedule

_BYTES_PER_TOKEN: Final = 4
"""A rule of thumb for English text; the exact count would take the model's tokenizer."""


def estimate_text_tokens(texts: Iterable[str]) -> int:
    """About how many tokens some texts have, rounded up; at least 1."""
    num_bytes = sum(len(text.encode(errors="surrogatepass")) for text in texts)
    return max(-(-num_bytes // _BYTES_PER_TOKEN), 1)


def request_cost(text_tokens: int, schedules: Iterable[Schedule]) -> int:
    """Cost for admission: text and kept visual tokens (the average over the decoder's layers)."""
    return text_tokens + sum(schedule.kept for schedule in schedules)
