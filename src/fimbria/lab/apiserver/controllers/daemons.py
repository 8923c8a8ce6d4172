"""DaemonSets: one pod on every node that suits. Pure."""

from __future__ import annotations

import json
from datetime import datetime

from fimbria.lab.apiserver.controllers import schedule
from fimbria.lab.apiserver.controllers.actions import (
    Action,
    Create,
    Delete,
    Obj,
    is_active,
    is_ready,
    is_terminating,
    meta,
    pod_from_template,
    status_patch,
)
from fimbria.lab.apiserver.controllers.deployments import resolve, template_hash
from fimbria.lab.apiserver.controllers.replicas import is_available

HASH = "controller-revision-hash"
_TOLERATED = (
    ("not-ready", "NoExecute"),
    ("unreachable", "NoExecute"),
    ("not-ready", "NoSchedule"),
    ("disk-pressure", "NoSchedule"),
    ("memory-pressure", "NoSchedule"),
    ("pid-pressure", "NoSchedule"),
    ("unschedulable", "NoSchedule"),
    ("network-unavailable", "NoSchedule"),
)


def plan(daemon_set: Obj, pods: list[Obj], nodes: list[Obj], now: datetime) -> list[Action]:
    """What a DaemonSet needs, given the pods it owns and all nodes."""
    by_node: dict[str, list[Obj]] = {}
    for pod in pods:
        by_node.setdefault(target_node(pod), []).append(pod)
    sample = _pod(daemon_set, "")
    sample["spec"].pop("affinity", None)
    if template_affinity := daemon_set["spec"]["template"]["spec"].get("affinity"):
        sample["spec"]["affinity"] = template_affinity
    wanted = [meta(node)["name"] for node in nodes if schedule.fits(sample, node)]
    name = template_hash(daemon_set["spec"]["template"])
    actions = status_patch("daemonsets", daemon_set, _status(daemon_set, by_node, wanted, name, now))
    if is_terminating(daemon_set):
        return actions
    doomed = [pod for node, there in by_node.items() for pod in _surplus(there, node in wanted)]
    actions += [Create("pods", _pod(daemon_set, node)) for node in wanted if not by_node.get(node)]
    doomed += _outdated(daemon_set, by_node, wanted, name, now)
    return actions + [Delete("pods", meta(pod)["namespace"], meta(pod)["name"], meta(pod)["uid"]) for pod in doomed]


def target_node(pod: Obj) -> str:
    """The node a daemon pod is on or is meant for."""
    if pod["spec"].get("nodeName"):
        return str(pod["spec"]["nodeName"])
    required = ((pod["spec"].get("affinity") or {}).get("nodeAffinity") or {}).get(schedule.REQUIRED) or {}
    for term in required.get("nodeSelectorTerms") or []:
        for field in term.get("matchFields") or []:
            if field["key"] == "metadata.name":
                return str(field["values"][0])
    return ""


def _surplus(there: list[Obj], wanted: bool) -> list[Obj]:
    active = [pod for pod in there if not is_terminating(pod)]
    if not wanted:
        return active
    failed = [pod for pod in active if not is_active(pod)]
    living = sorted((pod for pod in active if is_active(pod)), key=lambda pod: str(meta(pod)["creationTimestamp"]))
    return failed + living[1:]


def _outdated(daemon_set: Obj, by_node: dict[str, list[Obj]], wanted: list[str], name: str, now: datetime) -> list[Obj]:
    """Pods of an older template that may go now: those that don't serve, then as many as may be unavailable."""
    update = daemon_set["spec"].get("updateStrategy") or {}
    if update.get("type") != "RollingUpdate":
        return []
    allowed = resolve((update.get("rollingUpdate") or {}).get("maxUnavailable", 1), len(wanted), up=True)
    seconds = daemon_set["spec"].get("minReadySeconds", 0)
    old: list[Obj] = []
    for node in wanted:
        living = [pod for pod in by_node.get(node, []) if is_active(pod)]
        if not any(is_available(pod, seconds, now) for pod in living):
            allowed -= 1
            old += [pod for pod in living if (meta(pod).get("labels") or {}).get(HASH) != name and not is_ready(pod)]
    if old:
        return old
    candidates = [pod for node in wanted for pod in by_node.get(node, [])
                  if is_active(pod) and (meta(pod).get("labels") or {}).get(HASH) != name]  # fmt: skip
    return candidates[: max(allowed, 0)]


def _pod(daemon_set: Obj, node: str) -> Obj:
    template = json.loads(json.dumps(daemon_set["spec"]["template"]))
    pod = pod_from_template(daemon_set, template, {HASH: template_hash(daemon_set["spec"]["template"])})
    spec = pod["spec"]
    keys = [(f"node.kubernetes.io/{key}", effect) for key, effect in _TOLERATED]
    spec["tolerations"] = [*(spec.get("tolerations") or []), *(
        {"key": key, "operator": "Exists", "effect": effect} for key, effect in keys)]  # fmt: skip
    field = {"key": "metadata.name", "operator": "In", "values": [node]}
    affinity = spec.setdefault("affinity", {}).setdefault("nodeAffinity", {})
    terms = (affinity.get(schedule.REQUIRED) or {}).get("nodeSelectorTerms") or [{}]
    affinity[schedule.REQUIRED] = {"nodeSelectorTerms": [term | {"matchFields": [field]} for term in terms]}
    return pod


def _status(daemon_set: Obj, by_node: dict[str, list[Obj]], wanted: list[str], name: str, now: datetime) -> Obj:
    seconds = daemon_set["spec"].get("minReadySeconds", 0)
    living = {node: [pod for pod in there if is_active(pod)] for node, there in by_node.items()}
    right = [living[node][0] for node in wanted if living.get(node)]
    available = sum(is_available(pod, seconds, now) for pod in right)
    return {
        "currentNumberScheduled": len(right),
        "desiredNumberScheduled": len(wanted),
        "numberMisscheduled": sum(bool(there) and node not in wanted for node, there in living.items()),
        "numberReady": sum(is_ready(pod) for pod in right),
        "updatedNumberScheduled": sum((meta(pod).get("labels") or {}).get(HASH) == name for pod in right) or None,
        "numberAvailable": available or None,
        "numberUnavailable": (len(wanted) - available) or None,
        "observedGeneration": meta(daemon_set).get("generation", 1),
    }
