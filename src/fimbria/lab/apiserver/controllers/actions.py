"""What controllers decide: values that the loop carries out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Obj = dict[str, Any]


@dataclass(frozen=True)
class Create:
    resource: str
    body: Obj


@dataclass(frozen=True)
class Patch:
    """A JSON merge patch; ``sub`` names a subresource. Carries the version it was decided on where that matters."""

    resource: str
    namespace: str
    name: str
    body: Obj
    sub: str = ""


@dataclass(frozen=True)
class Put:
    resource: str
    body: Obj
    sub: str = ""


@dataclass(frozen=True)
class Delete:
    resource: str
    namespace: str
    name: str
    uid: str
    policy: str = "Background"


@dataclass(frozen=True)
class Bind:
    namespace: str
    name: str
    node: str
    uid: str = field(default="", compare=False)


Action = Create | Patch | Put | Delete | Bind


def meta(obj: Obj) -> Obj:
    found: Obj = obj["metadata"]
    return found


def owner(obj: Obj) -> Obj | None:
    """The owner reference marked as controller, if there is one."""
    return next((one for one in meta(obj).get("ownerReferences") or [] if one.get("controller")), None)


def owned_by(objects: list[Obj], uid: str) -> list[Obj]:
    return [obj for obj in objects if (found := owner(obj)) and found["uid"] == uid]


def owner_reference(obj: Obj) -> Obj:
    return {
        "apiVersion": obj["apiVersion"],
        "kind": obj["kind"],
        "name": meta(obj)["name"],
        "uid": meta(obj)["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }


def condition(obj: Obj, kind: str) -> Obj | None:
    conditions = (obj.get("status") or {}).get("conditions") or []
    return next((one for one in conditions if one["type"] == kind), None)


def is_true(obj: Obj, kind: str) -> bool:
    found = condition(obj, kind)
    return found is not None and found.get("status") == "True"


def is_ready(pod: Obj) -> bool:
    return is_true(pod, "Ready")


def is_terminating(obj: Obj) -> bool:
    return bool(meta(obj).get("deletionTimestamp"))


def is_active(pod: Obj) -> bool:
    phase = (pod.get("status") or {}).get("phase")
    return not is_terminating(pod) and phase not in ("Succeeded", "Failed")


def status_patch(resource: str, obj: Obj, status: Obj) -> list[Action]:
    """The patch that makes an object's status show these values; nothing if it already does."""
    current = obj.get("status") or {}
    changed = {key: value for key, value in status.items() if current.get(key) != value}
    if not changed:
        return []
    return [Patch(resource, meta(obj)["namespace"], meta(obj)["name"], {"status": changed}, "status")]


def pod_from_template(parent: Obj, template: Obj, labels: Obj) -> Obj:
    """A pod of a workload's template, named after and owned by the workload."""
    inner = template.get("metadata") or {}
    metadata: Obj = {
        "generateName": f"{meta(parent)['name']}-",
        "namespace": meta(parent)["namespace"],
        "labels": (inner.get("labels") or {}) | labels,
        "ownerReferences": [owner_reference(parent)],
    }
    for key in ("annotations", "finalizers"):
        if inner.get(key):
            metadata[key] = inner[key]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
