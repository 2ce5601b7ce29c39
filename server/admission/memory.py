"""A bound on the bytes that all requests together hold in memory: bodies, and images fetched or normalised."""

from __future__ import annotations

from types import TracebackType
from typing import Final

from server.errors import OverloadedError, PayloadTooLargeError

_RETRY_AFTER_SECONDS: Final = 2
"""Bodies are held for seconds at most: from the first byte to the hand-over to the engine."""


class MemoryBudget:
    """`limit_bytes` for all leases together. For one event loop: it has no locks."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._leased_bytes = 0

    @property
    def leased_bytes(self) -> int:
        return self._leased_bytes

    def lease(self) -> MemoryLease:
        """An empty lease, for one request. Releasing it is the caller's duty; `with` does it."""
        return MemoryLease(self)

    def _take(self, num_bytes: int) -> None:
        if self._leased_bytes + num_bytes > self.limit_bytes:
            raise OverloadedError(
                "the server holds as much request data as it has memory for; try again later",
                reason="memory_full",
                retry_after_seconds=_RETRY_AFTER_SECONDS,
            )
        self._leased_bytes += num_bytes

    def _give_back(self, num_bytes: int) -> None:
        self._leased_bytes -= num_bytes


class MemoryLease:
    """What one request holds. A context manager that releases it."""

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget = budget
        self._num_bytes = 0

    def add(self, num_bytes: int) -> None:
        """Hold `num_bytes` more.

        Raises:
            PayloadTooLargeError: this one alone would pass the limit, so that waiting would not help.
            OverloadedError: all leases together would. In both cases this one keeps what it had.
        """
        assert num_bytes >= 0, num_bytes
        if self._num_bytes + num_bytes > self._budget.limit_bytes:
            raise PayloadTooLargeError(
                f"the request's body and images take more than {self._budget.limit_bytes} bytes together",
                code="request_too_large",
            )
        self._budget._take(num_bytes)
        self._num_bytes += num_bytes

    def release(self) -> None:
        """Give everything back. Doing it again changes nothing."""
        self._budget._give_back(self._num_bytes)
        self._num_bytes = 0

    def __enter__(self) -> MemoryLease:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()
