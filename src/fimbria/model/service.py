"""Services and their endpoints, as far as load balancing needs them. Addresses are 16 bytes, ports in host order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from fimbria.model.address import Prefix
from fimbria.model.selector import NodeSelector

DEFAULT_WEIGHT = 100


class ServiceKey(NamedTuple):
    """Name of a service."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class ServicePort:
    """`name` is what endpoint ports are matched by, and empty for a single port; `proto` is an IP protocol number;
    `node_port` is 0 if nodes don't serve it."""

    name: str
    port: int
    proto: int
    node_port: int = 0


@dataclass(frozen=True, slots=True)
class Service:
    """One service.

    `cluster_ips` has up to one address of each family, none for what needs no translation (headless, ExternalName).
    Node ports exist for each of these families. `serves_cluster_ip`: whether the addresses lead anywhere. `kind` is the
    API's type, for people.
    `internal_local`, `external_local`: only endpoints of the node itself (internalTrafficPolicy, externalTrafficPolicy
    Local); the first is about the cluster IP, the second about all other frontends.
    `publish_not_ready`: endpoints serve whether or not they are ready (publishNotReadyAddresses).
    `affinity_seconds`: a client keeps its endpoint for that long (sessionAffinity ClientIP); 0: it doesn't.
    `source_ranges`: clients that may use the load balancer's addresses, all if empty; `source_deny`: may not.
    `algorithm` (random or maglev) and `forwarding` (snat, dsr) are empty where the node's settings decide.
    `nodes`: which nodes have the service at all; None: every one.
    `health_check_port`: the node port that says whether this node has endpoints (healthCheckNodePort); 0: none.
    `warnings`: what the object asks for and does not get, a sentence each, for people.
    """

    key: ServiceKey
    cluster_ips: tuple[bytes, ...] = ()
    ports: tuple[ServicePort, ...] = ()
    internal_local: bool = False
    publish_not_ready: bool = False
    warnings: tuple[str, ...] = ()
    serves_cluster_ip: bool = True
    kind: str = "ClusterIP"
    load_balancer_ips: tuple[bytes, ...] = ()
    external_ips: tuple[bytes, ...] = ()
    external_local: bool = False
    affinity_seconds: int = 0
    source_ranges: tuple[Prefix, ...] = ()
    source_deny: bool = False
    algorithm: str = ""
    forwarding: str = ""
    nodes: NodeSelector | None = None
    health_check_port: int = 0


class Endpoint(NamedTuple):
    """One address that serves. `node` is empty if unknown; the conditions are those of discovery.k8s.io/v1.

    `zones`, `nodes`: who should use it (hints); empty: no hint.
    """

    addr: bytes
    node: str = ""
    ready: bool = True
    serving: bool = True
    terminating: bool = False
    zones: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EndpointPort:
    """`port` is the number that the endpoints listen on: named target ports are resolved."""

    name: str
    port: int
    proto: int


@dataclass(frozen=True, slots=True)
class EndpointSlice:
    """A part of a service's endpoints, all of one family; several may name the same endpoint.

    `weight`: their share of new connections, relative to others'; 0: none any more.
    """

    name: str
    service: ServiceKey
    v4: bool
    ports: tuple[EndpointPort, ...] = ()
    endpoints: tuple[Endpoint, ...] = ()
    warnings: tuple[str, ...] = ()
    weight: int = DEFAULT_WEIGHT


@dataclass(frozen=True, slots=True)
class NodeTopology:
    """What this node says about itself: its labels, all of its addresses (16 bytes), those of the cluster's own network
    among them (InternalIP), and whether it is going away."""

    labels: tuple[tuple[str, str], ...] = ()
    addrs: tuple[bytes, ...] = ()
    leaving: bool = False
    internal: tuple[bytes, ...] = ()

    @property
    def zone(self) -> str:
        """Its zone; empty if unknown (label topology.kubernetes.io/zone)."""
        return dict(self.labels).get("topology.kubernetes.io/zone", "")


@dataclass(frozen=True, slots=True)
class TableContent:
    """What a table of `service_tables` is made from: backend ids with their weights, by id."""

    backends: tuple[tuple[int, int], ...]
