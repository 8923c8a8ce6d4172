"""A small scheduler: which node an unassigned pod gets. Pure.

Honours nodeSelector, required node affinity, taints, unschedulable and unready nodes, required pod affinity and
anti-affinity, host ports and the node's pod limit; then spreads by owner and by load. Preferences are ignored.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fimbria.lab.apiserver.controllers.actions import (
    Action,
    Bind,
    Obj,
    condition,
    is_active,
    is_terminating,
    is_true,
    meta,
    owner,
    status_patch,
)
from fimbria.lab.apiserver.selectors import match_expression, match_label_selector

REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
DEFAULT_PODS = 110


def plan(pods: list[Obj], nodes: list[Obj], now: str) -> list[Action]:
    """Binds every pod that waits for the default scheduler and fits somewhere; tells the others why not."""
    placed: dict[str, list[Obj]] = {meta(node)["name"]: [] for node in nodes}
    waiting: list[Obj] = []
    for pod in pods:
        node = pod["spec"].get("nodeName")
        if node:
            if is_active(pod) or is_terminating(pod):
                placed.setdefault(node, []).append(pod)
        elif is_active(pod) and pod["spec"].get("schedulerName", "default-scheduler") == "default-scheduler":
            waiting.append(pod)
    actions: list[Action] = []
    for pod in sorted(waiting, key=lambda one: (meta(one)["creationTimestamp"], meta(one)["name"])):
        if pod["spec"].get("schedulingGates"):
            continue
        name = choose(pod, nodes, placed)
        if name:
            placed[name].append(pod | {"spec": pod["spec"] | {"nodeName": name}})
            actions.append(Bind(meta(pod)["namespace"], meta(pod)["name"], name, meta(pod)["uid"]))
        else:
            actions += _unschedulable(pod, len(nodes), now)
    return actions


def choose(pod: Obj, nodes: list[Obj], placed: dict[str, list[Obj]]) -> str | None:
    """The least loaded node that fits, counting pods of the same owner first."""
    fitting = [node for node in nodes if fits(pod, node) and _has_room(pod, node, placed[meta(node)["name"]])]
    fitting = [node for node in fitting if _affine(pod, node, nodes, placed)]
    if not fitting:
        return None
    mine = (owner(pod) or {}).get("uid")

    def score(node: Obj) -> tuple[int, int, str]:
        there = placed[meta(node)["name"]]
        same = sum((owner(one) or {}).get("uid") == mine for one in there) if mine else 0
        return same, len(there), str(meta(node)["name"])

    return str(meta(min(fitting, key=score))["name"])


def fits(pod: Obj, node: Obj) -> bool:
    """Whether the node itself suits the pod, whatever else runs there."""
    if node["spec"].get("unschedulable") and not _tolerates(pod, _taint("node.kubernetes.io/unschedulable")):
        return False
    if not is_true(node, "Ready") and not _tolerates(pod, _taint("node.kubernetes.io/not-ready")):
        return False
    return matches_node(pod["spec"], node) and not any(
        taint["effect"] in ("NoSchedule", "NoExecute") and not _tolerates(pod, taint)
        for taint in node["spec"].get("taints") or []
    )


def _taint(key: str) -> Obj:
    return {"key": key, "effect": "NoSchedule"}


def matches_node(spec: Obj, node: Obj) -> bool:
    """nodeSelector and required node affinity."""
    labels = meta(node).get("labels") or {}
    if any(labels.get(key) != value for key, value in (spec.get("nodeSelector") or {}).items()):
        return False
    required = ((spec.get("affinity") or {}).get("nodeAffinity") or {}).get(REQUIRED)
    if not required:
        return True
    fields = {"metadata.name": meta(node)["name"]}
    return any(
        (term.get("matchExpressions") or term.get("matchFields"))
        and all(match_expression(one, labels) for one in term.get("matchExpressions") or [])
        and all(match_expression(one, fields) for one in term.get("matchFields") or [])
        for term in required.get("nodeSelectorTerms") or []
    )


def _tolerates(pod: Obj, taint: Obj) -> bool:
    for one in pod["spec"].get("tolerations") or []:
        if one.get("effect") and one["effect"] != taint["effect"]:
            continue
        exists = one.get("operator") == "Exists"
        if not one.get("key") and exists:
            return True
        if one.get("key") == taint["key"] and (exists or one.get("value", "") == taint.get("value", "")):
            return True
    return False


def _has_room(pod: Obj, node: Obj, there: list[Obj]) -> bool:
    limit = int(((node.get("status") or {}).get("allocatable") or {}).get("pods", DEFAULT_PODS))
    used = {port for one in there for port in _host_ports(one)}
    return len(there) < limit and not used & set(_host_ports(pod))


def _host_ports(pod: Obj) -> Iterable[tuple[str, int]]:
    for container in pod["spec"].get("containers") or []:
        for port in container.get("ports") or []:
            if port.get("hostPort"):
                yield port.get("protocol", "TCP"), port["hostPort"]


def _affine(pod: Obj, node: Obj, nodes: list[Obj], placed: dict[str, list[Obj]]) -> bool:
    affinity = pod["spec"].get("affinity") or {}
    attracts = (affinity.get("podAffinity") or {}).get(REQUIRED) or []
    repels = (affinity.get("podAntiAffinity") or {}).get(REQUIRED) or []
    for term in attracts:
        if not _in_domain(pod, term, node, nodes, placed) and not _bootstraps(pod, term, placed):
            return False
    if any(_in_domain(pod, term, node, nodes, placed) for term in repels):
        return False
    # what already runs may refuse this pod's company as well
    for other in (one for pods in placed.values() for one in pods):
        terms = ((other["spec"].get("affinity") or {}).get("podAntiAffinity") or {}).get(REQUIRED) or []
        for term in terms:
            if _selected(term, other, pod) and _shares(term["topologyKey"], node, other, nodes):
                return False
    return True


def _bootstraps(pod: Obj, term: Obj, placed: dict[str, list[Obj]]) -> bool:
    """The first pod of a group that wants its own company may go anywhere."""
    others = (one for pods in placed.values() for one in pods)
    return _selected(term, pod, pod) and not any(_selected(term, pod, one) for one in others)


def _in_domain(pod: Obj, term: Obj, node: Obj, nodes: list[Obj], placed: dict[str, list[Obj]]) -> bool:
    others = (one for pods in placed.values() for one in pods if _selected(term, pod, one))
    return any(_shares(term["topologyKey"], node, one, nodes) for one in others)


def _selected(term: Obj, holder: Obj, other: Obj) -> bool:
    namespaces = term.get("namespaces") or [meta(holder)["namespace"]]
    return meta(other)["namespace"] in namespaces and match_label_selector(
        term.get("labelSelector"), meta(other).get("labels") or {}
    )


def _shares(key: str, node: Obj, pod: Obj, nodes: list[Obj]) -> bool:
    there = next((one for one in nodes if meta(one)["name"] == pod["spec"].get("nodeName")), None)
    mine = _domain(node, key)
    return there is not None and mine is not None and mine == _domain(there, key)


def _domain(node: Obj, key: str) -> Any:
    fallback = meta(node)["name"] if key == "kubernetes.io/hostname" else None
    return (meta(node).get("labels") or {}).get(key, fallback)


def _unschedulable(pod: Obj, nodes: int, now: str) -> list[Action]:
    message = f"0/{nodes} nodes are available for this pod"
    before = condition(pod, "PodScheduled") or {}
    if before.get("reason") == "Unschedulable" and before.get("message") == message:
        return []
    fresh = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message,
             "lastTransitionTime": before.get("lastTransitionTime") or now}  # fmt: skip
    others = [one for one in (pod.get("status") or {}).get("conditions") or [] if one["type"] != "PodScheduled"]
    return status_patch("pods", pod, {"conditions": [*others, fresh]})
