"""W3C trace context: handed on to the engine, which traces if it is configured to (`--otlp-traces-endpoint`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

_TRACEPARENT: Final = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-[\x21-\x7e]{0,64})?")
_TRACESTATE: Final = re.compile(r"[\x20-\x7e]{1,512}")


def trace_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """`traceparent` and `tracestate` of a request, if they are well formed (https://www.w3.org/TR/trace-context/)."""
    parent, state = headers.get("traceparent"), headers.get("tracestate")
    if parent is None or not _TRACEPARENT.fullmatch(parent):
        return {}
    if state is None or not _TRACESTATE.fullmatch(state):
        return {"traceparent": parent}
    return {"traceparent": parent, "tracestate": state}
