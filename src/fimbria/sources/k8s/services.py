"""Service and EndpointSlice objects as rows of the model.

What an object asks for that isn't supported, or can't be read, becomes a warning of the row; the rest counts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from fimbria.model.address import is_v4, pack
from fimbria.model.service import Endpoint, EndpointPort, EndpointSlice, Service, ServiceKey, ServicePort
from fimbria.sources.k8s.types import core

# https://kubernetes.io/docs/reference/labels-annotations-taints/
LABEL_SERVICE_NAME = "kubernetes.io/service-name"
LABEL_PROXY_NAME = "service.kubernetes.io/service-proxy-name"
LABEL_HEADLESS = "service.kubernetes.io/headless"

PROTOCOLS = {"TCP": 6, "UDP": 17, "SCTP": 132}


def to_service(obj: core.Service) -> Service:
    """The model's row of a Service. A service that is another proxy's keeps no cluster IP here."""
    spec, warnings = obj.spec, [*_unsupported(obj.spec)]
    key = ServiceKey(obj.metadata.namespace, obj.metadata.name)
    labels = obj.metadata.labels or {}
    if spec.type == "ExternalName" or LABEL_PROXY_NAME in labels:
        return Service(key)
    ips = []
    for text in spec.cluster_ips or (spec.cluster_ip,):
        if text in ("", "None"):
            continue
        try:
            ips.append(pack(text))
        except ValueError:
            warnings.append(f"cluster IP {text!r} is not an IP address")
    ports = []
    for port in spec.ports or ():
        proto = PROTOCOLS.get(port.protocol)
        if proto is None:
            warnings.append(f"port {port.port}: unknown protocol {port.protocol!r}")
        elif not 0 < port.port < 65536:
            warnings.append(f"port {port.port}: not a port number")
        else:
            ports.append(ServicePort(port.name, port.port, proto))
    local = spec.internal_traffic_policy == "Local"
    return Service(key, tuple(ips), tuple(ports), local, spec.publish_not_ready_addresses, tuple(warnings))


def _unsupported(spec: core.ServiceSpec) -> Iterator[str]:
    if spec.type in ("NodePort", "LoadBalancer"):
        yield f"type {spec.type}: only the cluster IP is served so far"
    if spec.external_ips:
        yield "externalIPs: not supported yet"
    if spec.session_affinity == "ClientIP":
        yield "sessionAffinity ClientIP: not supported yet, connections are spread over all endpoints"
    if spec.traffic_distribution:
        yield f"trafficDistribution {spec.traffic_distribution}: not supported yet, all zones are used"


def to_slice(obj: core.EndpointSlice) -> EndpointSlice | None:
    """The model's row of an EndpointSlice; None if it has nothing to do with a cluster IP: one that belongs to no
    service, to a headless one, or holds host names."""
    labels = obj.metadata.labels or {}
    name = labels.get(LABEL_SERVICE_NAME, "")
    if not name or LABEL_HEADLESS in labels or obj.address_type not in ("IPv4", "IPv6"):
        return None
    v4 = obj.address_type == "IPv4"
    warnings: list[str] = []
    ports = tuple(_slice_ports(obj, warnings))
    endpoints = tuple(_endpoints(obj, v4, warnings))
    service = ServiceKey(obj.metadata.namespace, name)
    return EndpointSlice(obj.metadata.name, service, v4, ports, endpoints, tuple(warnings))


def _slice_ports(obj: core.EndpointSlice, warnings: list[str]) -> Iterator[EndpointPort]:
    for port in obj.ports or ():
        proto = PROTOCOLS.get(port.protocol or "TCP")
        if proto is None:
            warnings.append(f"port {port.name or port.port}: unknown protocol {port.protocol!r}")
        elif port.port is None or not 0 < port.port < 65536:
            warnings.append(f"port {port.name or port.port}: a port number is needed")
        else:
            yield EndpointPort(port.name or "", port.port, proto)


def _endpoints(obj: core.EndpointSlice, v4: bool, warnings: list[str]) -> Iterator[Endpoint]:
    for endpoint in obj.endpoints or ():
        # Several addresses are one endpoint, and consumers use the first (discovery.k8s.io/v1).
        text = endpoint.addresses[0] if endpoint.addresses else ""
        try:
            addr = pack(text)
        except ValueError as e:
            warnings.append(f"endpoint left out: {e}")
            continue
        if is_v4(addr) != v4:
            warnings.append(f"endpoint left out: {text} is no {obj.address_type} address")
            continue
        conditions = endpoint.conditions
        yield Endpoint(
            addr,
            sys.intern(endpoint.node_name or ""),  # a few names on very many endpoints
            conditions.ready is not False,
            conditions.serving is not False,
            conditions.terminating is True,
        )
