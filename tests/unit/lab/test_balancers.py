"""Load balancers' addresses and which nodes get their packets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fimbria.lab.balancers import POOLS, REFUSALS, SILENCES, Balancer, Health, ServiceObject, assign, balancer
from fimbria.lab.errors import LabError
from fimbria.sources.k8s.types.meta import ObjectMeta

OLD = st.lists(st.sampled_from(["203.0.113.1", "203.0.113.7", "2001:db8:113::1", "192.0.2.1"]), max_size=3)
FAMILIES = st.sampled_from([("IPv4",), ("IPv6",), ("IPv4", "IPv6")])
ONE = st.builds(lambda f, a: Balancer("x", "n", f, addresses=tuple(a)), FAMILIES, OLD)


@given(st.dictionaries(st.sampled_from("abcde"), ONE))
def test_every_family_has_one_address_and_nobody_shares(balancers: dict[str, Balancer]) -> None:
    found = assign(balancers)
    everything = [a for addresses in found.values() for a in addresses]
    assert len(set(everything)) == len(everything)
    for key, b in balancers.items():
        assert {"IPv6" if ":" in a else "IPv4" for a in found[key]} == set(b.families)
    settled = {k: Balancer("x", "n", b.families, addresses=found[k]) for k, b in balancers.items()}
    assert assign(settled) == found


def test_a_requested_address_is_given_if_it_can_be() -> None:
    wants = Balancer("x", "n", ("IPv4",), requested="203.0.113.77")
    assert assign({"a": wants, "b": wants}) == {"a": ("203.0.113.77",), "b": ("203.0.113.1",)}
    assert assign({"a": Balancer("x", "n", ("IPv4",), requested="192.0.2.1")}) == {"a": ("203.0.113.1",)}


def test_an_empty_pool_is_said() -> None:
    many = {str(n): Balancer(str(n), "n", ("IPv4",)) for n in range(POOLS["IPv4"].num_addresses)}
    with pytest.raises(LabError, match="no address left"):
        assign(many)


def service(**spec: object) -> ServiceObject:
    return ServiceObject(metadata=ObjectMeta(name="x", namespace="n"), spec={"type": "LoadBalancer", **spec})


def test_whose_services_these_are() -> None:
    assert balancer(service(type="NodePort")) is None
    assert balancer(service(loadBalancerClass="example.com/other")) is None
    local = balancer(service(externalTrafficPolicy="Local", healthCheckNodePort=30001))
    assert local is not None and local.health_port == 30001
    everywhere = balancer(service(externalTrafficPolicy="Cluster", healthCheckNodePort=30001))
    assert everywhere is not None and everywhere.health_port == 0


def test_health() -> None:
    health = Health()
    assert not health.good("node1", 1)
    health.heard("node1", 1, good=True)
    for bad, most in ((False, REFUSALS), (None, SILENCES)):
        for _ in range(most - 1):
            health.heard("node1", 1, good=bad)
            assert health.good("node1", 1)
        health.heard("node1", 1, good=bad)
        assert not health.good("node1", 1)
        health.heard("node1", 1, good=True)
        assert health.good("node1", 1)
    health.keep([2])
    assert not health.good("node1", 1)
