"""The images of a request: fetched where they are named by a URL, checked, their size known."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial

import anyio
import anyio.to_thread

from server.admission.memory import MemoryLease
from server.budget import RequestedImage
from server.images.check import CheckedImage, check_image, check_image_bytes
from server.images.fetch import ImageFetcher
from server.settings import Settings
from server.telemetry.record import RequestRecord


class ImageLoader:
    """Images are checked in threads, a bounded number at a time for all requests together."""

    def __init__(self, settings: Settings, fetcher: ImageFetcher) -> None:
        self._settings = settings
        self._fetcher = fetcher
        self._slots = asyncio.Semaphore(settings.image_threads)
        self._threads = anyio.CapacityLimiter(settings.image_threads)

    async def load(
        self, requested: Sequence[RequestedImage], record: RequestRecord, lease: MemoryLease
    ) -> list[CheckedImage]:
        """Load every image from its URL; the record gets the times, also of a request that fails on the way.

        Raises:
            InvalidRequestError: an image cannot be fetched, or is not one that is served.
            PayloadTooLargeError: an image is too large.
        """
        try:
            async with asyncio.TaskGroup() as group:
                fetches = [
                    group.create_task(self._fetch(item, record, lease)) if is_remote(item.url) else None
                    for item in requested
                ]
        except ExceptionGroup as failures:
            # The first to fail has ended the others; one is reported to the client.
            raise failures.exceptions[0] from None
        # One after the other within a request, so that a big one cannot keep all the threads for itself.
        images = []
        for item, fetch in zip(requested, fetches, strict=True):
            started = time.monotonic()
            check = (
                partial(check_image, item.url, self._settings, item.url_path)
                if fetch is None
                else partial(check_image_bytes, fetch.result(), self._settings, item.url_path)
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

    async def _fetch(self, item: RequestedImage, record: RequestRecord, lease: MemoryLease) -> bytes:
        started = time.monotonic()
        data = await self._fetcher.fetch(item.url, item.url_path, lease.add)
        record.image_fetch_seconds.append(time.monotonic() - started)
        return data


def is_remote(url: str) -> bool:
    """Whether an image is to be fetched. Other URLs are left to `check_image` to judge."""
    return url.lstrip()[:8].lower().startswith(("http://", "https://"))
