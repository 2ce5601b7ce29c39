"""Among whom a server is shared: API keys or, where there are none, clients' addresses."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Final

from server.admission.keys import ANONYMOUS, ApiKey

_IPV6_PREFIX: Final = 64
"""What one customer of a provider has at least; addresses within it cost nothing."""


@dataclass(frozen=True, slots=True)
class Party:
    """One who shares.

    Args:
        weight: how many times the share of a party with weight 1 it gets.
        max_parallel_requests: of its requests, how many engines work on at a time; None for no limit.
    """

    name: str
    weight: int = 1
    max_parallel_requests: int | None = None


def party_of(key: ApiKey, address: str) -> Party:
    """The key or, for everybody without one, the client's address (IPv6: its /64 network)."""
    if key is not ANONYMOUS:
        return Party(key.name, key.weight, key.max_parallel_requests)
    return Party(network_of(address))


def network_of(address: str) -> str:
    """What an address counts as: itself or, of IPv6, its /64 network."""
    try:
        parsed = ip_address(address.partition("%")[0])
    except ValueError:
        return address  # of a unix socket, for example
    if isinstance(parsed, IPv6Address) and parsed.ipv4_mapped is None:
        return str(ip_network((parsed, _IPV6_PREFIX), strict=False))
    return str(parsed)
