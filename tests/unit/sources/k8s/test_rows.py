"""Objects that claim to be more than they may: refused, whatever else they say."""

import json
from typing import Any

import msgspec
import pytest

from fimbria.model.address import pack
from fimbria.sources.k8s import rows
from fimbria.sources.k8s.services import to_topology
from fimbria.sources.k8s.types import cilium, core

LABELS = {"k8s:app": "frontend"}


def identity(name: str) -> cilium.CiliumIdentity:
    return msgspec.convert({"metadata": {"name": name}, "security-labels": LABELS}, cilium.CiliumIdentity)


@pytest.mark.parametrize(
    "name", ["", "0", "abc", "2", "255", "0300", "-300", "16777215", "16777216", "99999999", "١٢٣٤"]
)
def test_only_the_clusters_numbers_get_labels(name: str) -> None:
    """Number 0 is "anyone" to a policy, 2 the world: labels for them would open pods to everybody."""
    assert rows.identity_key(identity(name).metadata) == 0
    with pytest.raises(ValueError, match="is no identity's"):
        rows.identity(identity(name))


@pytest.mark.parametrize("name", ["256", "65535", "16777214"])
def test_the_clusters_numbers(name: str) -> None:
    assert rows.identity_key(identity(name).metadata) == int(name)
    assert rows.identity(identity(name)).labels == LABELS


def endpoint(number: int) -> cilium.CiliumEndpoint:
    status = {"identity": {"id": number}, "networking": {"node": "172.31.2.10", "addressing": [{"ipv4": "10.0.0.9"}]}}
    return msgspec.convert({"metadata": {"name": "a", "namespace": "n"}, "status": status}, cilium.CiliumEndpoint)


@pytest.mark.parametrize("number", [1, 2, 3, 6, 7, 255, (1 << 24) - 1, 1 << 24, 1 << 31])
def test_no_pod_is_the_host(number: int) -> None:
    with pytest.raises(ValueError, match="no pod's identity"):
        rows.remote_endpoint(endpoint(number))


@pytest.mark.parametrize("number", [4, 5, 256, 65535])
def test_what_a_pod_may_be(number: int) -> None:
    row = rows.remote_endpoint(endpoint(number))
    assert row is not None
    assert row.identity == number


@pytest.mark.parametrize("block", ["0.0.0.0/0", "172.31.0.0/16", "172.31.2.10/32", "::/0"])
def test_a_pod_block_contains_no_node(block: str) -> None:
    spec = {"addresses": [{"type": "InternalIP", "ip": "172.31.2.10"}], "ipam": {"podCIDRs": [block]}}
    node = msgspec.convert({"metadata": {"name": "thief"}, "spec": spec}, cilium.CiliumNode)
    with pytest.raises(ValueError, match="contains the node's own address"):
        rows.node(node)


@pytest.mark.parametrize("router", ["10.0.2.9", "8.8.8.8", "172.31.9.9", "fd00::9"])
def test_a_router_is_on_its_nodes_own_network(router: str) -> None:
    """An address of another node's pod, or of the world: its packets would go to this node."""
    addresses = [{"type": "InternalIP", "ip": "172.31.2.10"}]
    addresses += [{"type": "CiliumInternalIP", "ip": ip} for ip in (router, "10.0.1.1")]
    spec = {"addresses": addresses, "ipam": {"podCIDRs": ["10.0.1.0/24"]}}
    node = rows.node(msgspec.convert({"metadata": {"name": "thief"}, "spec": spec}, cilium.CiliumNode))
    assert node.routers == (pack("10.0.1.1"),)


def test_what_no_pod_and_no_node_has() -> None:
    """Cost grows with the square of these: one object must not hold an agent up."""
    many = [{"ipv4": f"10.1.0.{n}"} for n in range(65)]
    status = {"identity": {"id": 300}, "networking": {"node": "172.31.2.10", "addressing": many}}
    with pytest.raises(ValueError, match="65 addresses"):
        rows.remote_endpoint(msgspec.convert({"metadata": {"name": "a"}, "status": status}, cilium.CiliumEndpoint))
    spec = {"ipam": {"podCIDRs": [f"10.{n // 256}.{n % 256}.0/24" for n in range(513)]}}
    with pytest.raises(ValueError, match="513 blocks"):
        rows.node(msgspec.convert({"metadata": {"name": "a"}, "spec": spec}, cilium.CiliumNode))


def read(kind: Any, **obj: Any) -> Any:
    return msgspec.json.decode(json.dumps({"metadata": {}} | obj), type=kind)


def condition(status: str, kind: str = "Ready") -> dict[str, Any]:
    return {"conditions": [{"type": kind, "status": status}]}


@pytest.mark.parametrize(
    ("metadata", "status", "ready"),
    [
        ({}, condition("True"), True),
        ({}, condition("False"), False),
        ({}, condition("True", "Initialized"), False),
        ({}, {}, False),
        ({"deletionTimestamp": "2026-11-23T12:00:00Z"}, condition("True"), False),
    ],
)
def test_a_pod_is_ready_while_its_condition_says_so_and_it_stays(metadata: Any, status: Any, ready: bool) -> None:
    assert rows.pod(read(core.Pod, metadata=metadata, status=status)).ready is ready


@pytest.mark.parametrize(("value", "own"), [("off", True), ("on", False), ("", False), (None, False)])
def test_a_pod_may_want_addresses_as_they_are(value: str | None, own: bool) -> None:
    notes = {} if value is None else {"fimbria.io/socket-services": value}
    assert rows.pod(read(core.Pod, metadata={"annotations": notes})).own_addresses is own


@pytest.mark.parametrize(
    ("obj", "leaving"),
    [
        ({}, False),
        ({"spec": {"taints": [{"key": "node.kubernetes.io/unschedulable"}]}}, False),
        ({"spec": {"taints": [{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]}}, True),
        ({"metadata": {"deletionTimestamp": "2026-11-23T12:00:00Z"}}, True),
    ],
)
def test_load_balancers_shall_leave_a_node_that_goes(obj: dict[str, Any], leaving: bool) -> None:
    assert to_topology(read(core.Node, **obj)).leaving is leaving


def test_one_bad_entry_of_a_slice_does_not_spoil_the_others() -> None:
    networking = {"node": "172.31.2.10", "addressing": [{"ipv4": "10.0.0.9"}]}
    entries = [
        {"name": "good", "id": 300, "networking": networking, "created": "2026-01-01T00:00:00Z"},
        {"name": "host", "id": 1, "networking": networking},
        {"name": "nowhere", "id": 300, "networking": {"addressing": [{"ipv4": "10.0.0"}], "node": "172.31.2.10"}},
        {"name": "unfinished", "id": 0, "networking": networking},
    ]
    obj = read(cilium.CiliumEndpointSlice, namespace="ns", endpoints=entries)
    row = rows.pod_slice(obj, {})
    assert list(row.endpoints) == ["good"]
    assert [p.split(":")[0] for p in row.problems] == ["endpoints[1] 'host'", "endpoints[2] 'nowhere'"]
    assert rows.pod_slice(obj, row.endpoints).endpoints["good"] is row.endpoints["good"]
