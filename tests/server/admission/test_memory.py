"""Memory: no more is leased than there is, nobody takes all of it, and everything comes back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.admission.memory import SMALL_BYTES, MemoryBudget, MemoryLease
from server.errors import OverloadedError, PayloadTooLargeError
from server.settings import usable_bytes

LIMIT = 160 * SMALL_BYTES
USABLE = usable_bytes(LIMIT)


def hold(budget: MemoryBudget, party: str, num_bytes: int) -> MemoryLease:
    lease = budget.lease(party)
    lease.add(num_bytes)
    return lease


def assert_refused(lease: MemoryLease, num_bytes: int, reason: str) -> None:
    before = lease.num_bytes
    with pytest.raises(OverloadedError) as caught:
        lease.add(num_bytes)
    assert (caught.value.status, caught.value.reason) == (503, reason)
    assert caught.value.headers() == {"Retry-After": "2"}
    assert lease.num_bytes == before


def test_leases_share_one_limit_and_a_refused_one_keeps_what_it_had() -> None:
    budget = MemoryBudget(LIMIT)
    with hold(budget, "a", USABLE * 6 // 10) as first, hold(budget, "b", USABLE * 3 // 10) as second:
        assert_refused(second, USABLE // 10 + 2, "memory_full")
        second.add(USABLE // 10)
        first.release()
        second.add(USABLE * 6 // 10)
        assert budget.leased_bytes == USABLE
    assert budget.leased_bytes == 0


def test_lease_is_released_when_its_request_fails() -> None:
    budget = MemoryBudget(LIMIT)

    def fail() -> None:
        with budget.lease("a") as lease:
            lease.add(USABLE * 6 // 10)
            lease.add(USABLE * 6 // 10)

    with pytest.raises(PayloadTooLargeError) as caught:
        fail()
    assert (caught.value.status, caught.value.code) == (413, "request_too_large"), "waiting would not help"
    hold(budget, "a", USABLE)


def test_party_with_several_requests_leaves_a_quarter_to_the_others() -> None:
    """However its uploads stall: the next party finds room, and the one after it."""
    budget = MemoryBudget(LIMIT)
    stalled = [budget.lease("a") for _ in range(40)]
    for _ in range(80):
        for lease in stalled:
            try:
                lease.add(SMALL_BYTES // 4)
            except OverloadedError as error:
                assert error.reason == "memory_share"  # noqa: PT017  # it need not be raised
    assert abs(budget.leased_bytes - USABLE * 3 // 4) < SMALL_BYTES
    first, second = hold(budget, "b", USABLE // 8), budget.lease("b")
    second.add(USABLE // 32)
    assert_refused(second, USABLE // 16, "memory_share")
    first.release()
    hold(budget, "c", USABLE // 8)


def test_share_grows_when_the_others_are_idle() -> None:
    budget = MemoryBudget(LIMIT)
    other = hold(budget, "b", USABLE // 2)
    hold(budget, "a", USABLE // 4)
    more = budget.lease("a")
    assert_refused(more, USABLE // 5, "memory_share")
    other.release()
    more.add(USABLE // 5)


def test_only_request_of_a_party_may_be_as_large_as_any() -> None:
    hold(MemoryBudget(LIMIT), "a", USABLE)


def test_small_bodies_find_room_when_large_ones_take_all_of_theirs() -> None:
    budget = MemoryBudget(LIMIT)
    hold(budget, "a", USABLE - 1)
    assert_refused(budget.lease("b"), SMALL_BYTES + 1, "memory_full")
    small = [hold(budget, f"{number}", SMALL_BYTES) for number in range((LIMIT - USABLE) // SMALL_BYTES)]
    assert len(small) == 10
    assert_refused(budget.lease("late"), 2, "memory_full")


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 60) | st.none())))
def test_sum_is_within_the_limit_and_nought_at_the_end(steps: list[tuple[int, int | None]]) -> None:
    budget = MemoryBudget(100)
    leases, held = [budget.lease(f"{number % 3}") for number in range(4)], [0] * 4
    for which, num_bytes in steps:
        if num_bytes is None:
            leases[which].release()
            held[which] = 0
            continue
        try:
            leases[which].add(num_bytes)
        except PayloadTooLargeError:
            assert held[which] + num_bytes > 100
        except OverloadedError as error:
            is_full = sum(held) + num_bytes > 100
            assert error.reason == ("memory_full" if is_full else "memory_share")  # noqa: PT017  # it need not be raised
        else:
            held[which] += num_bytes
        assert budget.leased_bytes == sum(held) <= 100
    for lease in leases * 2:
        lease.release()
    assert budget.leased_bytes == 0
