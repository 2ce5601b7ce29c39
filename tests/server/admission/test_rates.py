"""Rates: the window, and that what a client is told about it comes true. Time is set by hand."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import limits.storage.memory
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from server.admission.keys import ANONYMOUS, ApiKey
from server.admission.rates import RateLimits
from server.errors import InvalidRequestError, RateLimitError
from server.settings import Settings

A_MOMENT = 0.001
"""An answer's way to the client and back takes longer."""


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(scope="module")
def clock() -> Iterator[Clock]:
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits.storage.memory, "time", SimpleNamespace(time=lambda: clock.now))
        yield clock


def key(name: str = "shop", requests: int | None = None, images: int | None = None) -> ApiKey:
    return ApiKey(name, requests_per_minute=requests, images_per_minute=images)


def refusal(rates: RateLimits, key: ApiKey, num_images: int) -> RateLimitError | None:
    try:
        rates.take_images(key, num_images, "messages")
    except RateLimitError as error:
        return error
    return None


def test_requests_beyond_the_rate_are_refused_until_the_first_is_a_minute_old(clock: Clock) -> None:
    rates, shop = RateLimits(Settings()), key(requests=3)
    for _ in range(3):
        rates.take_request(shop)
        clock.advance(10)
    with pytest.raises(RateLimitError, match="3 requests a minute are accepted; try again in 30 s") as caught:
        rates.take_request(shop)
    assert (caught.value.status, caught.value.reason, caught.value.code) == (
        429,
        "requests_per_minute",
        "rate_limit_exceeded",
    )
    assert caught.value.headers() == {"Retry-After": "30"}
    clock.advance(30 + A_MOMENT)
    rates.take_request(shop)
    with pytest.raises(RateLimitError, match="in 10 s"):
        rates.take_request(shop)


def test_refused_requests_do_not_count(clock: Clock) -> None:
    rates, shop = RateLimits(Settings()), key(requests=1)
    rates.take_request(shop)
    for _ in range(5):
        clock.advance(11)
        with pytest.raises(RateLimitError):
            rates.take_request(shop)
    clock.advance(5 + A_MOMENT)
    rates.take_request(shop)


def test_images_are_taken_all_or_none(clock: Clock) -> None:
    rates, shop = RateLimits(Settings()), key(images=10)
    rates.take_images(shop, 7, "messages")
    for _ in range(3):
        with pytest.raises(RateLimitError) as caught:
            rates.take_images(shop, 4, "messages")
        assert caught.value.reason == "images_per_minute"
    rates.take_images(shop, 3, "messages")
    rates.take_images(shop, 0, "messages")


def test_images_wait_for_as_many_as_they_are(clock: Clock) -> None:
    rates, shop = RateLimits(Settings()), key(images=10)
    for count in (2, 3, 5):
        rates.take_images(shop, count, "messages")
        clock.advance(10)
    for count, seconds in ((1, 30), (2, 30), (3, 40), (5, 40), (6, 50), (10, 50)):
        with pytest.raises(RateLimitError) as caught:
            rates.take_images(shop, count, "messages")
        assert caught.value.retry_after_seconds == seconds


def test_more_images_than_a_minute_allows_are_not_told_to_wait(clock: Clock) -> None:
    rates, shop = RateLimits(Settings()), key(images=10)
    with pytest.raises(InvalidRequestError, match="has 11 images, but at most 10 a minute") as caught:
        rates.take_images(shop, 11, "messages")
    assert (caught.value.param, caught.value.headers()) == ("messages", {})


def test_keys_do_not_share_and_requests_are_not_images(clock: Clock) -> None:
    rates = RateLimits(Settings())
    for name in ("shop", "lab"):
        rates.take_request(key(name, 1, 1))
        rates.take_images(key(name, 1, 1), 1, "messages")
        with pytest.raises(RateLimitError):
            rates.take_request(key(name, 1, 1))


def test_own_rate_goes_before_that_of_the_server(clock: Clock) -> None:
    rates = RateLimits(Settings(requests_per_minute=2, images_per_minute=2))
    assert rates.headers(key())["x-ratelimit-limit-requests"] == "2"
    assert rates.headers(key(requests=5))["x-ratelimit-limit-requests"] == "5"
    rates.take_images(key("lab", images=5), 5, "messages")
    with pytest.raises(InvalidRequestError):
        rates.take_images(key(), 3, "messages")


def test_those_without_keys_share_one_rate(clock: Clock) -> None:
    rates = RateLimits(Settings(requests_per_minute=1))
    rates.take_request(ANONYMOUS)
    with pytest.raises(RateLimitError):
        rates.take_request(ANONYMOUS)


def test_no_rate_is_no_limit_and_no_header(clock: Clock) -> None:
    rates = RateLimits(Settings())
    for _ in range(1000):
        rates.take_request(ANONYMOUS)
    rates.take_images(ANONYMOUS, 100_000, "messages")
    assert rates.headers(ANONYMOUS) == {}


def test_headers_tell_what_is_left_and_when_all_of_it_is_back(clock: Clock) -> None:
    rates, shop = RateLimits(Settings()), key(requests=3)

    def told() -> tuple[str, ...]:
        return tuple(rates.headers(shop)[f"x-ratelimit-{name}-requests"] for name in ("limit", "remaining", "reset"))

    assert told() == ("3", "3", "0s")
    rates.take_request(shop)
    clock.advance(15)
    rates.take_request(shop)
    clock.advance(1.5)
    assert told() == ("3", "1", "59s")
    clock.advance(59 + A_MOMENT)
    assert told() == ("3", "3", "0s")


@settings(deadline=None)
@given(
    rate=st.integers(1, 12),
    hits=st.lists(st.tuples(st.integers(1, 12), st.floats(0, 70)), min_size=1, max_size=20),
    wanted=st.integers(1, 12),
)
@example(rate=1, hits=[(1, 60.0)], wanted=1)  # at the very edge of the window
def test_waiting_as_told_makes_the_same_request_pass_and_no_sooner(
    clock: Clock, rate: int, hits: list[tuple[int, float]], wanted: int
) -> None:
    rates, shop, wanted = RateLimits(Settings()), key(images=rate), min(wanted, rate)
    for count, pause in hits:
        refusal(rates, shop, min(count, rate))
        clock.advance(pause)
    if (refused := refusal(rates, shop, wanted)) is not None:
        assert 0 < refused.retry_after_seconds <= 60
        clock.advance(refused.retry_after_seconds - 1 - A_MOMENT)
        assert refusal(rates, shop, wanted) is not None
        clock.advance(1 + 2 * A_MOMENT)
        assert refusal(rates, shop, wanted) is None
