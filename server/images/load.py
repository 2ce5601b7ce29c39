"""The images of a request: fetched where they are named by a URL, checked, their size known."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Final

import anyio
import anyio.to_thread

from server.admission.memory import MemoryLease
from server.admission.party import Party
from server.budget import RequestedImage
from server.images.check import CheckedImage, DecodingNeededError, check_image, check_image_bytes
from server.images.fetch import ImageFetcher
from server.images.places import ImagePlaces
from server.settings import Settings
from server.tasks import see_exception
from server.telemetry.record import RequestRecord

_CHEAP_PIXELS: Final = 65_536
"""Decoded in the time that any image takes. Costs are in pixels."""
_BYTES_PER_PIXEL: Final = 8
"""So many bytes of a file are read in the time in which one pixel is decoded and normalised."""


class ImageLoader:
    """Images are checked in threads, a bounded number at a time for all requests together, shared fairly by parties.

    How many pixels an image has is known only once its file has been read. Many need no more than that; one that has to
    be decoded waits for its turn again, at its true cost.
    """

    def __init__(self, settings: Settings, fetcher: ImageFetcher) -> None:
        self._settings = settings
        self._fetcher = fetcher
        self._places = ImagePlaces(settings, settings.image_threads, "decoding")
        self._threads = anyio.CapacityLimiter(settings.image_threads)

    async def load(
        self, requested: Sequence[RequestedImage], record: RequestRecord, lease: MemoryLease, party: Party
    ) -> list[CheckedImage]:
        """Load every image from its URL; the record gets the times, also of a request that fails on the way.

        Raises:
            InvalidRequestError: an image cannot be fetched, or is not one that is served.
            PayloadTooLargeError: an image is too large.
            OverloadedError: too many images are being fetched or decoded.
        """
        try:
            async with asyncio.TaskGroup() as group:
                fetches = [
                    group.create_task(self._fetch(item, record, lease, party)) if is_remote(item.url) else None
                    for item in requested
                ]
        except ExceptionGroup as failures:
            # The first to fail has ended the others; one is reported to the client.
            raise failures.exceptions[0] from None
        # One after the other within a request, so that a big one cannot keep all the threads for itself.
        images = []
        for item, fetch in zip(requested, fetches, strict=True):
            started = time.monotonic()
            if fetch is None:
                check, num_bytes = partial(check_image, item.url, self._settings, item.url_path), len(item.url)
            else:
                data = fetch.result()
                check, num_bytes = partial(check_image_bytes, data, self._settings, item.url_path), len(data)
            cost = _CHEAP_PIXELS + num_bytes // _BYTES_PER_PIXEL
            try:
                image = await self._in_thread(partial(check, most_decoded=_CHEAP_PIXELS), cost, party)
            except DecodingNeededError as needed:
                image = await self._in_thread(check, needed.num_pixels, party)
            record.image_decode_seconds.append(time.monotonic() - started)
            if fetch is not None or not image.passed_through:
                lease.add(len(image.url))  # else it is a part of the body
            images.append(image)
        return images

    async def _in_thread(self, check: Callable[[], CheckedImage], cost: int, party: Party) -> CheckedImage:
        """A thread cannot be stopped: when nobody waits for it any more, it still has its place until it is done."""
        place = AsyncExitStack()
        await place.enter_async_context(self._places.hold(party, cost))
        work = asyncio.ensure_future(self._run(check, place))
        work.add_done_callback(see_exception)
        return await asyncio.shield(work)

    async def _run(self, check: Callable[[], CheckedImage], place: AsyncExitStack) -> CheckedImage:
        async with place:
            return await anyio.to_thread.run_sync(check, limiter=self._threads)

    async def _fetch(self, item: RequestedImage, record: RequestRecord, lease: MemoryLease, party: Party) -> bytes:
        started = time.monotonic()
        data = await self._fetcher.fetch(item.url, item.url_path, party, lease.add)
        record.image_fetch_seconds.append(time.monotonic() - started)
        return data


def is_remote(url: str) -> bool:
    """Whether an image is to be fetched. Other URLs are left to `check_image` to judge."""
    return url.lstrip()[:8].lower().startswith(("http://", "https://"))
