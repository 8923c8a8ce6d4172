"""OpenAPI documents, as much as kubectl needs: which kinds know which query parameters, and the kinds' fields.

kubectl asks here whether the server checks fields itself (fieldValidation), and leaves the checking to the server then.
"""

from __future__ import annotations

from fimbria.lab.apiserver.crds import CustomStrategy
from fimbria.lab.apiserver.model import Obj, Resource
from fimbria.lab.apiserver.registry import Registry
from fimbria.lab.apiserver.types import TYPES, Type

_PARAMETERS = ("dryRun", "fieldManager", "fieldValidation", "force")
_SCALARS: dict[str, Obj] = {
    "s": {"type": "string"},
    "t": {"type": "string", "format": "date-time"},
    "T": {"type": "string", "format": "date-time"},
    "B": {"type": "string", "format": "byte"},
    "i": {"type": "integer", "format": "int64"},
    "n": {"type": "number"},
    "b": {"type": "boolean"},
    "q": {"x-kubernetes-int-or-string": True},
    "is": {"x-kubernetes-int-or-string": True},
    "any": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
}


def index(registry: Registry) -> Obj:
    """/openapi/v3: the documents there are, each with a hash that changes with what is served."""
    paths = {}
    for group, versions in registry.groups.items():
        for version in versions:
            path = _prefix(group, version).strip("/")
            paths[path] = {"serverRelativeURL": f"/openapi/v3/{path}?hash={registry.generation}"}
    return {"paths": paths}


def document(registry: Registry, path: str) -> Obj | None:
    """/openapi/v3/<path> of one group version; None if there is no such group version."""
    parts = path.strip("/").split("/")
    if parts[0] == "api" and len(parts) == 2:
        group, version = "", parts[1]
    elif parts[0] == "apis" and len(parts) == 3:
        group, version = parts[1], parts[2]
    else:
        return None
    resources = registry.groups.get(group, {}).get(version)
    if resources is None:
        return None
    paths: Obj = {}
    schemas: Obj = {}
    for res in resources.values():
        paths[_item_path(res)] = {"patch": _patch(res)}
        schemas[_schema_name(res)] = _schema(res)
    schemas |= {f"fimbria.{name}": _struct(Type(name)) for name in TYPES}
    info = {"title": "Fimbria lab", "version": "v1"}
    return {"openapi": "3.0.0", "info": info, "paths": paths, "components": {"schemas": schemas}}


def swagger() -> Obj:
    """/openapi/v2: an empty but valid document; everything that asks for it prefers v3."""
    return {"swagger": "2.0", "info": {"title": "Fimbria lab", "version": "v1"}, "paths": {}, "definitions": {}}


def _prefix(group: str, version: str) -> str:
    return f"/apis/{group}/{version}" if group else f"/api/{version}"


def _item_path(res: Resource) -> str:
    inner = "/namespaces/{namespace}" if res.namespaced else ""
    return f"{_prefix(res.group, res.version)}{inner}/{res.plural}/{{name}}"


def _patch(res: Resource) -> Obj:
    parameters = [{"name": name, "in": "query", "schema": {"type": "string"}} for name in _PARAMETERS]
    content = {
        kind: {"schema": {"type": "object"}}
        for kind in ("application/json-patch+json", "application/merge-patch+json", "application/apply-patch+yaml")
    }
    kind = {"group": res.group, "version": res.version, "kind": res.kind}
    return {
        "parameters": parameters,
        "requestBody": {"content": content, "required": True},
        "responses": {"200": {"description": "OK"}},
        "x-kubernetes-action": "patch",
        "x-kubernetes-group-version-kind": kind,
    }


def _schema_name(res: Resource) -> str:
    return ".".join([*reversed((res.group or "core").split(".")), res.version, res.kind])


def _schema(res: Resource) -> Obj:
    kind = [{"group": res.group, "version": res.version, "kind": res.kind}]
    if isinstance(res.strategy, CustomStrategy):
        return res.strategy.schema | {"x-kubernetes-group-version-kind": kind}
    return _struct(Type(res.type_name)) | {"x-kubernetes-group-version-kind": kind}


def _struct(kind: Type) -> Obj:
    return {"type": "object", "properties": {name: _property(one) for name, one in (kind.fields or {}).items()}}


def _property(kind: Type) -> Obj:
    if kind.is_list:
        assert kind.item is not None
        return {"type": "array", "items": _property(kind.item)}
    if kind.is_map:
        assert kind.item is not None
        return {"type": "object", "additionalProperties": _property(kind.item)}
    if kind.name in _SCALARS:
        return dict(_SCALARS[kind.name])
    return {"allOf": [{"$ref": f"#/components/schemas/fimbria.{kind.name}"}]}
