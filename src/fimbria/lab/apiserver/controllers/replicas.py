"""ReplicaSets: as many active pods as asked for. Pure."""

from __future__ import annotations

from datetime import datetime, timedelta

from fimbria.lab.apiserver.columns import parse_time
from fimbria.lab.apiserver.controllers.actions import (
    Action,
    Create,
    Delete,
    Obj,
    condition,
    is_active,
    is_ready,
    is_terminating,
    meta,
    pod_from_template,
    status_patch,
)

BURST = 500


def plan(replica_set: Obj, pods: list[Obj], now: datetime) -> list[Action]:
    """What a ReplicaSet needs, given the pods it owns."""
    active = [pod for pod in pods if is_active(pod)]
    actions = status_patch("replicasets", replica_set, _status(replica_set, active, now))
    if is_terminating(replica_set):
        return actions
    wanted = replica_set["spec"].get("replicas", 1)
    for _ in range(min(wanted - len(active), BURST)):
        actions.append(Create("pods", pod_from_template(replica_set, replica_set["spec"]["template"], {})))
    if len(active) > wanted:
        victims = sorted(active, key=_dispensability)[: len(active) - wanted]
        actions += [Delete("pods", meta(pod)["namespace"], meta(pod)["name"], meta(pod)["uid"]) for pod in victims]
    return actions


def _dispensability(pod: Obj) -> tuple[bool, bool, bool, list[int]]:
    """Sorts first what hurts least to lose: unassigned, not running, not ready, young."""
    running = (pod.get("status") or {}).get("phase") == "Running"
    age = [-ord(letter) for letter in meta(pod)["creationTimestamp"]]
    return bool(pod["spec"].get("nodeName")), running, is_ready(pod), age


def is_available(pod: Obj, seconds: int, now: datetime) -> bool:
    """Ready for at least ``seconds``."""
    ready = condition(pod, "Ready")
    if not ready or ready.get("status") != "True":
        return False
    since = parse_time(ready.get("lastTransitionTime") or "")
    return not seconds or (since is not None and since + timedelta(seconds=seconds) <= now)


def _status(replica_set: Obj, active: list[Obj], now: datetime) -> Obj:
    labels = (replica_set["spec"]["template"].get("metadata") or {}).get("labels") or {}
    seconds = replica_set["spec"].get("minReadySeconds", 0)
    return {
        "replicas": len(active),
        "fullyLabeledReplicas": sum(labels.items() <= (meta(pod).get("labels") or {}).items() for pod in active)
        or None,
        "readyReplicas": sum(is_ready(pod) for pod in active) or None,
        "availableReplicas": sum(is_available(pod, seconds, now) for pod in active) or None,
        "observedGeneration": meta(replica_set).get("generation", 1),
    }
