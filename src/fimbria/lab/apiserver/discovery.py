"""Discovery documents: /api, /apis, a group version's resources, and the aggregated form (apidiscovery.k8s.io/v2)."""

from __future__ import annotations

from fimbria.lab.apiserver.model import Obj, Resource
from fimbria.lab.apiserver.registry import Registry

AGGREGATED = "application/json;g=apidiscovery.k8s.io;v={version};as=APIGroupDiscoveryList"
_SUB_VERBS = {
    "status": ["get", "patch", "update"],
    "scale": ["get", "patch", "update"],
    "binding": ["create"],
    "finalize": ["update"],
}
_SUB_KINDS = {"scale": ("autoscaling", "v1", "Scale"), "binding": ("", "v1", "Binding")}


def api_versions(address: str) -> Obj:
    by_address = [{"clientCIDR": "0.0.0.0/0", "serverAddress": address}]
    return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": by_address}


def group_list(registry: Registry) -> Obj:
    groups = [_group(registry, name) for name in registry.groups if name]
    return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}


def group(registry: Registry, name: str) -> Obj | None:
    if name not in registry.groups or not name:
        return None
    return {"kind": "APIGroup", "apiVersion": "v1"} | _group(registry, name)


def _group(registry: Registry, name: str) -> Obj:
    versions = [{"groupVersion": f"{name}/{version}", "version": version} for version in _sorted(registry, name)]
    return {"name": name, "versions": versions, "preferredVersion": versions[0]}


def _sorted(registry: Registry, group_name: str) -> list[str]:
    """Stable versions before beta and alpha, higher before lower."""

    def rank(version: str) -> tuple[int, int, int]:
        digits = version.removeprefix("v")
        for order, word in ((1, "beta"), (0, "alpha")):
            major, found, minor = digits.partition(word)
            if found:
                return order, int(major or 0), int(minor or 0)
        return 2, int(digits) if digits.isdigit() else 0, 0

    return sorted(registry.groups[group_name], key=rank, reverse=True)


def resource_list(registry: Registry, group_name: str, version: str) -> Obj | None:
    resources = registry.groups.get(group_name, {}).get(version)
    if resources is None:
        return None
    entries = [entry for res in resources.values() for entry in _entries(res)]
    full = f"{group_name}/{version}" if group_name else version
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": full, "resources": entries}


def _entries(res: Resource) -> list[Obj]:
    main: Obj = {"name": res.plural, "singularName": res.singular, "namespaced": res.namespaced, "kind": res.kind,
                 "verbs": list(res.verbs)}  # fmt: skip
    if res.short:
        main["shortNames"] = list(res.short)
    if res.categories:
        main["categories"] = list(res.categories)
    entries = [main]
    for sub in res.subresources:
        entry: Obj = {"name": f"{res.plural}/{sub}", "singularName": "", "namespaced": res.namespaced,
                      "kind": res.kind, "verbs": _SUB_VERBS[sub]}  # fmt: skip
        if sub in _SUB_KINDS:
            group_name, version, kind = _SUB_KINDS[sub]
            entry |= {"kind": kind} | ({"group": group_name, "version": version} if group_name else {})
        entries.append(entry)
    return entries


def aggregated(registry: Registry, core: bool, version: str) -> Obj:
    names = [name for name in registry.groups if (name == "") == core]
    items: list[Obj] = []
    for name in names:
        versions = [_aggregated_version(registry, name, one) for one in _sorted(registry, name)]
        items.append({"metadata": {"name": name, "creationTimestamp": None}, "versions": versions})
    api_version = f"apidiscovery.k8s.io/{version}"
    return {"kind": "APIGroupDiscoveryList", "apiVersion": api_version, "metadata": {}, "items": items}


def _aggregated_version(registry: Registry, group_name: str, version: str) -> Obj:
    resources = [_aggregated_resource(res) for res in registry.groups[group_name][version].values()]
    return {"version": version, "freshness": "Current", "resources": resources}


def _aggregated_resource(res: Resource) -> Obj:
    kind = {"group": res.group, "version": res.version, "kind": res.kind}
    entry: Obj = {"resource": res.plural, "responseKind": kind, "scope": "Namespaced" if res.namespaced else "Cluster",
                  "singularResource": res.singular, "verbs": list(res.verbs)}  # fmt: skip
    if res.short:
        entry["shortNames"] = list(res.short)
    if res.categories:
        entry["categories"] = list(res.categories)
    subs: list[Obj] = []
    for sub in res.subresources:
        group_name, version, name = _SUB_KINDS.get(sub, (res.group, res.version, res.kind))
        answer = {"group": group_name, "version": version, "kind": name}
        subs.append({"subresource": sub, "responseKind": answer, "verbs": _SUB_VERBS[sub]})
    return entry | ({"subresources": subs} if subs else {})
