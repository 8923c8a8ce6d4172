"""A large cluster as rows of the lab's API server: nodes, identities and pods that exist nowhere but in the API. Pure,
except for `load`, which writes them into the database of a server that is not running."""

from __future__ import annotations

import json
import sqlite3
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

NODES: Final = 1000
PODS: Final = 50_000
IDENTITIES: Final = 1000
NAMESPACES: Final = 50
FIRST_IDENTITY: Final = 20_000
CREATED: Final = "2026-01-01T00:00:00Z"
TIERS: Final = ("even", "odd")

Row = tuple[str, str, str, dict[str, Any]]
"""Resource, namespace, name, object."""


def node_addresses(node: int) -> tuple[str, str]:
    """Of the numbered node itself, IPv4 and IPv6."""
    return f"172.29.{node >> 8}.{node & 255}", f"fd00:29::{node:x}"


def block(node: int) -> tuple[str, str]:
    """The first part of the node's pod addresses, IPv4 and IPv6."""
    return f"10.{64 + (node >> 8)}.{node & 255}.", f"fd00:64:{node:x}::"


def identity_labels(number: int) -> dict[str, str]:
    """The labels of the numbered identity."""
    return {
        "k8s:app": f"app{number}",
        "k8s:tier": TIERS[number % 2],
        "k8s:io.kubernetes.pod.namespace": f"ns{number % NAMESPACES}",
        "k8s:io.cilium.k8s.policy.cluster": "default",
        "k8s:io.cilium.k8s.policy.serviceaccount": "default",
    }


def _object(kind: str, name: str, namespace: str = "", created: str = CREATED) -> dict[str, Any]:
    meta: dict[str, Any] = {"name": name, "uid": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{kind}/{namespace}/{name}"))}
    if namespace:
        meta["namespace"] = namespace
    meta |= {"creationTimestamp": created, "generation": 1}
    return {"apiVersion": "cilium.io/v2", "kind": kind, "metadata": meta}


def nodes(count: int, *, ipv6: bool) -> Iterator[Row]:
    """CiliumNodes."""
    families = slice(0, 2 if ipv6 else 1)
    for n in range(count):
        own, routers = node_addresses(n), [f"{b}1" for b in block(n)]
        addresses = [{"type": "InternalIP", "ip": a} for a in own[families]]
        addresses += [{"type": "CiliumInternalIP", "ip": a} for a in routers[families]]
        cidrs = [f"{block(n)[0]}0/24", f"{block(n)[1]}/120"][families]
        spec = {"addresses": addresses, "ipam": {"podCIDRs": cidrs}}
        yield "ciliumnodes.cilium.io", "", f"far{n}", _object("CiliumNode", f"far{n}") | {"spec": spec}


def identities(count: int) -> Iterator[Row]:
    """CiliumIdentities."""
    for n in range(count):
        name = str(FIRST_IDENTITY + n)
        body = _object("CiliumIdentity", name) | {"security-labels": identity_labels(n)}
        yield "ciliumidentities.cilium.io", "", name, body


def pods(count: int, node_count: int, identity_count: int, *, ipv6: bool) -> Iterator[Row]:
    """CiliumEndpoints, spread over nodes and identities, as our own agents report them."""
    for n in range(count):
        node, number = n % node_count, (n % node_count * 31 + n // node_count * 17) % identity_count
        four, six = (f"{b}{n // node_count + 2:{f}}" for b, f in zip(block(node), ("d", "x"), strict=True))
        labels, name = identity_labels(number), f"app{number}-{n * 2654435761 % 2**32:08x}-{n:05d}"
        namespace = labels["k8s:io.kubernetes.pod.namespace"]
        status = {
            "id": n + 1, "state": "ready",
            "identity": {"id": FIRST_IDENTITY + number, "labels": sorted(f"{k}={v}" for k, v in labels.items())},
            "networking": {"addressing": [{"ipv4": four, "ipv6": six} if ipv6 else {"ipv4": four}],
                           "node": node_addresses(node)[0]},
            "external-identifiers": {"container-id": f"{n:064x}", "k8s-namespace": namespace, "k8s-pod-name": name},
            "named-ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        }  # fmt: skip
        yield (
            "ciliumendpoints.cilium.io",
            namespace,
            name,
            _object(
                "CiliumEndpoint", name, namespace, f"2026-01-{n % 28 + 1:02d}T{n % 24:02d}:{n % 60:02d}:{n % 59:02d}Z"
            )
            | {"status": status},
        )


def everything(node_count: int, pod_count: int, identity_count: int, *, ipv6: bool) -> Iterator[Row]:
    """A whole cluster."""
    yield from nodes(node_count, ipv6=ipv6)
    yield from identities(identity_count)
    yield from pods(pod_count, node_count, identity_count, ipv6=ipv6)


def load(database: Path, rows: Iterable[Row]) -> int:
    """Write rows at new versions; returns how many. Raises sqlite3.Error."""
    with sqlite3.connect(database) as db:
        version = max(rv for (rv,) in db.execute("SELECT rv FROM changed"))
        last: dict[str, int] = {}
        count = 0
        for resource, namespace, name, body in rows:
            version += 1
            count += 1
            last[resource] = version
            body["metadata"]["resourceVersion"] = str(version)
            raw = json.dumps(body, separators=(",", ":")).encode()
            db.execute("INSERT OR REPLACE INTO objects VALUES (?, ?, ?, ?)", (resource, namespace, name, raw))
        db.executemany("INSERT OR REPLACE INTO changed VALUES (?, ?)", last.items())
    db.close()
    return count
