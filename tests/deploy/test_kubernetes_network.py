"""deploy/kubernetes: who may connect to whom. Only gateways reach an engine."""

from __future__ import annotations

from pathlib import Path

import pytest
from manifests import FOLDER, INSTALLATIONS, NAMESPACE, Manifests, pod_labels
from network_policy import Party, may_connect

from server.images import addresses

each_installation = pytest.mark.parametrize("folder", INSTALLATIONS, ids=lambda path: path.name)

STRANGER = Party("10.244.0.8", NAMESPACE, {"app.kubernetes.io/name": "debug"})
SIBLING = Party(
    "10.244.0.6", NAMESPACE, {"app.kubernetes.io/name": "visiondrop", "app.kubernetes.io/component": "benchmark"}
)
NEIGHBOUR = Party("10.244.0.9", "default", {"app.kubernetes.io/name": "visiondrop"})
IMPOSTOR = Party(
    "10.244.0.7", "default", {"app.kubernetes.io/name": "visiondrop", "app.kubernetes.io/component": "gateway"}
)
PROMETHEUS = Party("10.244.0.10", "monitoring", {"app.kubernetes.io/name": "prometheus"})
DNS = Party("10.244.0.11", "kube-system", {"k8s-app": "kube-dns"})
API_SERVER = Party("10.0.0.2")
INTERNET = Party("93.184.215.14")

ALL_MAY_SEND = {
    "metadata": {"namespace": NAMESPACE},
    "spec": {"podSelector": {}, "policyTypes": ["Egress"], "egress": [{}]},
}
"""A policy that somebody might add: what a pod lets in must not depend on what others may send."""


class Network:
    """The pods of one installation with others, under its policies."""

    def __init__(self, folder: Path) -> None:
        built = Manifests.of(folder)
        self.policies = built.all("NetworkPolicy")
        self.policies_of_targets = [*self.policies, ALL_MAY_SEND]
        self.gateway = Party("10.244.0.2", NAMESPACE, pod_labels(built.one("Deployment", "gateway")))
        self.engine = Party("10.244.0.3", NAMESPACE, pod_labels(built.one("StatefulSet", "engine")))
        self.parties = {
            "gateway": self.gateway,
            "engine": self.engine,
            "stranger": STRANGER,
            "sibling": SIBLING,
            "neighbour": NEIGHBOUR,
            "impostor": IMPOSTOR,
            "prometheus": PROMETHEUS,
            "outside": INTERNET,
        }

    def who_reaches(self, target: Party, port: int) -> set[str]:
        sources = {name: party for name, party in self.parties.items() if party is not target}
        return {name for name, party in sources.items() if may_connect(self.policies_of_targets, party, target, port)}

    def whom_reaches(self, source: Party, address: str, port: int = 443) -> bool:
        return may_connect(self.policies, source, Party(address), port)


@each_installation
def test_only_a_gateway_reaches_an_engine(folder: Path) -> None:
    network = Network(folder)
    assert network.who_reaches(network.engine, 8000) == {"gateway"}
    for port in (22, 80, 443, 5557, 8001, 9100):
        assert network.who_reaches(network.engine, port) == set()


@each_installation
def test_gateway_is_open_to_the_cluster_and_its_metrics_to_prometheus(folder: Path) -> None:
    network = Network(folder)
    everybody = network.parties.keys() - {"gateway", "outside"}
    assert network.who_reaches(network.gateway, 8000) == everybody
    assert network.who_reaches(network.gateway, 9100) == {"prometheus"}
    assert network.who_reaches(STRANGER, 8000) == set()


@each_installation
def test_pods_reach_dns_and_nothing_else_of_the_cluster(folder: Path) -> None:
    network = Network(folder)
    for source in (network.gateway, network.engine):
        for protocol in ("UDP", "TCP"):
            assert may_connect(network.policies, source, DNS, 53, protocol)
        for target in (API_SERVER, NEIGHBOUR, STRANGER, PROMETHEUS, DNS):
            for port in (443, 6443, 8000, 8080, 10250):
                assert not may_connect(network.policies, source, target, port)
    assert may_connect(network.policies, network.gateway, network.engine, 8000)
    for source in (network.engine, STRANGER, SIBLING):
        for target in (network.gateway, NEIGHBOUR):
            assert not may_connect(network.policies, source, target, 8000)


@each_installation
def test_internet_is_reached_over_https_alone(folder: Path) -> None:
    network = Network(folder)
    for address in (INTERNET.address, "2606:4700::1"):
        assert network.whom_reaches(network.gateway, address)
        assert network.whom_reaches(network.engine, address) == (folder.name != "cpu"), "the demo model is in its image"
        assert not network.whom_reaches(network.gateway, address, 80)
        assert not network.whom_reaches(network.gateway, address, 25)
        assert not network.whom_reaches(STRANGER, address)


def test_addresses_that_are_not_public_are_those_of_the_gateway() -> None:
    network = Network(FOLDER / "base")
    for special in (*addresses._SPECIAL_V4, *addresses._SPECIAL_V6):
        for address in (special[0], special[-1], special[special.num_addresses // 2]):
            assert not addresses.is_public(address)
            assert not network.whom_reaches(network.gateway, str(address)), address
        for neighbour in (int(special[0]) - 1, int(special[-1]) + 1):
            if 0 <= neighbour < 2**special.max_prefixlen:
                address = type(special[0])(neighbour)
                assert network.whom_reaches(network.gateway, str(address)) == addresses.is_public(address), address
