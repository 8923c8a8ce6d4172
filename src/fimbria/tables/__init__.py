"""Every table of the agent on one screen. One writer each; `Table` says how they behave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fimbria.model.endpoint import ClusterIdentity, EndpointIdentity, LocalEndpoint, Pod, PodSlice, RemoteEndpoint
from fimbria.model.node import Node
from fimbria.model.service import EndpointSlice, NodeTopology, Service
from fimbria.tables.table import Table

ObjectKey = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Tables:
    """Intent from the API, intent from CNI, and what was decided.

    Keys: names for cluster-scoped objects, (namespace, name) for the others.
    """

    # from the API server (sources/k8s)
    nodes: Table[str, Node] = field(default_factory=lambda: Table("nodes"))
    namespaces: Table[str, Mapping[str, str]] = field(default_factory=lambda: Table("namespaces"))
    pods: Table[ObjectKey, Pod] = field(default_factory=lambda: Table("pods"))
    identities: Table[int, ClusterIdentity] = field(default_factory=lambda: Table("identities"))
    remote_endpoints: Table[ObjectKey, RemoteEndpoint] = field(default_factory=lambda: Table("remote_endpoints"))
    pod_slices: Table[str, PodSlice] = field(default_factory=lambda: Table("pod_slices"))
    own_node: Table[str, NodeTopology] = field(default_factory=lambda: Table("own_node"))  # this node's Node object
    services: Table[ObjectKey, Service] = field(default_factory=lambda: Table("services"))
    endpoint_slices: Table[ObjectKey, EndpointSlice] = field(default_factory=lambda: Table("endpoint_slices"))
    network_policies: Table[ObjectKey, Any] = field(default_factory=lambda: Table("network_policies"))
    cilium_policies: Table[ObjectKey, Any] = field(default_factory=lambda: Table("cilium_policies"))
    clusterwide_policies: Table[ObjectKey, Any] = field(default_factory=lambda: Table("clusterwide_policies"))
    redirects: Table[ObjectKey, Any] = field(default_factory=lambda: Table("redirects"))
    # from the container runtime (sources/cni), restored from the journal
    endpoints: Table[int, LocalEndpoint] = field(default_factory=lambda: Table("endpoints"))
    # decided: which identity each local endpoint has
    endpoint_identities: Table[int, EndpointIdentity] = field(default_factory=lambda: Table("endpoint_identities"))
