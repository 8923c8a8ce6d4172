"""Where each kind lives in the API and which struct its objects decode into."""

from dataclasses import dataclass
from typing import Generic, TypeVar
from urllib.parse import quote

from fimbria.sources.k8s.types import cilium, cilium_policy, cilium_redirect, core, networking
from fimbria.sources.k8s.types.meta import ApiObject

T = TypeVar("T", bound=ApiObject)


@dataclass(frozen=True, slots=True)
class Resource(Generic[T]):
    """A kind of object: `group` is "" for core/v1. `type` may be any struct that names a subset of its fields. `page`
    objects are listed at once: a page is decoded as a whole, and what that needs for a moment stays with the process.
    """

    group: str
    version: str
    plural: str
    kind: str
    type: type[T]
    namespaced: bool = True
    page: int = 500

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def label(self) -> str:
        """`plural.group`, as kubectl writes it."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    def path(self, namespace: str = "", name: str = "", subresource: str = "") -> str:
        """The URL's path, quoted. No namespace on a namespaced resource means all of them (lists and watches only).

        Raises ValueError for a namespace on a cluster-scoped resource, or a name without the namespace it needs.
        """
        if namespace and not self.namespaced:
            raise ValueError(f"{self.label} are cluster-scoped, but namespace {namespace!r} was given")
        if name and self.namespaced and not namespace:
            raise ValueError(f"{self.label} are namespaced, but {name!r} was given without a namespace")
        parts = ["apis", self.group] if self.group else ["api"]
        parts.append(self.version)
        if namespace:
            parts += ["namespaces", namespace]
        parts += [part for part in (self.plural, name, subresource) if part]
        if "." in parts or ".." in parts:
            raise ValueError(f"{name or namespace!r} is no name for one of {self.label}")
        return "/" + "/".join(quote(part, safe="") for part in parts)

    def describe(self, namespace: str = "", name: str = "") -> str:
        """For messages: `CiliumNode "a"`, `Pod "ns/a"`, or the plural when there is no single object."""
        if not name:
            return f"{self.label} in {namespace}" if namespace else self.label
        return f'{self.kind} "{namespace}/{name}"' if namespace else f'{self.kind} "{name}"'


NAMESPACES = Resource("", "v1", "namespaces", "Namespace", core.Namespace, namespaced=False)
NODES = Resource("", "v1", "nodes", "Node", core.Node, namespaced=False)
PODS = Resource("", "v1", "pods", "Pod", core.Pod)
SERVICES = Resource("", "v1", "services", "Service", core.Service)
EVENTS = Resource("", "v1", "events", "Event", core.Event)
ENDPOINT_SLICES = Resource("discovery.k8s.io", "v1", "endpointslices", "EndpointSlice", core.EndpointSlice)
LEASES = Resource("coordination.k8s.io", "v1", "leases", "Lease", core.Lease)
NETWORK_POLICIES = Resource("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy", networking.NetworkPolicy)
CILIUM_NODES = Resource("cilium.io", "v2", "ciliumnodes", "CiliumNode", cilium.CiliumNode, namespaced=False)
CILIUM_IDENTITIES = Resource(
    "cilium.io", "v2", "ciliumidentities", "CiliumIdentity", cilium.CiliumIdentity, namespaced=False
)
CILIUM_ENDPOINTS = Resource("cilium.io", "v2", "ciliumendpoints", "CiliumEndpoint", cilium.CiliumEndpoint)
CILIUM_ENDPOINT_SLICES = Resource(
    "cilium.io", "v2alpha1", "ciliumendpointslices", "CiliumEndpointSlice", cilium.CiliumEndpointSlice,
    namespaced=False, page=50,
)  # fmt: skip
CILIUM_NETWORK_POLICIES = Resource(
    "cilium.io", "v2", "ciliumnetworkpolicies", "CiliumNetworkPolicy", cilium_policy.CiliumNetworkPolicy
)
CILIUM_LOCAL_REDIRECT_POLICIES = Resource(
    "cilium.io",
    "v2",
    "ciliumlocalredirectpolicies",
    "CiliumLocalRedirectPolicy",
    cilium_redirect.CiliumLocalRedirectPolicy,
)
CILIUM_CLUSTERWIDE_NETWORK_POLICIES = Resource(
    "cilium.io",
    "v2",
    "ciliumclusterwidenetworkpolicies",
    "CiliumClusterwideNetworkPolicy",
    cilium_policy.CiliumClusterwideNetworkPolicy,
    namespaced=False,
)
