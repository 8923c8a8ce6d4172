"""Service and EndpointSlice objects as rows of the model.

What can't be read, or asks for what there isn't, becomes a warning of the row; the rest of the object counts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Final

from fimbria.model.address import Prefix, is_anybodys, is_v4, pack
from fimbria.model.protocol import WITH_PORTS
from fimbria.model.selector import NodeSelector
from fimbria.model.service import (
    DEFAULT_WEIGHT,
    Endpoint,
    EndpointPort,
    EndpointSlice,
    NodeTopology,
    Service,
    ServiceKey,
    ServicePort,
)
from fimbria.sources.k8s.types import core

# https://kubernetes.io/docs/reference/labels-annotations-taints/
LABEL_SERVICE_NAME = "kubernetes.io/service-name"
LABEL_PROXY_NAME = "service.kubernetes.io/service-proxy-name"
TO_BE_DELETED = "ToBeDeletedByClusterAutoscaler"  # a taint: load balancers shall leave the node
LABEL_HEADLESS = "service.kubernetes.io/headless"
# Cilium's annotations of Services (and of EndpointSlices: the weight).
TYPE: Final = "service.cilium.io/type"
FORWARDING: Final = "service.cilium.io/forwarding-mode"
ALGORITHM: Final = "service.cilium.io/lb-algorithm"
RANGES_POLICY: Final = "service.cilium.io/src-ranges-policy"
NODE: Final = "service.cilium.io/node"
NODE_SELECTOR: Final = "service.cilium.io/node-selector"
WEIGHT: Final = "service.cilium.io/weight"
KNOWN: Final = frozenset((TYPE, FORWARDING, ALGORITHM, RANGES_POLICY, NODE, NODE_SELECTOR, WEIGHT))
FAMILY: Final = "service.cilium.io/"

KINDS: Final = ("ClusterIP", "NodePort", "LoadBalancer")
AFFINITY_SECONDS: Final = 10800  # the API's default
MAX_AFFINITY: Final = 86400


def to_service(obj: core.Service) -> Service:
    """The model's row of a Service. A service that is another proxy's keeps no address here."""
    spec, meta = obj.spec, obj.metadata
    key, labels, warnings = ServiceKey(meta.namespace, meta.name), meta.labels or {}, list[str]()
    if spec.type == "ExternalName" or LABEL_PROXY_NAME in labels or LABEL_HEADLESS in labels:
        return Service(key, kind=spec.type)
    texts = [t for t in spec.cluster_ips or (spec.cluster_ip,) if t]
    ips = _addresses("cluster IP", (t for t in texts if t != "None"), warnings)
    if "None" in texts or not ips:
        return Service(key, kind=spec.type, warnings=tuple(warnings))
    families = tuple(dict.fromkeys(map(is_v4, ips)))
    notes = meta.annotations or {}
    exposed = _exposed(notes, warnings) if notes else KINDS
    by_node = spec.type != "ClusterIP" and "NodePort" in exposed
    balanced = spec.type == "LoadBalancer" and "LoadBalancer" in exposed
    return Service(
        key,
        ips,
        tuple(_ports(spec.ports or (), by_node, warnings)),
        internal_local=spec.internal_traffic_policy == "Local",
        publish_not_ready=spec.publish_not_ready_addresses,
        serves_cluster_ip="ClusterIP" in exposed,
        kind=spec.type,
        load_balancer_ips=_load_balancer(obj.status, families, warnings) if balanced else (),
        external_ips=_addresses("external IP", spec.external_ips or (), warnings, families),
        external_local=spec.external_traffic_policy == "Local",
        affinity_seconds=_affinity(spec, warnings) if spec.session_affinity == "ClientIP" else 0,
        source_ranges=_ranges(spec.load_balancer_source_ranges or (), warnings) if balanced else (),
        source_deny=bool(notes) and _choice(notes, RANGES_POLICY, ("allow", "deny"), warnings) == "deny",
        algorithm=_choice(notes, ALGORITHM, ("random", "maglev"), warnings) if notes else "",
        forwarding=_choice(notes, FORWARDING, ("snat", "dsr"), warnings) if notes else "",
        nodes=_nodes(notes, warnings) if notes else None,
        health_check_port=spec.health_check_node_port if _checked(spec) else 0,
        warnings=tuple([*warnings, *_strangers(notes)]),
    )


def to_slice(obj: core.EndpointSlice) -> EndpointSlice | None:
    """The model's row of an EndpointSlice; None if it has nothing to do with a cluster IP: one that belongs to no
    service, to a headless one, to another proxy, or holds host names."""
    labels = obj.metadata.labels or {}
    name = labels.get(LABEL_SERVICE_NAME, "")
    if not name or LABEL_HEADLESS in labels or LABEL_PROXY_NAME in labels or obj.address_type not in ("IPv4", "IPv6"):
        return None
    v4 = obj.address_type == "IPv4"
    warnings: list[str] = []
    ports = tuple(_slice_ports(obj, warnings))
    endpoints = tuple(_endpoints(obj, v4, warnings))
    service = ServiceKey(obj.metadata.namespace, name)
    weight = _weight(obj.metadata.annotations or {}, warnings)
    return EndpointSlice(obj.metadata.name, service, v4, ports, endpoints, tuple(warnings), weight)


def to_topology(obj: core.Node) -> NodeTopology:
    """What counts for Services of this node's Node object. Addresses that can't be read are left out."""
    found: list[tuple[str, bytes]] = []
    for address in obj.status.addresses or ():
        if address.type in ("InternalIP", "ExternalIP"):
            with suppress(ValueError):
                found.append((address.type, pack(address.address)))
    leaving = bool(obj.metadata.deletion_timestamp) or any(t.key == TO_BE_DELETED for t in obj.spec.taints or ())
    labels = tuple(sorted((obj.metadata.labels or {}).items()))
    internal = tuple(a for kind, a in found if kind == "InternalIP")
    return NodeTopology(labels, tuple(a for _, a in found), leaving, internal)


# --- parts of a Service ------------------------------------------------------------------------------------------


def _addresses(
    what: str, texts: Iterable[str], warnings: list[str], families: tuple[bool, ...] = (True, False)
) -> tuple[bytes, ...]:
    """Addresses of `families`, each once."""
    found = []
    for text in texts:
        try:
            addr = pack(text)
        except ValueError:
            warnings.append(f"{what} {text!r} is not an IP address")
            continue
        if is_anybodys(addr):
            warnings.append(f"{what} {text} is left out: no Service can have it")
        elif is_v4(addr) in families:
            found.append(addr)
        else:
            warnings.append(f"{what} {text} is left out: the service has no cluster IP of that family")
    return tuple(dict.fromkeys(found))


def _ports(ports: Iterable[core.ServicePort], by_node: bool, warnings: list[str]) -> Iterator[ServicePort]:
    for port in ports:
        proto = WITH_PORTS.get(port.protocol)
        if proto is None:
            warnings.append(f"port {port.port}: unknown protocol {port.protocol!r}")
        elif not 0 < port.port < 65536:
            warnings.append(f"port {port.port}: not a port number")
        elif not 0 <= port.node_port < 65536:
            warnings.append(f"port {port.port}: node port {port.node_port} is not a port number")
            yield ServicePort(port.name, port.port, proto)
        else:
            yield ServicePort(port.name, port.port, proto, port.node_port if by_node else 0)


def _load_balancer(status: core.ServiceStatus, families: tuple[bool, ...], warnings: list[str]) -> tuple[bytes, ...]:
    """Addresses that nodes serve; those in mode Proxy are the balancer's own, which talks to node ports."""
    ingress = status.load_balancer.ingress or ()
    texts = (i.ip for i in ingress if i.ip and i.ip_mode != "Proxy")
    return _addresses("load balancer IP", texts, warnings, families)


def _checked(spec: core.ServiceSpec) -> bool:
    return spec.type == "LoadBalancer" and spec.external_traffic_policy == "Local"


def _affinity(spec: core.ServiceSpec, warnings: list[str]) -> int:
    config = spec.session_affinity_config
    seconds = config.client_ip.timeout_seconds if config and config.client_ip else None
    if seconds is None:
        return AFFINITY_SECONDS
    if 0 < seconds <= MAX_AFFINITY:
        return seconds
    warnings.append(f"sessionAffinityConfig: {seconds} s is not within 1 to {MAX_AFFINITY}; {AFFINITY_SECONDS} s count")
    return AFFINITY_SECONDS


def _ranges(texts: Iterable[str], warnings: list[str]) -> tuple[Prefix, ...]:
    """A range that can't be read admits nobody: if none can be read, nobody is admitted at all."""
    found = set()
    for text in texts:
        try:
            found.add(Prefix.parse(text.strip()))
        except ValueError as error:
            warnings.append(f"loadBalancerSourceRanges: {error}")
            found |= _NOBODY
    return tuple(sorted(found))


# No packet comes from an unspecified address. Both, for without a range of a family all of it is admitted.
_NOBODY: Final = frozenset(Prefix.parse(text) for text in ("0.0.0.0/32", "::/128"))


# --- annotations -------------------------------------------------------------------------------------------------


def _choice(notes: Mapping[str, str], name: str, values: tuple[str, ...], warnings: list[str]) -> str:
    """A known word, or nothing; anything else is a warning and counts as nothing."""
    text = notes.get(name)
    if text is None:
        return ""
    if text.lower() in values:
        return text.lower()
    warnings.append(f"annotation {name}: {text[:80]!r} is neither {' nor '.join(values)}; it is disregarded")
    return ""


def _exposed(notes: Mapping[str, str], warnings: list[str]) -> tuple[str, ...]:
    """The kinds of frontends that the service has."""
    text = notes.get(TYPE)
    if text is None:
        return KINDS
    words = [word.strip() for word in text.split(",")]
    found = tuple(kind for kind in KINDS if kind in words)
    if len(found) == len(set(words)):
        return found
    warnings.append(f"annotation {TYPE}: {text[:80]!r} is no list of {', '.join(KINDS)}; all are exposed")
    return KINDS


def _nodes(notes: Mapping[str, str], warnings: list[str]) -> NodeSelector | None:
    """Which nodes have the service; a selector that can't be read is a warning, and all have it."""
    text = notes.get(NODE_SELECTOR)
    if text is None:
        value = notes.get(NODE)
        text = None if value is None else f"{NODE}={value}"
    if text is None:
        return None
    try:
        return _selector(text)
    except ValueError as error:
        warnings.append(f"annotation {NODE_SELECTOR if NODE_SELECTOR in notes else NODE}: {error}; all nodes have it")
        return None


@lru_cache(maxsize=256)
def _selector(text: str) -> NodeSelector:
    return NodeSelector.parse(text)


def _weight(notes: Mapping[str, str], warnings: list[str]) -> int:
    text = notes.get(WEIGHT)
    if text is None:
        return DEFAULT_WEIGHT
    if text.isascii() and text.isdecimal() and len(text) <= 5 and int(text) < 1 << 16:
        return int(text)
    warnings.append(f"annotation {WEIGHT}: {text[:80]!r} is not within 0 to 65535; {DEFAULT_WEIGHT} counts")
    return DEFAULT_WEIGHT


def _strangers(notes: Mapping[str, str]) -> Iterator[str]:
    """Annotations of the same family that say something we don't do."""
    for name in sorted(notes):
        if name.startswith(FAMILY) and name not in KNOWN:
            yield f"annotation {name} is not supported; it is disregarded"


# --- parts of an EndpointSlice -----------------------------------------------------------------------------------


def _slice_ports(obj: core.EndpointSlice, warnings: list[str]) -> Iterator[EndpointPort]:
    for port in obj.ports or ():
        proto = WITH_PORTS.get(port.protocol or "TCP")
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
        conditions, hints = endpoint.conditions, endpoint.hints
        yield Endpoint(
            addr,
            sys.intern(endpoint.node_name or ""),  # a few names on very many endpoints
            conditions.ready is not False,
            conditions.serving is not False,
            conditions.terminating is True,
            _names(tuple(z.name for z in hints.for_zones or ())) if hints else (),
            _names(tuple(n.name for n in hints.for_nodes or ())) if hints else (),
        )


@lru_cache(maxsize=4096)
def _names(names: tuple[str, ...]) -> tuple[str, ...]:
    return names
