from __future__ import annotations

import ipaddress
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from fimbria.lab.apiserver.services import Allocations, ServiceStrategy, choose_families

DUAL = [ipaddress.ip_network("10.0.0.0/28"), ipaddress.ip_network("fd00::/124")]


def create(strategy: ServiceStrategy, name: str, **spec: Any) -> tuple[Any, list[Any]]:
    body: Any = {"metadata": {"name": name}, "spec": {"ports": [{"port": 80}]} | spec}
    strategy.default(body)
    strategy.prepare_create(body)
    errors = strategy.validate(body, None)
    if not errors:
        strategy.committed(None, body)
    return body, errors


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["ClusterIP", "NodePort", None])), max_size=40))
@settings(max_examples=60, deadline=None)
def test_no_address_or_port_is_given_twice(steps: list[tuple[int, str | None]]) -> None:
    strategy = ServiceStrategy(Allocations(DUAL))
    live: dict[int, Any] = {}
    for number, kind in steps:
        if number in live:
            strategy.committed(live.pop(number), None)
        elif kind:
            body, errors = create(strategy, f"s{number}", type=kind, ipFamilyPolicy="PreferDualStack")
            assert not errors
            live[number] = body
    addresses = [address for body in live.values() for address in body["spec"]["clusterIPs"]]
    ports = [port["nodePort"] for body in live.values() for port in body["spec"]["ports"] if "nodePort" in port]
    assert len(addresses) == len(set(addresses)) == 2 * len(live) and len(ports) == len(set(ports))
    for address in addresses:
        assert any(ipaddress.ip_address(address) in network for network in DUAL)


def test_a_full_range_says_so() -> None:
    strategy = ServiceStrategy(Allocations(DUAL[:1]))
    for number in range(14):
        assert not create(strategy, f"s{number}")[1]
    assert "range is full" in create(strategy, "one-more")[1][0].message


def test_a_freed_address_rests() -> None:
    strategy = ServiceStrategy(Allocations(DUAL))
    first, _ = create(strategy, "a")
    strategy.committed(first, None)
    second, _ = create(strategy, "b")
    assert first["spec"]["clusterIP"] != second["spec"]["clusterIP"]


def test_families_on_a_single_stack_cluster() -> None:
    spec: Any = {"ipFamilyPolicy": "PreferDualStack"}
    assert not choose_families(spec, ["IPv4"]) and spec["ipFamilies"] == ["IPv4"]
    assert choose_families({"ipFamilyPolicy": "RequireDualStack"}, ["IPv4"])[0].field == "spec.ipFamilyPolicy"
    assert choose_families({"ipFamilies": ["IPv6"]}, ["IPv4"])[0].field == "spec.ipFamilies[0]"


def change(strategy: ServiceStrategy, old: Any, **spec: Any) -> tuple[Any, list[Any]]:
    """A PUT with these fields, which leaves out what was allocated."""
    body: Any = {"metadata": {"name": "x"}, "spec": {"ports": [{"port": 80}]} | spec}
    strategy.default(body)
    strategy.prepare_update(body, old)
    return body, strategy.validate(body, old)


def test_the_health_check_port_lives_as_long_as_the_policy() -> None:
    strategy = ServiceStrategy(Allocations(DUAL))
    local, errors = create(strategy, "a", type="LoadBalancer", externalTrafficPolicy="Local")
    port = local["spec"]["healthCheckNodePort"]
    assert not errors and port != local["spec"]["ports"][0]["nodePort"]
    same, errors = change(strategy, local, type="LoadBalancer", externalTrafficPolicy="Local")
    assert not errors and same["spec"]["healthCheckNodePort"] == port
    fields = {"externalTrafficPolicy": "Cluster", "healthCheckNodePort": port}
    other, errors = change(strategy, local, type="LoadBalancer", **fields)
    assert not errors and "healthCheckNodePort" not in other["spec"]
    _, errors = create(strategy, "b", type="LoadBalancer", externalTrafficPolicy="Local", healthCheckNodePort=port)
    assert "already allocated" in errors[0].message
    _, errors = create(strategy, "c", type="NodePort", externalTrafficPolicy="Local", healthCheckNodePort=port + 9)
    assert "may only be set" in errors[0].message


def test_an_unknown_traffic_distribution_is_refused() -> None:
    strategy = ServiceStrategy(Allocations(DUAL))
    assert not create(strategy, "a", trafficDistribution="PreferSameNode")[1]
    assert create(strategy, "b", trafficDistribution="Elsewhere")[1]
