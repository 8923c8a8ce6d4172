"""CustomResourceDefinitions: validation, establishment, and the resources they bring."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from fimbria.lab.apiserver import columns, schema, validation
from fimbria.lab.apiserver.decoding import prune as prune_typed
from fimbria.lab.apiserver.errors import FieldError, invalid, not_supported, required
from fimbria.lab.apiserver.fieldsets import Shape, shape_of_custom
from fimbria.lab.apiserver.model import Obj, Resource
from fimbria.lab.apiserver.strategy import Strategy
from fimbria.lab.apiserver.types import Type


class CrdStrategy(Strategy):
    has_generation = True

    def default(self, obj: Obj) -> None:
        spec = obj.setdefault("spec", {})
        names = spec.setdefault("names", {})
        if kind := names.get("kind"):
            names.setdefault("singular", kind.lower())
            names.setdefault("listKind", f"{kind}List")
        spec.setdefault("conversion", {"strategy": "None"})

    def prepare_create(self, obj: Obj) -> None:
        obj["status"] = {"conditions": None, "acceptedNames": {"plural": "", "kind": ""}, "storedVersions": []}
        stored = [one["name"] for one in obj["spec"].get("versions") or [] if one.get("storage") and "name" in one]
        obj["status"]["storedVersions"] = stored

    def validate(self, obj: Obj, old: Obj | None) -> list[FieldError]:
        spec = obj["spec"]
        errors = [required(f"spec.{key}") for key in ("group", "scope", "versions") if not spec.get(key)]
        errors += [required(f"spec.names.{key}") for key in ("plural", "kind") if not spec["names"].get(key)]
        if errors:
            return errors
        name = f"{spec['names']['plural']}.{spec['group']}"
        if obj["metadata"]["name"] != name:
            detail = 'must be spec.names.plural+"."+spec.group'
            errors.append(invalid("metadata.name", obj["metadata"]["name"], detail))
        if spec["scope"] not in ("Cluster", "Namespaced"):
            errors.append(not_supported("spec.scope", spec["scope"], ["Cluster", "Namespaced"]))
        if spec["conversion"].get("strategy", "None") != "None":
            errors.append(not_supported("spec.conversion.strategy", spec["conversion"]["strategy"], ["None"]))
        if sum(bool(one.get("storage")) for one in spec["versions"]) != 1:
            versions = [one.get("name", "") for one in spec["versions"]]
            errors.append(invalid("spec.versions", versions, "must have exactly one version marked as storage version"))
        for at, version in enumerate(spec["versions"]):
            # kube-apiserver moves the schema of an only version to spec.validation before it looks at it
            field = f"spec.versions[{at}]"
            where = "spec.validation" if len(spec["versions"]) == 1 else f"{field}.schema"
            errors += _validate_version(version, field, f"{where}.openAPIV3Schema")
        if old and old["spec"]["scope"] != spec["scope"]:
            errors.append(validation.immutable("spec.scope", spec["scope"]))
        return errors


def _validate_version(version: Obj, field: str, where: str) -> list[FieldError]:
    errors = validation.dns_label(version.get("name", ""), f"{field}.name")
    root = (version.get("schema") or {}).get("openAPIV3Schema")
    if not isinstance(root, dict):
        return [*errors, required(f"{field}.schema.openAPIV3Schema", "schemas are required")]
    if root.get("type") != "object":
        errors.append(invalid(f"{where}.type", root.get("type"), "must be object at the root"))
    errors += _validate_structure(root, where)
    paths = [(f"{field}.additionalPrinterColumns[{at}].jsonPath", one.get("jsonPath"))
             for at, one in enumerate(version.get("additionalPrinterColumns") or [])]  # fmt: skip
    paths += [(f"{field}.selectableFields[{at}].jsonPath", one.get("jsonPath"))
              for at, one in enumerate(version.get("selectableFields") or [])]  # fmt: skip
    for path_field, path in paths:
        try:
            columns.json_path(path or "?")
        except ValueError as error:
            errors.append(invalid(path_field, path, str(error)))
    return errors


def _validate_structure(node: Any, field: str) -> list[FieldError]:
    """Every node of a structural schema says its type, unless it leaves that open explicitly."""
    if not isinstance(node, dict):
        return [invalid(field, node, "must be an object")]
    errors: list[FieldError] = []
    open_type = node.get(schema.INT_OR_STRING) or node.get(schema.PRESERVE)
    if not node.get("type") and not open_type:
        errors.append(required(f"{field}.type", "must not be empty for specified object fields"))
    if node.get("type") and node["type"] not in ("object", "array", "string", "boolean", "integer", "number"):
        errors.append(not_supported(f"{field}.type", node["type"], ["array", "boolean", "integer", "number", "object",
                                                                     "string"]))  # fmt: skip
    if node.get("type") == "array" and "items" not in node:
        errors.append(required(f"{field}.items", "must be specified"))
    for key, inner in (node.get("properties") or {}).items():
        errors += _validate_structure(inner, f"{field}.properties[{key}]")
    if "items" in node:
        errors += _validate_structure(node["items"], f"{field}.items")
    if isinstance(node.get("additionalProperties"), dict):
        errors += _validate_structure(node["additionalProperties"], f"{field}.additionalProperties")
    return errors


class CustomStrategy(Strategy):
    """The rules of a custom resource, from its definition's version."""

    has_generation = True
    unconditional_update = False

    def __init__(self, version: Obj):
        self.schema: Obj = version["schema"]["openAPIV3Schema"]
        self.has_status = "status" in (version.get("subresources") or {})
        paths = [one["jsonPath"] for one in version.get("selectableFields") or []]
        self._selectable: dict[str, Callable[[Obj], Any]] = {
            path.lstrip("."): columns.json_path(path) for path in paths
        }
        self.field_labels = frozenset(self._selectable)
        self._shape = shape_of_custom(self.schema)

    def shape(self, res: Resource) -> Shape:
        return self._shape

    def decode(self, res: Resource, obj: Obj) -> list[str]:
        described = f'{res.kind} in version "{res.version}" cannot be handled as a {res.kind}'
        top: Obj = {key: obj[key] for key in ("apiVersion", "kind", "metadata") if key in obj}
        unknown = prune_typed(top, Type("CustomObject"), described)
        return unknown + schema.prune(obj, self.schema)

    def default(self, obj: Obj) -> None:
        schema.drop_nulls(obj, self.schema)
        schema.default(obj, self.schema)

    def prepare_create(self, obj: Obj) -> None:
        if self.has_status:
            obj.pop("status", None)

    def prepare_update(self, new: Obj, old: Obj) -> None:
        if self.has_status:
            super().prepare_update(new, old)

    def prepare_status(self, new: Obj, old: Obj) -> None:
        super().prepare_status(new, old)
        managed = new["metadata"].get("managedFields")
        new["metadata"] = dict(old["metadata"])
        if managed:
            new["metadata"]["managedFields"] = managed

    def validate(self, obj: Obj, old: Obj | None) -> list[FieldError]:
        ignored = ("apiVersion", "kind", "metadata")
        body = {key: value for key, value in obj.items() if key not in ignored}
        properties = {key: inner for key, inner in (self.schema.get("properties") or {}).items() if key not in ignored}
        needed = [key for key in self.schema.get("required") or [] if key not in ignored]
        return schema.validate(body, self.schema | {"properties": properties, "required": needed})

    def validate_status(self, obj: Obj, old: Obj) -> list[FieldError]:
        return self.validate(obj, old)

    def spec_changed(self, new: Obj, old: Obj) -> bool:
        """Without a status subresource every change but metadata counts."""
        if super().spec_changed(new, old):
            return True
        return not self.has_status and new.get("status") != old.get("status")

    def fields(self, obj: Obj) -> dict[str, str]:
        found = super().fields(obj)
        for name, find in self._selectable.items():
            value = find(obj)
            found[name] = str(value).lower() if isinstance(value, bool) else "" if value is None else str(value)
        return found


def resources(definition: Obj) -> list[Resource]:
    """The resources of a definition's served versions."""
    spec, names = definition["spec"], definition["spec"]["names"]
    storage = next(version["name"] for version in spec["versions"] if version.get("storage"))
    return [
        Resource(
            group=spec["group"],
            version=version["name"],
            plural=names["plural"],
            kind=names["kind"],
            namespaced=spec["scope"] == "Namespaced",
            strategy=CustomStrategy(version),
            singular=names.get("singular") or names["kind"].lower(),
            short=tuple(names.get("shortNames") or ()),
            categories=tuple(names.get("categories") or ()),
            subresources=("status",) if "status" in (version.get("subresources") or {}) else (),
            columns=columns.custom(version.get("additionalPrinterColumns") or []),
            to_stored=None if version["name"] == storage else _relabel(f"{spec['group']}/{storage}"),
            from_stored=None if version["name"] == storage else _relabel(f"{spec['group']}/{version['name']}"),
            extra={"listKind": names.get("listKind") or f"{names['kind']}List"},
        )
        for version in spec["versions"]
        if version.get("served")
    ]


def _relabel(api_version: str) -> Callable[[Obj], Obj]:
    """Conversion strategy None: only apiVersion changes."""
    return lambda obj: obj | {"apiVersion": api_version}


def conflicts(definition: Obj, others: list[Obj]) -> str:
    """Which name of a definition another one of its group already has; empty when there is none."""
    names = definition["spec"]["names"]
    wanted = {names["plural"], names.get("singular"), *(names.get("shortNames") or ())} - {None}
    for other in others:
        if other["spec"]["group"] != definition["spec"]["group"]:
            continue
        if other["metadata"]["name"] == definition["metadata"]["name"]:
            continue
        taken = other["spec"]["names"]
        both = wanted & ({taken["plural"], taken.get("singular"), *(taken.get("shortNames") or ())} - {None})
        if both:
            return f'"{sorted(map(str, both))[0]}" is already in use'
    return ""


def accept(definition: Obj, conflict: str, now: datetime | None = None) -> Obj:
    """The status of a definition once its names are judged; a conflict keeps it from being established."""
    moment = columns.timestamp(now or datetime.now(UTC))
    names = ("NamesAccepted", "False", "NameConflict", conflict) if conflict else (
        "NamesAccepted", "True", "NoConflicts", "no conflicts found")  # fmt: skip
    ready = ("Established", "False", "NotAccepted", "not all names are accepted") if conflict else (
        "Established", "True", "InitialNamesAccepted", "the initial names have been accepted")  # fmt: skip
    conditions = [{"lastTransitionTime": moment, "message": text, "reason": reason, "status": status, "type": kind}
                  for kind, status, reason, text in (names, ready)]  # fmt: skip
    accepted = {"plural": "", "kind": ""} if conflict else definition["spec"]["names"]
    stored = [one["name"] for one in definition["spec"]["versions"] if one.get("storage")]
    before = (definition.get("status") or {}).get("storedVersions") or []
    return {"acceptedNames": accepted, "conditions": conditions, "storedVersions": list(dict.fromkeys(before + stored))}
