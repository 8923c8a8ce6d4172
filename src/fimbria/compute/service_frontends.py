"""Which frontends a service has, and what kind each is: pure, from one Service and the node's settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from fimbria.model.address import V4_MAPPED, Prefix, is_v4
from fimbria.model.rows import FrontendKey, SourceKey
from fimbria.model.service import Service, ServicePort

# enum frontend_flag
CLUSTER_IP: Final = 1 << 0
NODE_PORT: Final = 1 << 1
HOST_PORT: Final = 1 << 2
TWO_SCOPES: Final = 1 << 3
AFFINITY: Final = 1 << 4
SOURCE_RANGES: Final = 1 << 5
SOURCE_DENY: Final = 1 << 6
TABLE: Final = 1 << 7
HASH: Final = 1 << 8
DIRECT_RETURN: Final = 1 << 9
SILENT: Final = 1 << 10
EXEMPT: Final = 1 << 11
ADDRESS: Final = 1 << 12

SCOPE_INTERNAL: Final = 1  # enum frontend_scope
OUTSIDE_ONLY: Final = TWO_SCOPES | DIRECT_RETURN
"""Flags that mean nothing in the row of clients inside the cluster."""

UNSPECIFIED: Final = {True: V4_MAPPED + bytes(4), False: bytes(16)}
TCP: Final = 6
BALANCER_TRUST: Final = 2  # written into the status, by whom the cluster's owner lets
EXTERNAL_TRUST: Final = 3  # written by whoever may create Services
RANGE_BITS: Final = 32  # the service id comes first in struct source_key


class PortKey(NamedTuple):
    """One port of one service in one family."""

    port: int
    proto: int
    v4: bool


class Want(NamedTuple):
    """What is wanted of one frontend: the port it belongs to, whether it leads to this node's endpoints only, flags."""

    port: PortKey
    local: bool
    flags: int
    trust: int = 0  # see service_claims.Claims


@dataclass(frozen=True, slots=True)
class Defaults:
    """What the node's settings say: `forwarding` snat, dsr or hybrid (dsr for TCP), `algorithm` random or maglev."""

    forwarding: str = "snat"
    algorithm: str = "random"


def frontends(service: Service, defaults: Defaults) -> dict[FrontendKey, Want]:
    """The frontends of a service, those of SCOPE_ALL: with TWO_SCOPES there is one for SCOPE_INTERNAL beside it."""
    found: dict[FrontendKey, Want] = {}
    affinity = AFFINITY if service.affinity_seconds else 0
    for port in service.ports:
        for v4 in families(service):
            key = PortKey(port.port, port.proto, v4)
            for addr in service.cluster_ips if service.serves_cluster_ip else ():
                if is_v4(addr) == v4:
                    want = Want(key, service.internal_local, CLUSTER_IP | affinity)
                    found.setdefault(FrontendKey(addr, port.port, port.proto), want)
            if port.node_port or service.load_balancer_ips or service.external_ips:
                flags = affinity | _outside(service, port, defaults)
                for frontend, more, trust in _external(service, port, v4):
                    found.setdefault(frontend, Want(key, service.external_local, flags | more, trust))
    return found


def families(service: Service) -> tuple[bool, ...]:
    """Those that a service has a cluster IP of, True for IPv4."""
    return tuple(dict.fromkeys(map(is_v4, service.cluster_ips)))


def ports(service: Service) -> dict[PortKey, ServicePort]:
    """The ports of a service; of several with the same number and protocol the first counts."""
    found: dict[PortKey, ServicePort] = {}
    for port in service.ports:
        for v4 in families(service):
            found.setdefault(PortKey(port.port, port.proto, v4), port)
    return found


def ranges(service: Service, v4: bool) -> frozenset[Prefix]:
    """The source ranges of a family. As kube-proxy: none, and one of length 0, admit everybody."""
    found = frozenset(r for r in service.source_ranges if r.v4 == v4)
    if not service.source_deny and any(r.length == (96 if v4 else 0) for r in found):
        return frozenset()
    return found


def source_key(number: int, prefix: Prefix) -> SourceKey:
    """The row's key of one range of a service id."""
    return SourceKey(RANGE_BITS + prefix.length, number, prefix.addr)


def service_addresses(service: Service) -> dict[bytes, int]:
    """Addresses that belong to Services alone, with CLUSTER_IP for those that clients outside don't see."""
    if not service.ports:
        return {}
    inside = service.cluster_ips if service.serves_cluster_ip else ()
    return dict.fromkeys(inside, CLUSTER_IP) | dict.fromkeys(service.load_balancer_ips, 0)


def _outside(service: Service, port: ServicePort, defaults: Defaults) -> int:
    """Flags of every frontend for clients outside the cluster."""
    flags = TWO_SCOPES if service.external_local else 0
    forwarding = service.forwarding or defaults.forwarding
    if forwarding == "dsr" or (forwarding == "hybrid" and port.proto == TCP):
        flags |= DIRECT_RETURN
    if (service.algorithm or defaults.algorithm) == "maglev":
        flags |= TABLE | HASH
    return flags


def _external(service: Service, port: ServicePort, v4: bool) -> Iterator[tuple[FrontendKey, int, int]]:
    """Node port, load balancer's and external IPs: flags and trust. The ranges are about the balancer's alone."""
    if port.node_port:
        yield FrontendKey(UNSPECIFIED[v4], port.node_port, port.proto), NODE_PORT, 0
    limited = 0
    if service.load_balancer_ips and ranges(service, v4):
        limited = SOURCE_RANGES | (SOURCE_DENY if service.source_deny else 0)
    for addr in service.load_balancer_ips:
        if is_v4(addr) == v4:
            yield FrontendKey(addr, port.port, port.proto), limited, BALANCER_TRUST
    for addr in service.external_ips:
        if is_v4(addr) == v4:
            yield FrontendKey(addr, port.port, port.proto), 0, EXTERNAL_TRUST
