"""Deployments: one ReplicaSet per template, and the way from the old ones to the new one. Pure."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

from fimbria.lab.apiserver.controllers.actions import (
    Action,
    Create,
    Delete,
    Obj,
    Patch,
    condition,
    is_terminating,
    meta,
    owner_reference,
    status_patch,
)

HASH = "pod-template-hash"
REVISION = "deployment.kubernetes.io/revision"
_ALPHABET = "bcdfghjklmnpqrstvwxz2456789"


def template_hash(template: Obj) -> str:
    """Ten characters that name a pod template."""
    digest = hashlib.sha256(json.dumps(template, sort_keys=True).encode()).digest()
    return "".join(_ALPHABET[byte % len(_ALPHABET)] for byte in digest[:10])


def plan(deployment: Obj, owned: list[Obj], now: str) -> list[Action]:
    """What a Deployment needs, given the ReplicaSets it owns; ``now`` is a timestamp for conditions."""
    new = next((one for one in owned if _same_template(one, deployment)), None)
    old = [one for one in owned if one is not new]
    actions = status_patch("deployments", deployment, _status(deployment, new, owned, now))
    if is_terminating(deployment):
        return actions
    wanted = deployment["spec"].get("replicas", 1)
    if deployment["spec"].get("paused"):
        return actions + (_scale(new, wanted) if new else [])
    if deployment["spec"]["strategy"]["type"] == "Recreate":
        return actions + _recreate(deployment, new, old, wanted)
    return actions + _roll(deployment, new, old, wanted) + _forget(deployment, old)


def _same_template(replica_set: Obj, deployment: Obj) -> bool:
    template = replica_set["spec"]["template"]
    inner = dict(template.get("metadata") or {})
    inner["labels"] = {key: value for key, value in (inner.get("labels") or {}).items() if key != HASH}
    wanted = deployment["spec"]["template"]
    outer = dict(wanted.get("metadata") or {})
    outer.pop("creationTimestamp", None)
    inner.pop("creationTimestamp", None)
    return inner == outer and template["spec"] == wanted["spec"]


def _recreate(deployment: Obj, new: Obj | None, old: list[Obj], wanted: int) -> list[Action]:
    down = [action for one in old for action in _scale(one, 0)]
    if down or any((one.get("status") or {}).get("replicas") for one in old):
        return down
    return _scale(new, wanted) if new else [_create(deployment, old, wanted)]


def _roll(deployment: Obj, new: Obj | None, old: list[Obj], wanted: int) -> list[Action]:
    rolling = deployment["spec"]["strategy"].get("rollingUpdate") or {}
    surge = resolve(rolling.get("maxSurge", "25%"), wanted, up=True)
    unavailable = resolve(rolling.get("maxUnavailable", "25%"), wanted, up=False)
    if not surge and not unavailable:
        unavailable = 1
    total_old = sum(_replicas(one) for one in old)
    have = _replicas(new) if new else 0
    room = max(wanted + surge - total_old - have, 0)
    target = min(wanted, have + room) if have < wanted else wanted
    actions: list[Action] = _scale(new, target) if new else [_create(deployment, old, target)]
    return actions + _shrink(new, old, wanted - unavailable)


def _shrink(new: Obj | None, old: list[Obj], least: int) -> list[Action]:
    """Scales old sets down as far as the number of available pods stays at ``least``; broken pods go first."""
    live = sorted((one for one in old if _replicas(one)), key=lambda one: str(meta(one)["creationTimestamp"]))
    new_replicas, new_available = (_replicas(new), _available(new)) if new else (0, 0)
    total = sum(_replicas(one) for one in live) + new_replicas
    budget = max(total - least - (new_replicas - new_available), 0)
    target = {meta(one)["name"]: _replicas(one) for one in live}
    for one in live:
        broken = min(_replicas(one) - min(_available(one), _replicas(one)), budget)
        target[meta(one)["name"]] -= broken
        budget -= broken
    spare = new_available + sum(_available(one) for one in live) - least
    for one in live:
        name = meta(one)["name"]
        cut = max(min(target[name], spare, budget), 0)
        target[name] -= cut
        spare, budget = spare - cut, budget - cut
    return [action for one in live for action in _scale(one, target[meta(one)["name"]])]


def _forget(deployment: Obj, old: list[Obj]) -> list[Action]:
    """Deletes emptied sets beyond the history limit, oldest revision first."""
    limit = deployment["spec"].get("revisionHistoryLimit", 10)
    empty = [one for one in old if not _replicas(one) and not (one.get("status") or {}).get("replicas")
             and not is_terminating(one)]  # fmt: skip
    empty.sort(key=revision)
    gone = empty[: max(len(empty) - limit, 0)]
    return [Delete("replicasets", meta(one)["namespace"], meta(one)["name"], meta(one)["uid"]) for one in gone]


def revision(obj: Obj) -> int:
    text = (meta(obj).get("annotations") or {}).get(REVISION, "0")
    return int(text) if text.isdigit() else 0


def resolve(value: Any, total: int, up: bool) -> int:
    """A count, or a percentage of ``total`` rounded up or down."""
    if isinstance(value, int):
        return value
    share = int(str(value).rstrip("%")) * total / 100
    return math.ceil(share) if up else math.floor(share)


def _replicas(obj: Obj) -> int:
    return int(obj["spec"].get("replicas", 1))


def _available(obj: Obj) -> int:
    return int((obj.get("status") or {}).get("availableReplicas") or 0)


def _scale(replica_set: Obj | None, replicas: int) -> list[Action]:
    if replica_set is None or _replicas(replica_set) == replicas:
        return []
    where = meta(replica_set)
    body = {"metadata": {"resourceVersion": where["resourceVersion"]}, "spec": {"replicas": replicas}}
    return [Patch("replicasets", where["namespace"], where["name"], body)]


def _create(deployment: Obj, old: list[Obj], replicas: int) -> Create:
    spec, where = deployment["spec"], meta(deployment)
    template = json.loads(json.dumps(spec["template"]))
    name = template_hash(template)
    labels = (template.setdefault("metadata", {}).get("labels") or {}) | {HASH: name}
    template["metadata"]["labels"] = labels
    selector = dict(spec["selector"])
    selector["matchLabels"] = (selector.get("matchLabels") or {}) | {HASH: name}
    number = 1 + max((revision(one) for one in old), default=0)
    metadata = {
        "name": f"{where['name']}-{name}",
        "namespace": where["namespace"],
        "labels": labels,
        "annotations": {REVISION: str(number)},
        "ownerReferences": [owner_reference(deployment)],
    }
    body = {"replicas": replicas, "selector": selector, "template": template,
            "minReadySeconds": spec.get("minReadySeconds", 0)}  # fmt: skip
    return Create("replicasets", {"apiVersion": "apps/v1", "kind": "ReplicaSet", "metadata": metadata, "spec": body})


def _status(deployment: Obj, new: Obj | None, owned: list[Obj], now: str) -> Obj:
    wanted = deployment["spec"].get("replicas", 1)
    counts = {key: sum((one.get("status") or {}).get(key) or 0 for one in owned)
              for key in ("replicas", "readyReplicas", "availableReplicas")}  # fmt: skip
    updated = ((new.get("status") or {}).get("replicas") or 0) if new else 0
    rolling = deployment["spec"]["strategy"].get("rollingUpdate") or {}
    least = wanted - resolve(rolling.get("maxUnavailable", 0), wanted, up=False)
    enough = counts["availableReplicas"] >= least
    done = updated == wanted == counts["availableReplicas"] == counts["replicas"]
    conditions = [
        _condition(deployment, "Available", enough, "MinimumReplicasAvailable" if enough else
                   "MinimumReplicasUnavailable", now),
        _condition(deployment, "Progressing", True, "NewReplicaSetAvailable" if done else "ReplicaSetUpdated", now),
    ]  # fmt: skip
    return {
        "observedGeneration": meta(deployment).get("generation", 1),
        "replicas": counts["replicas"] or None,
        "updatedReplicas": updated or None,
        "readyReplicas": counts["readyReplicas"] or None,
        "availableReplicas": counts["availableReplicas"] or None,
        "unavailableReplicas": max(wanted - counts["availableReplicas"], 0) or None,
        "conditions": conditions,
    }


def _condition(deployment: Obj, kind: str, holds: bool, reason: str, now: str) -> Obj:
    status = "True" if holds else "False"
    before = condition(deployment, kind) or {}
    same = before.get("status") == status
    unchanged = same and before.get("reason") == reason
    return {
        "type": kind,
        "status": status,
        "reason": reason,
        "message": before.get("message", "") if unchanged else f"{kind}: {reason}",
        "lastTransitionTime": before["lastTransitionTime"] if same else now,
        "lastUpdateTime": before["lastUpdateTime"] if unchanged else now,
    }
