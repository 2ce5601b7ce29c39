"""Fetching and decoding are shared by parties: nobody's images keep those of others waiting."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest
import virtual_time

from server.admission.memory import MemoryBudget
from server.admission.party import Party
from server.budget import RequestedImage
from server.errors import ImageUnavailableError, OverloadedError
from server.images.addresses import IPAddress
from server.images.check import CheckedImage, DecodingNeededError
from server.images.fetch import ImageFetcher
from server.images.load import ImageLoader
from server.images.places import ImagePlaces
from server.settings import Settings
from server.telemetry.record import RequestRecord

FLOOD, QUIET = Party("flood"), Party("quiet")
BIG, SMALL = "big", "small"


async def slow_or_gone(host: str, port: int) -> list[IPAddress]:
    """Names that take as long as a fetch may, and one that is known at once not to exist."""
    await asyncio.sleep(60 if host == "slow.example" else 0.1)
    raise OSError


async def seconds_of(work: Awaitable[object]) -> float:
    loop = asyncio.get_running_loop()
    began = loop.time()
    await work
    return loop.time() - began


def test_image_is_fetched_soon_while_another_party_fetches_slow_ones_without_end() -> None:
    async def laws() -> None:
        fetcher = ImageFetcher(Settings(), resolve=slow_or_gone)

        async def fetch_slowly() -> None:
            with suppress(ImageUnavailableError, OverloadedError):
                await fetcher.fetch("https://slow.example/a.png", "here", FLOOD)

        async def flood() -> None:
            async with asyncio.TaskGroup() as group:
                while True:
                    for _ in range(7 * 16):
                        group.create_task(fetch_slowly())
                    await asyncio.sleep(8)

        async def fetch() -> None:
            with pytest.raises(ImageUnavailableError):
                await fetcher.fetch("https://gone.example/a.png", "here", QUIET)

        flooding = asyncio.ensure_future(flood())
        await asyncio.sleep(9)
        assert await seconds_of(fetch()) < 10.2, "that of one fetch, at most"
        await asyncio.sleep(20)
        assert await seconds_of(fetch()) < 0.2, "while others are about, some places are left to them"
        assert not flooding.done()
        flooding.cancel()
        await asyncio.wait((flooding,))
        await fetcher.aclose()

    virtual_time.run(laws())


class Decoder:
    """Stands in for `check_image`: the first call lasts until the others have come; `order` has what was done when."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.begun = threading.Event()
        self.released = threading.Event()

    def __call__(self, url: str, settings: Settings, param: str, *, most_decoded: int | None = None) -> CheckedImage:
        self.begun.set()
        assert self.released.wait(30)
        self.order.append(url if most_decoded is None or url == SMALL else "read")
        if url == BIG and most_decoded is not None:
            raise DecodingNeededError(49_000_000)
        return CheckedImage(8, 8, url)


async def order_of(monkeypatch: pytest.MonkeyPatch, requests: list[tuple[Party, list[str]]]) -> list[str]:
    """What one thread does, with all requests there from the first image on."""
    decoder, settings = Decoder(), Settings(image_threads=1)
    monkeypatch.setattr("server.images.load.check_image", decoder)
    loader, memory = ImageLoader(settings, ImageFetcher(settings)), MemoryBudget(settings.max_buffered_bytes)

    async def load(party: Party, urls: list[str]) -> None:
        images = [RequestedImage("here", "here", url, None, None) for url in urls]
        await loader.load(images, RequestRecord("1", "/"), memory.lease(party.name), party)

    tasks = [asyncio.ensure_future(load(*request)) for request in requests[:1]]
    await asyncio.to_thread(decoder.begun.wait, 30)
    tasks += [asyncio.ensure_future(load(*request)) for request in requests[1:]]
    await asyncio.sleep(0)
    decoder.released.set()
    await asyncio.wait_for(asyncio.gather(*tasks), 30)
    return decoder.order


@pytest.mark.anyio
async def test_image_is_decoded_next_but_one_behind_any_number_of_another_party(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order = await order_of(monkeypatch, [(FLOOD, [BIG])] * 24 + [(QUIET, [SMALL])])
    assert order.index(SMALL) <= 2, order


@pytest.mark.anyio
async def test_parties_decode_the_same_number_of_pixels_and_not_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    order = await order_of(monkeypatch, [(FLOOD, [BIG] * 3)] + [(QUIET, [SMALL])] * 20)
    assert order.count(SMALL) == 20
    last_small = max(number for number, what in enumerate(order) if what == SMALL)
    assert order[:last_small].count(BIG) <= 1, order


@pytest.mark.parametrize("num_places", range(1, 10))
def test_places_are_bounded_and_a_party_leaves_one_of_seven_or_more(num_places: int) -> None:
    async def laws() -> None:
        places, is_over = ImagePlaces(Settings(queue_seconds=5), num_places, "decoding"), asyncio.Event()

        async def hold(party: Party) -> None:
            async with places.hold(party):
                await is_over.wait()

        async def num_held(start: Callable[[], Awaitable[None]]) -> int:
            tasks = [asyncio.ensure_future(start()) for _ in range(num_places + 1)]
            await asyncio.sleep(6)
            failed = [task.exception() for task in tasks if task.done()]
            assert all(isinstance(error, OverloadedError) for error in failed)
            assert {str(error) for error in failed} <= {"the server is decoding too many images; try again later"}
            return len(tasks) - len(failed)

        async with places.hold(QUIET):
            pass
        num_flood = await num_held(lambda: hold(Party("flood", max_parallel_requests=1)))
        assert num_flood == num_places - (num_places >= 7)
        assert await num_held(lambda: hold(QUIET)) == num_places - num_flood
        is_over.set()
        await asyncio.sleep(1)
        async with places.hold(QUIET):
            pass

    virtual_time.run(laws())
