"""The scale subresource (autoscaling/v1) of Deployments and ReplicaSets."""

from __future__ import annotations

from typing import Any

from fimbria.lab.apiserver import errors, patch
from fimbria.lab.apiserver.columns import selector_text
from fimbria.lab.apiserver.model import Key, Obj, Resource
from fimbria.lab.apiserver.registry import Registry, Write
from fimbria.lab.apiserver.requests import JSON_PATCH, Target
from fimbria.lab.apiserver.types import TYPES


def scale_of(obj: Obj) -> Obj:
    meta = obj["metadata"]
    kept = {key: meta[key] for key in ("name", "namespace", "uid", "resourceVersion", "creationTimestamp")}
    status = {
        "replicas": (obj.get("status") or {}).get("replicas", 0),
        "selector": selector_text(obj["spec"]["selector"]),
    }
    spec = {"replicas": obj["spec"].get("replicas", 0)}
    return {"kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": kept, "spec": spec, "status": status}


def put_scale(registry: Registry, res: Resource, target: Target, body: Obj, write: Write) -> Obj:
    replicas = (body.get("spec") or {}).get("replicas", 0)
    if not isinstance(replicas, int) or replicas < 0:
        problem = errors.invalid("spec.replicas", replicas, "must be greater than or equal to 0")
        raise errors.invalid_object(res, target.name, [problem])
    given = (body.get("metadata") or {}).get("resourceVersion")

    def change(obj: Obj) -> Obj:
        obj["spec"]["replicas"] = replicas
        obj["metadata"]["resourceVersion"] = given or obj["metadata"]["resourceVersion"]
        return obj

    return scale_of(registry.modify(res, Key(target.namespace, target.name), change, "", write))


def patch_scale(registry: Registry, res: Resource, target: Target, body: Any, *, kind: str, write: Write) -> Obj:
    current = scale_of(registry.read(res, Key(target.namespace, target.name)))
    try:
        if kind == JSON_PATCH:
            changed = patch.json_patch(current, body)
        else:
            changed = patch.strategic_patch(current, body, TYPES["Scale"])
    except patch.PatchError as error:
        raise errors.bad_request(str(error)) from None
    return put_scale(registry, res, target, changed, write)
