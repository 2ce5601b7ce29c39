"""What a key may send in a minute: requests and images, each over a moving window of 60 seconds.

The window is exact: it keeps the moment of every hit. That costs about 150 bytes a hit, 90 MB for a hundred keys that
all send 6,000 requests a minute, which is more than one gateway process can take in. A sliding-window counter would
need next to nothing, but only estimates, and then `Retry-After` could not be kept.

The storage is the synchronous one: a hit takes microseconds, and nothing can come between a look and a hit. The
asynchronous one starts a thread a key at every hit.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Final

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from server.admission.keys import ApiKey
from server.errors import InvalidRequestError, RateLimitError
from server.settings import Settings

_WINDOW_SECONDS: Final = 60


class RateLimits:
    """The rates of all keys. A key without a rate of its own has the server's; None is no limit."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._storage = MemoryStorage()
        self._window = MovingWindowRateLimiter(self._storage)

    def take_request(self, key: ApiKey) -> None:
        """Count one request. A refused one does not count.

        Raises:
            RateLimitError: the key has sent as many in the last minute as it may.
        """
        rate = self._request_rate(key)
        if rate is not None and not self._window.hit(rate, key.name):
            seconds = max(self._seconds_until_free(rate, key, 1), 1)
            raise RateLimitError(
                f"at most {rate.amount} requests a minute are accepted; try again in {seconds} s",
                reason="requests_per_minute",
                code="rate_limit_exceeded",
                retry_after_seconds=seconds,
            )

    def take_images(self, key: ApiKey, count: int, param: str) -> None:
        """Count the images of one request, all of them or none.

        Args:
            param: the field that holds them, for the error object.

        Raises:
            RateLimitError: they are more than is left of the last minute's.
            InvalidRequestError: they are more than the key may send in a whole minute.
        """
        rate = self._image_rate(key)
        if rate is None or count == 0:
            return
        if count > rate.amount:
            raise InvalidRequestError(
                f"the request has {count} images, but at most {rate.amount} a minute are accepted, "
                f"so it can never pass; send fewer at a time",
                param=param,
            )
        if not self._window.hit(rate, key.name, cost=count):
            seconds = max(self._seconds_until_free(rate, key, count), 1)
            raise RateLimitError(
                f"at most {rate.amount} images a minute are accepted, and the {count} of this request would be "
                f"more than that; try again in {seconds} s",
                reason="images_per_minute",
                code="rate_limit_exceeded",
                retry_after_seconds=seconds,
            )

    def headers(self, key: ApiKey) -> dict[str, str]:
        """The headers by which OpenAI's clients know how many requests are left; none where there is no limit.

        As with OpenAI, `reset` is when all of the limit will be there again.
        """
        rate = self._request_rate(key)
        if rate is None:
            return {}
        remaining = self._window.get_window_stats(rate, key.name).remaining
        return {
            "x-ratelimit-limit-requests": str(rate.amount),
            "x-ratelimit-remaining-requests": str(remaining),
            "x-ratelimit-reset-requests": f"{self._seconds_until_free(rate, key, rate.amount)}s",
        }

    def _request_rate(self, key: ApiKey) -> RateLimitItemPerMinute | None:
        return _rate(key.requests_per_minute, self._settings.requests_per_minute, "requests")

    def _image_rate(self, key: ApiKey) -> RateLimitItemPerMinute | None:
        return _rate(key.images_per_minute, self._settings.images_per_minute, "images")

    def _seconds_until_free(self, rate: RateLimitItemPerMinute, key: ApiKey, count: int) -> int:
        """Whole seconds, at most 60, after which `count` hits more will pass; 0 if they would now.

        It may be 0 for a hit just refused, since time goes on between the two.
        Hits that will have left the window by then are those that a window shorter by as much does not see.
        """

        def is_free_after(seconds: int) -> bool:
            name = rate.key_for(key.name)
            _, num_hits = self._storage.get_moving_window(name, rate.amount, _WINDOW_SECONDS - seconds)
            return num_hits + count <= rate.amount

        return bisect_left(range(_WINDOW_SECONDS), True, key=is_free_after)


def _rate(own: int | None, server: int | None, namespace: str) -> RateLimitItemPerMinute | None:
    amount = server if own is None else own
    return None if amount is None else RateLimitItemPerMinute(amount, namespace=namespace)
