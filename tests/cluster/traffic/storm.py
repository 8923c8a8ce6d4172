"""Pods that nobody needs, in numbers, and what their node's agent said about them."""

from __future__ import annotations

import json
import re
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tests.cluster.bed import Cluster
from tests.cluster.bed.layout import PAUSE_IMAGE

REPOSITORY: Final = Path(__file__).resolve().parents[3]
WATCHED: Final[Mapping[str, tuple[str, str]]] = {
    "scheduled until its sandbox is ready": ("scheduled", "sandbox"),
    "sandbox until its containers run": ("sandbox", "started"),
    "containers until Ready": ("started", "ready"),
    "scheduled until Ready": ("scheduled", "ready"),
    "removed until gone": ("removed", "gone"),
}


Lines = list[dict[str, Any]]


def pods(namespace: str, node: str, count: int, *, tag: str = "storm", labels_each: bool = False) -> Lines:
    """Manifests of pods that do nothing; with a label that makes each an identity of its own if `labels_each`."""
    spec = {
        "nodeName": node, "terminationGracePeriodSeconds": 1, "enableServiceLinks": False,
        "automountServiceAccountToken": False, "tolerations": [{"operator": "Exists"}],
        "containers": [{"name": "main", "image": PAUSE_IMAGE, "imagePullPolicy": "Never"}],
    }  # fmt: skip
    return [
        {"apiVersion": "v1", "kind": "Pod", "spec": spec,
         "metadata": {"name": f"{tag}-{i}", "namespace": namespace,
                      "labels": {"app": tag} | ({"each": f"{tag}-{i}"} if labels_each else {})}}
        for i in range(count)
    ]  # fmt: skip


def run(cluster: Cluster, manifests: Lines, mode: str, *, pause: float = 0.0, patience: float = 240) -> Lines:
    """Makes and removes them as podtimes.py says; its lines. Raises BedError."""
    order = {"pods": manifests, "mode": mode, "pause": pause, "remove": True, "patience": patience}
    command = ["env", f"PYTHONPATH={REPOSITORY}", sys.executable, "-m", "tests.cluster.traffic.podtimes"]
    command.append(str(cluster.layout.kubeconfig))
    out = cluster.control(command, stdin=json.dumps(order) + "\n", seconds=3 * patience)
    return [json.loads(line) for line in out.splitlines()]


def metrics(cluster: Cluster, node: str) -> str:
    """Of the node's agent, as Prometheus reads them. Raises BedError."""
    return cluster.node(node).exec(
        ["curl", "-sf", "--unix-socket", "/run/fimbria/agent.sock", "http://agent/v1/metrics"]
    )


def requests(text: str) -> dict[tuple[str, str], int]:
    """CNI requests so far, by command and code, from metrics."""
    found = {}
    for labels, value in re.findall(r"^fimbria_cni_requests_total\{([^}]*)\} (\S+)", text, re.MULTILINE):
        named = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        found[named["command"], named["code"]] = int(float(value))
    return found


def seconds(text: str, command: str) -> float:
    """Time spent in requests of a kind so far, from metrics."""
    found = re.search(rf'^fimbria_cni_seconds_total\{{[^}}]*command="{command}"[^}}]*\}} (\S+)', text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def spans(lines: Lines, phases: Mapping[str, tuple[str, str]] = WATCHED) -> dict[str, list[float]]:
    """Seconds of each phase, of the pods that went through it."""
    found: dict[str, list[float]] = {name: [] for name in phases}
    for line in lines:
        for name, (begin, end) in phases.items():
            if line[begin] is not None and line[end] is not None:
                found[name].append(line[end] - line[begin])
    return found


def table(found: Mapping[str, Sequence[float]]) -> str:
    """Median and 99th percentile of each phase, for people."""
    lines = [f"{'phase':45} {'pods':>5} {'median':>9} {'p99':>9}"]
    for name, values in found.items():
        if values:
            tail = sorted(values)[max(0, -(-99 * len(values) // 100) - 1)]
            lines.append(f"{name:45} {len(values):5} {statistics.median(values):7.2f} s {tail:7.2f} s")
    return "\n".join(lines)


def identities(cluster: Cluster, namespace: str, key: str) -> dict[str, list[str]]:
    """Names of CiliumIdentities by the value of one of their labels, of pods of one namespace."""
    found: dict[str, list[str]] = {}
    for one in cluster.get("ciliumidentities.cilium.io")["items"]:
        labels = one["security-labels"]
        if labels.get("k8s:io.kubernetes.pod.namespace") == namespace and f"k8s:{key}" in labels:
            found.setdefault(labels[f"k8s:{key}"], []).append(one["metadata"]["name"])
    return found


def wait_gone(cluster: Cluster, node: str, before: int, patience: float = 60) -> int:
    """Until the agent of a node has no more endpoints than before; how many it has."""
    deadline = time.monotonic() + patience
    while True:
        found = re.search(r"^fimbria_endpoints (\S+)", metrics(cluster, node), re.MULTILINE)
        count = int(float(found[1])) if found else -1
        if count <= before or time.monotonic() > deadline:
            return count
        time.sleep(0.5)
