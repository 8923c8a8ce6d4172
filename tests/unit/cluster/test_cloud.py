"""What the bed's cloud decides about Services of type LoadBalancer."""

from __future__ import annotations

from typing import Any

import pytest
from tests.cluster.upstream.cloud import FINALIZER, finalizers, released, routes_of


def service(kind: str = "LoadBalancer", **more: Any) -> dict[str, Any]:
    return {"metadata": {"name": "web", "namespace": "shop"} | more, "spec": {"type": kind}, "status": {}}


def with_address(one: dict[str, Any]) -> dict[str, Any]:
    return one | {"status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.1"}]}}}


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (service(), False),
        (with_address(service(finalizers=[FINALIZER])), False),
        (service("ClusterIP"), False),
        (with_address(service("ClusterIP")), True),
        (service("NodePort", finalizers=[FINALIZER]), True),
        (service(finalizers=["else", FINALIZER], deletionTimestamp="now"), True),
        (service(finalizers=["else"], deletionTimestamp="now"), False),
    ],
)
def test_who_is_released(one: dict[str, Any], expected: bool) -> None:
    assert released(one) is expected


def test_finalizers_of_others_stay() -> None:
    assert finalizers(service(finalizers=["else", FINALIZER]), ours=False) == ["else"]
    assert finalizers(service(finalizers=["else"]), ours=True) == ["else", FINALIZER]
    assert finalizers(service(finalizers=[FINALIZER]), ours=True) == [FINALIZER]
    assert finalizers(service(), ours=False) == []


def test_addresses_lead_to_nodes_of_their_family() -> None:
    def node(name: str, *addresses: str) -> dict[str, Any]:
        listed = [{"type": "Hostname", "address": name}, *({"type": "InternalIP", "address": a} for a in addresses)]
        return {"metadata": {"name": name}, "status": {"addresses": listed}}

    one, two = node("one", "10.0.0.1", "fd00::1"), node("two", "10.0.0.2")
    found = routes_of({"a": ["203.0.113.1", "2001:db8::1"], "b": ["203.0.113.2"]}, {"a": [two, one], "b": []})
    assert found == {"203.0.113.1": ("10.0.0.1", "10.0.0.2"), "2001:db8::1": ("fd00::1",), "203.0.113.2": ()}
