"""What counts as the public internet."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.images.addresses import is_public

NAT64 = IPv6Network("64:ff9b::/96")

PUBLIC = (
    "1.1.1.1",
    "8.8.8.8",
    "9.255.255.255",
    "11.0.0.0",
    "93.184.215.14",
    "100.63.255.255",
    "100.128.0.0",
    "128.0.0.0",
    "168.63.129.15",
    "169.253.255.255",
    "172.15.255.255",
    "172.32.0.0",
    "192.0.1.1",
    "198.17.255.255",
    "198.20.0.0",
    "223.255.255.255",
    "2000::1",
    "2001:200::1",
    "2001:4860:4860::8888",
    "2606:4700:4700::1111",
    "2a00:1450:4001:80b::200e",
    "3ffe:ffff::1",
    "::ffff:8.8.8.8",
    "64:ff9b::8.8.8.8",
)


@pytest.mark.parametrize("text", PUBLIC)
def test_addresses_beside_special_networks_are_public(text: str) -> None:
    assert is_public(ip_address(text))


@given(st.integers(0, 2**32 - 1).map(IPv4Address))
def test_ipv6_around_ipv4_is_never_more_public_than_what_it_embeds(address: IPv4Address) -> None:
    value = int(address)
    mapped, nat64 = IPv6Address((0xFFFF << 32) | value), IPv6Address(int(IPv6Address("64:ff9b::")) | value)
    assert is_public(mapped) is is_public(nat64) is is_public(address)
    for other in (
        IPv6Address(value),  # compatible
        IPv6Address((0xFFFF << 48) | value),  # translated (RFC 2765)
        IPv6Address(int(IPv6Address("64:ff9b:1::")) | value),  # NAT64 for local use
        IPv6Address((0x2002 << 112) | (value << 80)),  # 6to4
        IPv6Address((0x2001 << 112) | (value ^ 0xFFFFFFFF)),  # Teredo
    ):
        assert not is_public(other)


@given(st.ip_addresses())
def test_nothing_is_public_that_the_standard_library_calls_private(address: IPv4Address | IPv6Address) -> None:
    """`st.ip_addresses` prefers the special networks."""
    embeds = isinstance(address, IPv6Address) and (address.ipv4_mapped or address in NAT64)
    if is_public(address) and not embeds:
        assert address.is_global
        assert not address.is_multicast
        assert not address.is_reserved
