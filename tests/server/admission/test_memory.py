"""Memory: no more is leased than there is, and everything comes back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.admission.memory import MemoryBudget
from server.errors import OverloadedError, PayloadTooLargeError


def test_leases_share_one_limit_and_a_refused_one_keeps_what_it_had() -> None:
    budget = MemoryBudget(100)
    with budget.lease() as first, budget.lease() as second:
        first.add(60)
        second.add(30)
        with pytest.raises(OverloadedError) as caught:
            second.add(11)
        assert (caught.value.status, caught.value.reason) == (503, "memory_full")
        assert caught.value.headers() == {"Retry-After": "2"}
        assert budget.leased_bytes == 90
        second.add(10)
        first.release()
        second.add(60)
        assert budget.leased_bytes == 100
    assert budget.leased_bytes == 0


def test_lease_is_released_when_its_request_fails() -> None:
    budget = MemoryBudget(100)

    def fail() -> None:
        with budget.lease() as lease:
            lease.add(60)
            lease.add(60)

    with pytest.raises(PayloadTooLargeError) as caught:
        fail()
    assert (caught.value.status, caught.value.code) == (413, "request_too_large"), "waiting would not help"
    budget.lease().add(100)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 60) | st.none())))
def test_sum_is_within_the_limit_and_nought_at_the_end(steps: list[tuple[int, int | None]]) -> None:
    budget = MemoryBudget(100)
    leases, held = [budget.lease() for _ in range(4)], [0] * 4
    for which, num_bytes in steps:
        if num_bytes is None:
            leases[which].release()
            held[which] = 0
        elif sum(held) + num_bytes <= 100:
            leases[which].add(num_bytes)
            held[which] += num_bytes
        else:
            with pytest.raises(PayloadTooLargeError if held[which] + num_bytes > 100 else OverloadedError):
                leases[which].add(num_bytes)
        assert budget.leased_bytes == sum(held) <= 100
    for lease in leases * 2:
        lease.release()
    assert budget.leased_bytes == 0
