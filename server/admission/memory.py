"""A bound on the bytes that all requests together hold in memory: bodies, and images fetched or normalised.

It is shared by parties. One with several requests holds at most SHARE_OF_FREE times what it leaves free (the dynamic
threshold of Choudhury and Hahne, IEEE/ACM Transactions on Networking 6.2, 1998): three quarters alone, less the more
others hold, so that the next one always finds something free. The last sixteenth is for small bodies.
"""

from __future__ import annotations

from types import TracebackType
from typing import Final

from server.errors import OverloadedError, PayloadTooLargeError
from server.settings import usable_bytes

SMALL_BYTES: Final = 64 * 1024
"""What a request may hold to count as small: a text is, an image is not."""
SHARE_OF_FREE: Final = 3

_RETRY_AFTER_SECONDS: Final = 2
"""Most bodies are held for seconds: from the first byte until a stream begins or a whole answer has come."""


class MemoryBudget:
    """`limit_bytes` for all leases together. For one event loop: it has no locks."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._leased_bytes = 0
        self._held: dict[str, int] = {}  # by each party

    @property
    def leased_bytes(self) -> int:
        return self._leased_bytes

    def lease(self, party: str) -> MemoryLease:
        """An empty lease, for one request. Releasing it is the caller's duty; `with` does it."""
        return MemoryLease(self, party)

    def _take(self, lease: MemoryLease, num_bytes: int) -> None:
        wanted = lease.num_bytes + num_bytes
        limit = self.limit_bytes if wanted <= SMALL_BYTES else usable_bytes(self.limit_bytes)
        if wanted > limit:
            raise PayloadTooLargeError(
                f"the request's body and images take more than {limit} bytes together", code="request_too_large"
            )
        free = limit - self._leased_bytes - num_bytes
        if free < 0:
            raise _full("the server holds as much request data as it has memory for; try again later", "memory_full")
        held = self._held.get(lease.party, 0)
        is_only_one = held == lease.num_bytes
        if not is_only_one and held + num_bytes > SHARE_OF_FREE * free:
            raise _full(
                "your requests under way hold as much of the server's memory as they may; try again when some of them "
                "are done",
                "memory_share",
            )
        self._held[lease.party] = held + num_bytes
        self._leased_bytes += num_bytes

    def _give_back(self, lease: MemoryLease) -> None:
        self._leased_bytes -= lease.num_bytes
        held = self._held.pop(lease.party, 0) - lease.num_bytes
        if held:
            self._held[lease.party] = held


class MemoryLease:
    """What one request holds. A context manager that releases it."""

    def __init__(self, budget: MemoryBudget, party: str) -> None:
        self.party = party
        self.num_bytes = 0
        self._budget = budget

    def add(self, num_bytes: int) -> None:
        """Hold `num_bytes` more.

        Raises:
            PayloadTooLargeError: this one alone would pass the limit, so that waiting would not help.
            OverloadedError: all leases together would ("memory_full"), or its party's ("memory_share"). In any case
                this one keeps what it had.
        """
        assert num_bytes >= 0, num_bytes
        self._budget._take(self, num_bytes)
        self.num_bytes += num_bytes

    def release(self) -> None:
        """Give everything back. Doing it again changes nothing."""
        self._budget._give_back(self)
        self.num_bytes = 0

    def __enter__(self) -> MemoryLease:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


def _full(message: str, reason: str) -> OverloadedError:
    return OverloadedError(message, reason=reason, retry_after_seconds=_RETRY_AFTER_SECONDS)
