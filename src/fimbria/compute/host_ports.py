"""Ports of the node that lead to a pod (hostPort): which frontends they are. Pure.

Rules
1. A port without a host address is a port of every address that the node has, loopback included: one frontend each, in
   the families that the pod has.
2. A Service's node port is served by every node: where there is one the pod's port waits, and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final

from fimbria.compute.service import HOST_PORT, Extra, Owner
from fimbria.compute.service_frontends import HOST_PORT as FLAG
from fimbria.compute.service_frontends import UNSPECIFIED
from fimbria.model.address import is_v4, pack
from fimbria.model.endpoint import HostPort, LocalEndpoint
from fimbria.model.rows import FrontendKey

LOOPBACK: Final = (pack("127.0.0.1"), pack("::1"))


def owner(endpoint: LocalEndpoint) -> Owner:
    """Two pods of one name may be there at once: the old one's interface goes after the new one's has come."""
    name = endpoint.pod or f"container {endpoint.container_id[:12]}"
    return Owner(HOST_PORT, "pod", endpoint.namespace, f"{name} (endpoint {endpoint.id})")


def node_port(port: HostPort, v4: bool) -> FrontendKey:
    """The frontend that a Service with the same node port has."""
    return FrontendKey(UNSPECIFIED[v4], port.port, port.proto)


def extras(
    endpoint: LocalEndpoint, node_addrs: Iterable[bytes], taken: Callable[[FrontendKey], object]
) -> tuple[Extra, ...]:
    """What an endpoint's host ports ask of the node. `taken` says of a node port whether it is a Service's."""
    addrs = tuple(dict.fromkeys((*node_addrs, *LOOPBACK)))
    found = []
    for port in endpoint.host_ports:
        for target in endpoint.addrs:
            v4 = is_v4(target)
            if taken(node_port(port, v4)):
                continue
            keys = tuple(FrontendKey(a, port.port, port.proto) for a in _addresses(port, v4, addrs))
            if keys:
                found.append(Extra(keys, ((target, port.container_port, port.proto),), FLAG))
    return tuple(found)


def _addresses(port: HostPort, v4: bool, node_addrs: Iterable[bytes]) -> Iterator[bytes]:
    if port.host_ip and not port.is_any(port.host_ip):
        if is_v4(port.host_ip) == v4:
            yield port.host_ip
    elif not port.host_ip or is_v4(port.host_ip) == v4:
        yield from (a for a in node_addrs if is_v4(a) == v4)
