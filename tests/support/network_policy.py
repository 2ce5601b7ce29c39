"""Who may connect to whom under Kubernetes' NetworkPolicies: networking.k8s.io/v1, as far as ours use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Any

Policy = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Party:
    """A pod, or an address outside the cluster (then without a namespace)."""

    address: str
    namespace: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def namespace_labels(self) -> dict[str, str]:
        """The one that Kubernetes gives every namespace."""
        return {"kubernetes.io/metadata.name": self.namespace or ""}


def may_connect(policies: Sequence[Policy], source: Party, target: Party, port: int, protocol: str = "TCP") -> bool:
    """Whether the source may go out there and the target lets it in."""
    goes_out = _admits(policies, "Egress", source, target, port, protocol)
    return goes_out and _admits(policies, "Ingress", target, source, port, protocol)


def _admits(policies: Sequence[Policy], direction: str, of: Party, peer: Party, port: int, protocol: str) -> bool:
    """Policies add up; a pod that no policy is about is open."""
    if of.namespace is None:
        return True
    about = [
        policy
        for policy in policies
        if policy["metadata"]["namespace"] == of.namespace
        and direction in policy["spec"]["policyTypes"]
        and _matches(policy["spec"]["podSelector"], of.labels)
    ]
    key, peers = ("ingress", "from") if direction == "Ingress" else ("egress", "to")
    return not about or any(
        _has_port(rule.get("ports"), port, protocol)
        and (not rule.get(peers) or any(_is_peer(item, peer, of.namespace) for item in rule[peers]))
        for policy in about
        for rule in policy["spec"].get(key, [])
    )


def _is_peer(item: Mapping[str, Any], peer: Party, own_namespace: str) -> bool:
    assert item.keys() <= {"ipBlock", "namespaceSelector", "podSelector"}, item
    if "ipBlock" in item:  # of pods, too: whether it is depends on the network plugin
        address = ip_address(peer.address)
        networks = [ip_network(text) for text in (item["ipBlock"]["cidr"], *item["ipBlock"].get("except", []))]
        inside = [address.version == network.version and address in network for network in networks]
        return inside[0] and not any(inside[1:])
    if peer.namespace is None:
        return False
    if "namespaceSelector" in item:
        in_namespace = _matches(item["namespaceSelector"], peer.namespace_labels)
    else:
        in_namespace = peer.namespace == own_namespace
    return in_namespace and _matches(item.get("podSelector", {}), peer.labels)


def _has_port(ports: Sequence[Mapping[str, Any]] | None, port: int, protocol: str) -> bool:
    if not ports:
        return True
    assert all(isinstance(item["port"], int) and "endPort" not in item for item in ports), ports
    return any(item["port"] == port and item.get("protocol", "TCP") == protocol for item in ports)


def _matches(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    assert selector.keys() <= {"matchLabels"}, selector
    wanted: Mapping[str, str] = selector.get("matchLabels", {})
    return wanted.items() <= labels.items()
