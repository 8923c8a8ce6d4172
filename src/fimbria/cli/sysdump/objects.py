"""Objects of the API for the archive: which, and how they are cut. Secrets are never among them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from fimbria.cli.sysdump import redact
from fimbria.sources.k8s.resources import Resource
from fimbria.sources.k8s.types.meta import ApiObject

OURS: Final = "app.kubernetes.io/part-of=fimbria"
CUSTOM_GROUPS: Final = ("cilium.io", "fimbria.io")
Json = dict[str, Any]
# A List as kubectl reads it, an object a line.
OPENING: Final = b'{"apiVersion": "v1", "kind": "List", "items": [\n'
CLOSING: Final = b"\n]}\n"


@dataclass(frozen=True, slots=True)
class Kind:
    """One list: `place` is "" for all namespaces, "own" for Fimbria's. With `ours` only what our chart made."""

    group: str
    version: str
    plural: str
    kind: str
    place: str = ""
    ours: bool = False
    namespaced: bool = True

    @property
    def file(self) -> str:
        """Its file in the archive."""
        return f"kubernetes/{self.plural}{'.' + self.group if self.group else ''}.json"

    @property
    def resource(self) -> Resource[ApiObject]:
        """As the client asks for it."""
        return Resource(self.group, self.version, self.plural, self.kind, ApiObject, self.namespaced)


KINDS: Final = (
    Kind("", "v1", "nodes", "Node", namespaced=False),
    Kind("", "v1", "namespaces", "Namespace", namespaced=False),
    Kind("apps", "v1", "daemonsets", "DaemonSet", "own", ours=True),
    Kind("apps", "v1", "deployments", "Deployment", "own", ours=True),
    Kind("", "v1", "pods", "Pod", "own", ours=True),
    Kind("", "v1", "configmaps", "ConfigMap", "own", ours=True),
    Kind("", "v1", "serviceaccounts", "ServiceAccount", "own", ours=True),
    Kind("", "v1", "events", "Event"),
    Kind("policy", "v1", "poddisruptionbudgets", "PodDisruptionBudget", "own", ours=True),
    Kind("coordination.k8s.io", "v1", "leases", "Lease", "own"),
    Kind("rbac.authorization.k8s.io", "v1", "clusterroles", "ClusterRole", ours=True, namespaced=False),
    Kind("rbac.authorization.k8s.io", "v1", "clusterrolebindings", "ClusterRoleBinding", ours=True, namespaced=False),
    Kind("", "v1", "services", "Service"),
    Kind("discovery.k8s.io", "v1", "endpointslices", "EndpointSlice"),
    Kind("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy"),
)
CRDS: Final = Kind(
    "apiextensions.k8s.io", "v1", "customresourcedefinitions", "CustomResourceDefinition", namespaced=False
)


def custom(crd: Json) -> Kind | None:
    """The kind that a definition of ours makes; None for definitions of others, and for what isn't one."""
    try:
        spec = crd["spec"]
        if spec["group"] not in CUSTOM_GROUPS:
            return None
        version = next(v["name"] for v in spec["versions"] if v.get("storage"))
        return Kind(spec["group"], version, spec["names"]["plural"], spec["names"]["kind"],
                    namespaced=spec["scope"] == "Namespaced")  # fmt: skip
    except (KeyError, TypeError, StopIteration):
        return None


def cut(obj: Json, kind: Kind) -> Json:
    """An object without what nobody reads, and without secrets."""
    metadata = {k: v for k, v in (obj.get("metadata") or {}).items() if k != "managedFields"}
    whole: Json = {"apiVersion": kind.resource.api_version, "kind": kind.kind} | obj | {"metadata": metadata}
    if kind.kind == "Node" and isinstance(whole.get("status"), dict):
        whole["status"] = {k: v for k, v in whole["status"].items() if k != "images"}
    if kind is CRDS and isinstance(whole.get("spec"), dict):
        versions = [{k: v for k, v in x.items() if k != "schema"} for x in whole["spec"].get("versions") or ()]
        whole["spec"] = {k: v for k, v in whole["spec"].items() if k != "conversion"} | {"versions": versions}
    shown: Json = redact.value(whole)
    return shown
