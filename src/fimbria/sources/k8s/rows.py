"""From API objects to rows of the tables: nodes, namespaces, pods, identities and reported endpoints.

Each function returns a row, or None for an object that isn't of interest. They raise ValueError naming the field that
can't be used; the informer keeps the previous row then.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Final, TypeVar

from fimbria.model.address import Prefix, pack
from fimbria.model.endpoint import ClusterIdentity, NamedPort, Pod, PodSlice, RemoteEndpoint
from fimbria.model.identity import MIN_ALLOCATED, NOBODY, Reserved
from fimbria.model.node import Node
from fimbria.model.protocol import WITH_PORTS
from fimbria.sources.k8s.types import cilium, core
from fimbria.sources.k8s.types.meta import ObjectMeta

T = TypeVar("T")
SOCKET_SERVICES: Final = "fimbria.io/socket-services"
MIRROR: Final = "kubernetes.io/config.mirror"  # of a static pod's mirror: the uid that kubelet gave the pod
NODE_ANNOTATION: Final = "fimbria.io/node"  # of a CiliumEndpoint: the node whose agent wrote it
UNUSED_ANNOTATION: Final = "fimbria.io/unused-since"
COVER: Final = "fimbria-covers-all-endpoints"
"""A CiliumEndpointSlice without endpoints: while it is there the others hold everybody. Written after them, so that who
sees it in a list or a watch has seen them."""
MAX_ADDRESSES: Final = 64
MAX_BLOCKS: Final = 512
_NUMBER: Final = re.compile(r"[1-9][0-9]{0,7}")


@lru_cache(maxsize=1 << 14)
def _shared(value: T) -> T:
    """One object for equal values that thousands of rows have: a third of the memory of a large cluster's pods."""
    return value


def object_key(meta: ObjectMeta) -> tuple[str, str]:
    """Namespace and name."""
    return _shared(meta.namespace), meta.name


def node(obj: cilium.CiliumNode) -> Node:
    """A CiliumNode: InternalIP addresses are the node's own, CiliumInternalIP those on its pods' networks.

    One of the latter that is in none of its blocks is left out: packets for it, whoever it is, would go to this node.
    Raises ValueError also for a pod block that contains the node's own address: every other node would route it, and
    with 0.0.0.0/0 everything, to pods.
    """
    addresses = obj.spec.addresses or ()
    addrs = tuple(pack(a.ip) for a in addresses if a.type == "InternalIP")
    blocks = tuple(Prefix.parse(c) for c in obj.spec.ipam.pod_cidrs or ())
    if len(blocks) > MAX_BLOCKS:
        raise ValueError(
            f"spec.ipam.podCIDRs: {len(blocks)} blocks are more than the {MAX_BLOCKS} that a node may have"
        )
    for block in blocks:
        if any(a in block for a in addrs):
            raise ValueError(f"spec.ipam.podCIDRs: {block} contains the node's own address")
    routers = (pack(a.ip) for a in addresses if a.type == "CiliumInternalIP")
    return Node(
        name=obj.metadata.name,
        addrs=addrs,
        routers=tuple(a for a in routers if any(a in block for block in blocks)),
        pod_cidrs=blocks,
        problem=obj.status.ipam.operator_status.error,
    )


def namespace(obj: core.Namespace) -> Mapping[str, str]:
    """A namespace's labels."""
    return dict(obj.metadata.labels or {})


def named_ports(spec: core.PodSpec) -> tuple[NamedPort, ...]:
    """Named ports of the containers that run with the pod (sidecar init containers included)."""
    sidecars = [c for c in spec.init_containers or () if c.restart_policy == "Always"]
    ports = [p for c in (*(spec.containers or ()), *sidecars) for p in c.ports or ()]
    return tuple(NamedPort(p.name, WITH_PORTS.get(p.protocol, 0), p.container_port) for p in ports if p.name)


def pod(obj: core.Pod) -> Pod:
    """A pod of this node."""
    meta, spec = obj.metadata, obj.spec
    return Pod(
        namespace=meta.namespace,
        name=meta.name,
        uid=meta.uid,
        labels=dict(meta.labels or {}),
        service_account=spec.service_account_name,
        named_ports=named_ports(spec),
        host_network=spec.host_network,
        ready=_ready(obj),
        own_addresses=(meta.annotations or {}).get(SOCKET_SERVICES, "") == "off",
        static_uid=(meta.annotations or {}).get(MIRROR, ""),
        addrs=_addresses(obj.status),
    )


def _addresses(status: core.PodStatus) -> tuple[bytes, ...]:
    """Of a pod that runs; one that has ended keeps its addresses in its status, but they are free again."""
    if status.phase not in ("Pending", "Running"):
        return ()
    return tuple(pack(p.ip) for p in (status.pod_ips or ())[:MAX_ADDRESSES] if p.ip)


def _ready(obj: core.Pod) -> bool:
    """As endpoints count: the condition Ready, and not on its way out."""
    conditions = obj.status.conditions or ()
    return not obj.metadata.deletion_timestamp and any(c.type == "Ready" and c.status == "True" for c in conditions)


def identity(obj: cilium.CiliumIdentity) -> ClusterIdentity:
    """An identity's labels, and whether it is marked for collection.

    Raises ValueError for a name that is no number of the cluster's: anyone, the reserved identities and a node's own
    CIDR identities have numbers, too, and must not get labels from an object.
    """
    if not identity_key(obj.metadata):
        raise ValueError(
            f"the name {obj.metadata.name!r} is no identity's: a number from {MIN_ALLOCATED} below {NOBODY}"
        )
    return ClusterIdentity(dict(obj.security_labels or {}), UNUSED_ANNOTATION in (obj.metadata.annotations or {}))


def identity_key(meta: ObjectMeta) -> int:
    """An identity's number; 0, which none has, for a name that isn't one."""
    number = int(meta.name) if _NUMBER.fullmatch(meta.name) else 0
    return number if _allocated(number) else 0


def _allocated(identity: int) -> bool:
    return MIN_ALLOCATED <= identity < NOBODY


def remote_endpoint(obj: cilium.CiliumEndpoint) -> RemoteEndpoint | None:
    """A reported endpoint; None while its agent has not filled in identity and addresses.

    Raises ValueError for an identity that no pod has: HOST, for one, is allowed everywhere.
    """
    status, created = obj.status, obj.metadata.creation_timestamp or ""
    return _remote(
        "status.identity.id", status.identity.id, status.networking, status.named_ports, created,
        writer=written_by(obj.metadata),
    )  # fmt: skip


def written_by(meta: ObjectMeta) -> str:
    """The node whose agent wrote a report, "" for one that says nothing of it. The chart's admission policy keeps
    agents to their own."""
    name: str = _shared((meta.annotations or {}).get(NODE_ANNOTATION, ""))
    return name


def pod_slice(obj: cilium.CiliumEndpointSlice, known: Mapping[str, RemoteEndpoint]) -> PodSlice:
    """A slice of reported endpoints. One that can't be used is left out, so that its neighbours don't suffer.

    `known` are those of the version before: whoever didn't change stays the same object.
    """
    found: dict[str, RemoteEndpoint] = {}
    problems = []
    for n, e in enumerate(obj.endpoints or ()):
        try:
            row = _remote("id", e.id, e.networking, e.named_ports, e.created)
        except ValueError as error:
            problems.append(f"endpoints[{n}] {e.name!r}: {error}")
            continue
        if row is not None and e.name:
            old = known.get(e.name)
            found[e.name] = old if old is not None and old == row else row
    version = obj.metadata.resource_version
    return PodSlice(_shared(obj.namespace), found, int(version) if version.isdecimal() else 0, tuple(problems))


def _remote(
    path: str,
    identity: int,
    networking: cilium.EndpointNetworking,
    named: Sequence[cilium.NamedPort] | None,
    created: str,
    *,
    writer: str = "",
) -> RemoteEndpoint | None:
    pairs = networking.addressing or ()
    if len(pairs) > MAX_ADDRESSES:
        raise ValueError(f"networking.addressing: {len(pairs)} addresses are more than a pod has")
    addrs = tuple(pack(ip) for pair in pairs for ip in (pair.ipv4, pair.ipv6) if ip)
    if not identity or not addrs or not networking.node:
        return None
    if not _allocated(identity) and identity not in (Reserved.HEALTH, Reserved.INIT):
        raise ValueError(f"{path}: {identity} is no pod's identity")
    ports = tuple(NamedPort(p.name, WITH_PORTS.get(p.protocol, 0), p.port) for p in named or ())
    return RemoteEndpoint(
        identity=_shared(identity),
        addrs=addrs,
        node=_shared(pack(networking.node)),
        named_ports=_shared(ports),
        created=created,
        writer=writer,
    )
