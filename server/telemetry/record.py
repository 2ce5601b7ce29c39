"""One record a request: usage, headers, metrics and the log line are all read from it.

Counts of visual tokens are those of the resolved schedules. The engine reports what its prompt really held
(`multimodal_tokens`); where the two differ, the record says so.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final

from server.budget import HEADER, request_class
from server.errors import GatewayError
from server.schemas.answers import ImageTokens, PromptTokensDetails, VisualTokens
from server.schemas.engine_usage import EngineUsage
from vd_plugin.schedule import Geometry, Schedule, prefill_flops

_SANE_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_SANE_PARAM: Final = re.compile(r"[A-Za-z0-9_.\[\]-]{1,128}")

_LONGEST_MODEL: Final = 128
"""Characters of a model's name in the log: clients may write what they like there."""


def visual_tokens(schedules: Sequence[Schedule]) -> VisualTokens:
    """What some images cost, as it goes on the wire: sums, and each image with the rows of its stages."""
    full, kept = sum(item.full for item in schedules), sum(item.kept for item in schedules)
    per_image = [
        ImageTokens(budget=item.effective_budget, full=item.full, kept=item.kept, stages=list(item.rows))
        for item in schedules
    ]
    return VisualTokens(images=len(schedules), full=full, kept=kept, saved=full - kept, per_image=per_image)


def choose_request_id(sent: str | None) -> str:
    """The client's own id if it is short printable ASCII (it goes into headers and logs), else a new one."""
    if sent is not None and _SANE_REQUEST_ID.fullmatch(sent):
        return sent
    return f"req-{uuid.uuid4().hex}"


@dataclass(slots=True)
class RequestRecord:
    """What is known about a request; filled in on its way through the gateway."""

    request_id: str
    route: str
    arrived: float = field(default_factory=time.time)
    started: float = field(default_factory=time.monotonic)
    key_name: str | None = None
    rate_headers: Mapping[str, str] = field(default_factory=dict)
    trace_headers: Mapping[str, str] = field(default_factory=dict)
    model: str | None = None
    stream: bool = False
    image_fetch_seconds: list[float] = field(default_factory=list)
    image_decode_seconds: list[float] = field(default_factory=list)
    queue_seconds: float | None = None
    max_model_len: int | None = None
    geometry: Geometry | None = None
    image_sizes: tuple[tuple[int, int], ...] = ()
    """Height and width of each image, in pixels."""
    schedules: tuple[Schedule, ...] = ()
    engine_answered: bool = False
    engine_usage: EngineUsage | None = None
    first_token_seconds: float | None = None
    inter_token_seconds: list[float] = field(default_factory=list)
    total_seconds: float | None = None
    sent_status: int | None = None
    failure_status: int | None = None
    failure: str | None = None
    failure_param: str | None = None
    rejection: str | None = None
    _last_token: float | None = None

    def mark_token(self) -> None:
        """Note that a part of the answer's text has come."""
        now = time.monotonic()
        if self._last_token is None:
            self.first_token_seconds = now - self.started
        else:
            self.inter_token_seconds.append(now - self._last_token)
        self._last_token = now

    def mark_failure(self, error: GatewayError) -> None:
        """Note how the request failed; also after the status line has gone out, as in the middle of a stream."""
        # Sentences about a request may quote it, ours as well as the engine's: prompts must not get into the log.
        may_quote = error.status < 500
        self.failure = (error.code or error.openai_type) if may_quote else error.message
        self.failure_param = error.param if error.param and _SANE_PARAM.fullmatch(error.param) else None
        self.failure_status, self.rejection = error.status, error.reason

    def mark_end(self) -> None:
        self.total_seconds = time.monotonic() - self.started

    @property
    def status(self) -> int:
        """The outcome. A stream that breaks off counts as its failure, although it began with 200."""
        return self.failure_status or self.sent_status or 500

    @property
    def budget_class(self) -> str:
        return request_class(self.schedules)

    @property
    def full(self) -> int:
        return sum(schedule.full for schedule in self.schedules)

    @property
    def kept(self) -> int:
        return sum(schedule.kept for schedule in self.schedules)

    @property
    def saved(self) -> int:
        return self.full - self.kept

    @property
    def num_placeholders(self) -> int:
        return sum(schedule.num_placeholders for schedule in self.schedules)

    @property
    def prompt_tokens(self) -> int | None:
        return None if self.engine_usage is None else self.engine_usage.prompt_tokens

    @property
    def completion_tokens(self) -> int | None:
        return None if self.engine_usage is None else self.engine_usage.completion_tokens

    @property
    def cached_tokens(self) -> int | None:
        """Prompt tokens that came out of the engine's prefix cache, if it reports them."""
        details = None if self.engine_usage is None else self.engine_usage.prompt_tokens_details
        return None if details is None else details.cached_tokens

    @property
    def image_tokens(self) -> int:
        """Visual tokens in the prompt: as the engine counted them, else as planned."""
        reported = self._reported_image_tokens
        return self.num_placeholders if reported is None else reported

    @property
    def is_mismatch(self) -> bool:
        """Whether the engine's prompt held another number of visual tokens than the schedule says."""
        reported = self._reported_image_tokens
        return reported is not None and reported != self.num_placeholders

    @property
    def prefill_flops_saved(self) -> int:
        """Against the stock model on the same prompt; 0 until the engine has reported the prompt's length."""
        if self.geometry is None or self.prompt_tokens is None:
            return 0
        text_tokens = max(self.prompt_tokens - self.image_tokens, 0)
        stock = [replace(item, encoder=None, decoder=(None,) * len(item.decoder)) for item in self.schedules]
        return prefill_flops(self.geometry, text_tokens, stock) - prefill_flops(
            self.geometry, text_tokens, self.schedules
        )

    def usage(self, reported: Any) -> dict[str, Any]:
        """The engine's `usage` in our shape; it is kept for the other readers of the record.

        Raises:
            EngineFailedError: it cannot be read.
        """
        self.engine_usage = EngineUsage.parse(reported)
        return {
            **reported,
            "prompt_tokens_details": PromptTokensDetails(
                cached_tokens=self.cached_tokens or 0,
                image_tokens=self.image_tokens,
                text_tokens=max((self.prompt_tokens or 0) - self.image_tokens, 0),
            ).model_dump(),
            "visual_tokens": self.visual_tokens(),
        }

    def visual_tokens(self) -> dict[str, Any]:
        return visual_tokens(self.schedules).model_dump()

    def headers(self) -> dict[str, str]:
        """What is known before the first token: the sums, and the budget that was applied to each image."""
        budgets = ", ".join(str(schedule.effective_budget) for schedule in self.schedules)
        return {
            **({HEADER: budgets} if budgets else {}),
            "X-Visual-Tokens-Full": str(self.full),
            "X-Visual-Tokens-Kept": str(self.kept),
            "X-Visual-Tokens-Saved": str(self.saved),
        }

    def log_fields(self) -> dict[str, Any]:
        """The log line. Neither prompts nor images are in it."""
        return {
            "time": datetime.fromtimestamp(self.arrived, UTC).isoformat(timespec="milliseconds"),
            "request_id": self.request_id,
            "key": self.key_name,
            "route": self.route,
            "status": self.status,
            "error": self.failure,
            "param": self.failure_param,
            "model": None if self.model is None else self.model[:_LONGEST_MODEL],
            "stream": self.stream,
            "budget_class": self.budget_class,
            "visual_tokens": self.visual_tokens(),
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.completion_tokens,
            "image_fetch_seconds": _rounded(sum(self.image_fetch_seconds)),
            "image_decode_seconds": _rounded(sum(self.image_decode_seconds)),
            "queue_seconds": _rounded(self.queue_seconds),
            "first_token_seconds": _rounded(self.first_token_seconds),
            "total_seconds": _rounded(self.total_seconds),
        }

    @property
    def _reported_image_tokens(self) -> int | None:
        """None when the engine reports no details (it runs without --enable-prompt-tokens-details)."""
        details = None if self.engine_usage is None else self.engine_usage.prompt_tokens_details
        return None if details is None else (details.multimodal_tokens or {}).get("image", 0)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
