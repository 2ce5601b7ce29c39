"""Who shares: keys, or addresses where there are no keys."""

from __future__ import annotations

import pytest

from server.admission.keys import ANONYMOUS, ApiKey
from server.admission.party import Party, party_of


def test_key_is_a_party_wherever_it_is_used() -> None:
    key = ApiKey("shop", weight=3, max_parallel_requests=2)
    assert party_of(key, "192.0.2.1") == party_of(key, "192.0.2.2") == Party("shop", 3, 2)


@pytest.mark.parametrize(
    ("first", "second", "are_one"),
    [
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
        ("2001:db8:0:1::1", "2001:db8:0:1:ffff::2", True),
        ("2001:db8:0:1::1", "2001:db8:0:2::1", False),
        ("fe80::1%eth0", "fe80::2%eth0", True),
        ("", "", True),
    ],
)
def test_without_keys_addresses_are_parties_and_of_ipv6_networks(first: str, second: str, are_one: bool) -> None:
    assert (party_of(ANONYMOUS, first) == party_of(ANONYMOUS, second)) is are_one
