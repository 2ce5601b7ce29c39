"""Which addresses are on the public internet. The standard library's `is_global` differs between Python releases."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Final, TypeAlias

IPAddress: TypeAlias = IPv4Address | IPv6Address

# The special-purpose registries of IANA (RFC 6890 and its updates), without the entries that lie inside others.
_SPECIAL_V4: Final = tuple(
    map(
        IPv4Network,
        (
            "0.0.0.0/8",  # this network
            "10.0.0.0/8",  # private
            "100.64.0.0/10",  # shared by carriers; metadata of some clouds
            "127.0.0.0/8",  # loopback
            "168.63.129.16/32",  # in no registry: a public number that leads inside Azure, to its metadata
            "169.254.0.0/16",  # link-local; metadata of most clouds
            "172.16.0.0/12",  # private
            "192.0.0.0/24",  # protocol assignments
            "192.0.2.0/24",  # documentation
            "192.88.99.0/24",  # 6to4 relays, given up
            "192.168.0.0/16",  # private
            "198.18.0.0/15",  # benchmarks
            "198.51.100.0/24",  # documentation
            "203.0.113.0/24",  # documentation
            "224.0.0.0/3",  # multicast, reserved, broadcast
        ),
    )
)
_UNICAST_V6: Final = IPv6Network("2000::/3")
_SPECIAL_V6: Final = tuple(
    map(
        IPv6Network,
        (
            "2001::/23",  # protocol assignments; Teredo, which embeds IPv4 addresses
            "2001:db8::/32",  # documentation
            "2002::/16",  # 6to4, which embeds IPv4 addresses
            "3fff::/20",  # documentation
        ),
    )
)
_NAT64: Final = IPv6Network("64:ff9b::/96")


def is_public(address: IPAddress) -> bool:
    """Whether the address belongs to a host on the internet, and to nothing nearer.

    An IPv4 address inside an IPv6 one counts as itself where networks still translate (mapped, NAT64 by its well-known
    prefix). All other forms (compatible, 6to4, Teredo, NAT64 for local use) are not public, whatever they embed. A
    network that translates under a prefix of its own choice must keep this host from its inside by itself.
    """
    if isinstance(address, IPv6Address):
        embedded = _embedded_v4(address)
        if embedded is None:
            return address in _UNICAST_V6 and not any(address in network for network in _SPECIAL_V6)
        address = embedded
    return not any(address in network for network in _SPECIAL_V4)


def _embedded_v4(address: IPv6Address) -> IPv4Address | None:
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped
