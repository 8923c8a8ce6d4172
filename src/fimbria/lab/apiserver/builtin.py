"""The built-in resources that the server knows."""

from __future__ import annotations

from fimbria.lab.apiserver import columns as c
from fimbria.lab.apiserver.crds import CrdStrategy
from fimbria.lab.apiserver.model import Column, Obj, Resource
from fimbria.lab.apiserver.pods import PodStrategy
from fimbria.lab.apiserver.policies import NetworkPolicyStrategy
from fimbria.lab.apiserver.services import Allocations, ServiceStrategy
from fimbria.lab.apiserver.strategy import (
    ConfigMapStrategy,
    EventStrategy,
    LeaseStrategy,
    NamespaceStrategy,
    NodeStrategy,
    Rbac,
    SecretStrategy,
    ServiceAccountStrategy,
    Strategy,
)
from fimbria.lab.apiserver.workloads import (
    DaemonSetStrategy,
    DeploymentStrategy,
    EndpointSliceStrategy,
    EndpointsStrategy,
    ReplicaSetStrategy,
)

_STATUS = ("status",)
_ALL = ("all",)


def resources(allocations: Allocations) -> list[Resource]:
    """All of them, preferred versions of a group first."""
    return [*_core(allocations), *_apps(), *_rest()]


def _make(
    group: str,
    kind: str,
    strategy: Strategy,
    columns: tuple[Column, ...],
    short: str = "",
    *,
    namespaced: bool = True,
    sub: tuple[str, ...] = (),
    categories: tuple[str, ...] = (),
    plural: str = "",
) -> Resource:
    name, _, version = group.rpartition("/")
    return Resource(
        group=name,
        version=version,
        plural=plural or kind.lower() + "s",
        kind=kind,
        namespaced=namespaced,
        strategy=strategy,
        singular=kind.lower(),
        short=tuple(short.split()),
        categories=categories,
        subresources=sub,
        columns=columns,
        type_name=kind,
    )


def _core(allocations: Allocations) -> list[Resource]:
    service = ServiceStrategy(allocations)
    event = Resource("", "v1", "events", "Event", True, EventStrategy(), "event", ("ev",), columns=c.EVENTS,
                     type_name="CoreEvent")  # fmt: skip
    return [
        _make("v1", "Namespace", NamespaceStrategy(), c.NAMESPACES, "ns", namespaced=False, sub=("status", "finalize")),
        _make("v1", "Node", NodeStrategy(), c.NODES, "no", namespaced=False, sub=_STATUS),
        _make("v1", "Pod", PodStrategy(), c.PODS, "po", sub=("status", "binding"), categories=_ALL),
        _make("v1", "Service", service, c.SERVICES, "svc", sub=_STATUS, categories=_ALL),
        _make("v1", "Endpoints", EndpointsStrategy(), c.ENDPOINTS, "ep", plural="endpoints"),
        _make("v1", "ConfigMap", ConfigMapStrategy(), c.CONFIG_MAPS, "cm"),
        _make("v1", "Secret", SecretStrategy(), c.SECRETS),
        _make("v1", "ServiceAccount", ServiceAccountStrategy(), c.SERVICE_ACCOUNTS, "sa"),
        event,
    ]


def _apps() -> list[Resource]:
    sub = ("status", "scale")
    deployment = _make("apps/v1", "Deployment", DeploymentStrategy(), c.DEPLOYMENTS, "deploy", sub=sub, categories=_ALL)
    replicas = _make("apps/v1", "ReplicaSet", ReplicaSetStrategy(), c.REPLICA_SETS, "rs", sub=sub, categories=_ALL)
    daemons = _make("apps/v1", "DaemonSet", DaemonSetStrategy(), c.DAEMON_SETS, "ds", sub=_STATUS, categories=_ALL)
    return [deployment, replicas, daemons]


def _rest() -> list[Resource]:
    rbac = "rbac.authorization.k8s.io/v1"
    crd = _make("apiextensions.k8s.io/v1", "CustomResourceDefinition", CrdStrategy(), c.CREATED, "crd crds",
                namespaced=False, sub=_STATUS, categories=("api-extensions",))  # fmt: skip
    policy = _make("networking.k8s.io/v1", "NetworkPolicy", NetworkPolicyStrategy(), c.NETWORK_POLICIES, "netpol",
                   plural="networkpolicies")  # fmt: skip
    events = Resource("events.k8s.io", "v1", "events", "Event", True, EventStrategy(), "event", ("ev",),
                      columns=c.EVENTS, type_name="Event", storage_name="events", to_stored=event_to_core,
                      from_stored=event_from_core)  # fmt: skip
    return [
        _make("discovery.k8s.io/v1", "EndpointSlice", EndpointSliceStrategy(), c.ENDPOINT_SLICES),
        policy,
        _make("coordination.k8s.io/v1", "Lease", LeaseStrategy(), c.LEASES),
        events,
        _make(rbac, "ClusterRole", Rbac(), c.CREATED, namespaced=False),
        _make(rbac, "ClusterRoleBinding", Rbac(), c.BINDINGS, namespaced=False),
        _make(rbac, "Role", Rbac(), c.CREATED),
        _make(rbac, "RoleBinding", Rbac(), c.BINDINGS),
        crd,
    ]


_RENAMED = {
    "note": "message",
    "regarding": "involvedObject",
    "reportingController": "reportingComponent",
    "deprecatedSource": "source",
    "deprecatedFirstTimestamp": "firstTimestamp",
    "deprecatedLastTimestamp": "lastTimestamp",
    "deprecatedCount": "count",
}


def event_to_core(obj: Obj) -> Obj:
    """events.k8s.io/v1 to core/v1: the same event under older field names."""
    return {_RENAMED.get(key, key): value for key, value in obj.items()} | {"apiVersion": "v1"}


def event_from_core(obj: Obj) -> Obj:
    back = {new: old for old, new in _RENAMED.items()}
    found = {back.get(key, key): value for key, value in obj.items()} | {"apiVersion": "events.k8s.io/v1"}
    return {key: value for key, value in found.items() if value != ""}
