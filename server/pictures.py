"""The pictures of a request: fetched where they are named by a URL, checked, their size known."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial

import anyio
import anyio.to_thread

from server.errors import InvalidRequestError
from server.image_fetch import ImageFetcher
from server.images import CheckedImage, check_image, check_image_bytes
from server.memory_budget import MemoryLease
from server.record import RequestRecord
from server.settings import Settings


class PictureLoader:
    """Pictures are checked in threads, a bounded number at a time for all requests together."""

    def __init__(self, settings: Settings, fetcher: ImageFetcher) -> None:
        self._settings = settings
        self._fetcher = fetcher
        self._slots = asyncio.Semaphore(settings.image_threads)
        self._threads = anyio.CapacityLimiter(settings.image_threads)

    def check_number(self, num_pictures: int, param: str) -> None:
        """
        Raises:
            InvalidRequestError: more pictures than a request may have.
        """
        limit = self._settings.max_images_per_request
        if num_pictures > limit:
            raise InvalidRequestError(
                f"the request has {num_pictures} images; at most {limit} are accepted",
                param=param.partition("[")[0],
                code="too_many_images",
            )

    async def load(
        self, pictures: Sequence[tuple[str, str]], record: RequestRecord, lease: MemoryLease
    ) -> list[CheckedImage]:
        """Take every picture from its URL.

        Args:
            pictures: path in the request, and URL, of each.

        Raises:
            InvalidRequestError: a picture cannot be had, or is none that is served.
            PayloadTooLargeError: a picture is too large.
        """
        try:
            async with asyncio.TaskGroup() as group:
                fetches = [
                    group.create_task(self._fetch(url, param, record, lease)) if is_remote(url) else None
                    for param, url in pictures
                ]
        except ExceptionGroup as failures:
            # The first to fail has ended the others; the client is told of one.
            raise failures.exceptions[0] from None
        # One after the other within a request, so that a big one cannot keep all the threads for itself.
        images = []
        for (param, url), fetch in zip(pictures, fetches, strict=True):
            started = time.monotonic()
            check = (
                partial(check_image, url, self._settings, param)
                if fetch is None
                else partial(check_image_bytes, fetch.result(), self._settings, param)
            )
            image = await self._in_thread(check)
            record.image_decode_seconds.append(time.monotonic() - started)
            if fetch is not None or not image.passed_through:
                lease.add(len(image.url))  # else it is a part of the body
            images.append(image)
        return images

    async def _in_thread(self, check: Callable[[], CheckedImage]) -> CheckedImage:
        """A thread cannot be stopped: when nobody waits for it any more, it still has its place until it is done."""
        await self._slots.acquire()
        work = asyncio.ensure_future(anyio.to_thread.run_sync(check, limiter=self._threads))
        work.add_done_callback(lambda _: self._slots.release())
        return await asyncio.shield(work)

    async def _fetch(self, url: str, param: str, record: RequestRecord, lease: MemoryLease) -> bytes:
        started = time.monotonic()
        data = await self._fetcher.fetch(url, param, lease.add)
        record.image_fetch_seconds.append(time.monotonic() - started)
        return data


def is_remote(url: str) -> bool:
    """Whether a picture is to be fetched. Other URLs are left to `check_image` to judge."""
    return url.lstrip()[:8].lower().startswith(("http://", "https://"))
