"""Installs Fimbria by its chart, and the cluster's DNS, and waits until pods on every node get answers."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.cluster.addons.manifests import coredns
from tests.cluster.bed import processes
from tests.cluster.bed.errors import BedError
from tests.cluster.bed.layout import API_ADDRESS, API_PORT, NODE_CGROUP2, REPOSITORY
from tests.cluster.bed.progress import step
from tests.cluster.images.recipes import recipes

if TYPE_CHECKING:
    from tests.cluster.bed.cluster import Cluster

CHART = REPOSITORY / "deploy" / "fimbria"
IMAGE, RELEASE, NAMESPACE = "fimbria", "fimbria", "kube-system"
ROLLOUT_SECONDS = 180.0


def values(image: Path) -> dict[str, Any]:
    """What the chart is told on a bed. Pods are replaced when the image is another one: its tag stays the same."""
    mark = {"fimbria.invalid/image": image.name}
    return {
        "k8sServiceHost": API_ADDRESS,
        "k8sServicePort": API_PORT,
        "ipv6": {"enabled": True},
        "cgroup": {"autoMount": {"enabled": False}, "hostRoot": NODE_CGROUP2},
        "podAnnotations": mark,
        "operator": {"podAnnotations": mark},
    }


def merged(base: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """As Helm merges values: maps by key, all else replaced."""
    result = dict(base)
    for key, value in more.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def fimbria(cluster: Cluster, image: Path, more: Mapping[str, Any], chart: Path = CHART) -> None:
    """Installs or upgrades, and waits until agents and operators are ready and nodes take pods. Raises BedError."""
    told = merged(values(image), more)
    file = cluster.layout.state / "values.json"
    file.write_text(json.dumps(told, indent=1))
    with step("chart installed"):
        cluster.helm("upgrade", "--install", RELEASE, str(chart), "--namespace", NAMESPACE, "--values", str(file))
    with step("agents and operators ready"):
        wait_rollout(cluster, "daemonset/fimbria", "deployment/fimbria-operator")
    with step("nodes ready"):
        processes.wait("nodes", lambda: not unready(cluster), 60, lambda: f": {'; '.join(unready(cluster))}", pause=0.3)


def dns(cluster: Cluster) -> None:
    """The cluster's DNS; returns when a pod on each node gets an answer from it."""
    with step("cluster DNS ready"):
        cluster.kubectl("apply", "-f", "-", stdin=coredns())
        wait_rollout(cluster, "deployment/coredns")
    with step("names resolve in pods on every node"):
        _ask_from_pods(cluster)


def wait_rollout(cluster: Cluster, *workloads: str, seconds: float = ROLLOUT_SECONDS) -> None:
    """Raises BedError with the state of the pods when time is up."""
    deadline = time.monotonic() + seconds
    for workload in workloads:
        left = max(1, round(deadline - time.monotonic()))
        try:
            cluster.kubectl("-n", NAMESPACE, "rollout", "status", workload, f"--timeout={left}s", seconds=left + 30)
        except BedError as error:
            raise BedError(f"{workload}: {error}\n{_state(cluster)}") from None


def unready(cluster: Cluster) -> list[str]:
    """What nodes still lack, in words."""
    found = []
    for node in cluster.get("nodes")["items"]:
        name = node["metadata"]["name"]
        if not any(c["type"] == "Ready" and c["status"] == "True" for c in node["status"]["conditions"]):
            found.append(f"{name} isn't Ready")
        # Kubernetes' own go a moment after the node is Ready: who asks for pods before gets them all on one node.
        taints = [t["key"] for t in node["spec"].get("taints", []) if t["effect"] == "NoSchedule"]
        found += [f"{name} still has the taint {key}" for key in taints]
    return found


def dns_ready(cluster: Cluster) -> bool:
    """Raises BedError if it was never installed."""
    return bool(cluster.get("-n", NAMESPACE, "deployment", "coredns")["status"].get("readyReplicas"))


def _ask_from_pods(cluster: Cluster) -> None:
    names = {f"bed-dns-{node}": node for node in _node_names(cluster)}
    pods = [_asking_pod(name, node) for name, node in names.items()]
    cluster.kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": pods}))
    try:
        phases: dict[str, str] = {}

        def answered() -> bool:
            items = cluster.get("pods", "-n", NAMESPACE, "-l", "app=bed-dns")["items"]
            phases.update({p["metadata"]["name"]: p["status"].get("phase", "") for p in items})
            return all(phases.get(name) == "Succeeded" for name in names)

        processes.wait("names in pods", answered, 60, lambda: f": {phases}\n{_state(cluster)}", pause=0.3)
    finally:
        cluster.kubectl("-n", NAMESPACE, "delete", "pod", "-l", "app=bed-dns", "--wait=false", "--grace-period=0")


def _asking_pod(name: str, node: str) -> dict[str, Any]:
    (image, *_) = recipes()["agnhost"].references
    question = "dig +short +timeout=1 +tries=1 kubernetes.default.svc.cluster.local"
    ask = f"until {question} | grep -qx 10.96.0.1; do sleep 0.2; done"
    container = {"name": "ask", "image": image, "command": ["bash", "-c", ask], "imagePullPolicy": "IfNotPresent"}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": NAMESPACE, "labels": {"app": "bed-dns"}},
        "spec": {
            "nodeName": node,
            "restartPolicy": "Never",
            "containers": [container],
            "terminationGracePeriodSeconds": 0,
        },
    }


def _node_names(cluster: Cluster) -> Sequence[str]:
    return [node["metadata"]["name"] for node in cluster.get("nodes")["items"]]


def _state(cluster: Cluster) -> str:
    """The pods, and the last words of those that aren't ready."""
    said = [cluster.kubectl("-n", NAMESPACE, "get", "pods", "-o", "wide")]
    for pod in cluster.get("-n", NAMESPACE, "pods")["items"]:
        name, statuses = pod["metadata"]["name"], pod["status"].get("containerStatuses", [])
        for container in (one["name"] for one in statuses if not one["ready"]):
            with contextlib.suppress(BedError):  # it never ran
                said.append(f"--- {name} {container}:\n{_last_words(cluster, name, container)}")
    return "\n".join(said)


def _last_words(cluster: Cluster, pod: str, container: str) -> str:
    logs = ("-n", NAMESPACE, "logs", pod, "-c", container, "--tail=12")
    try:
        return cluster.kubectl(*logs, "--previous")
    except BedError:
        return cluster.kubectl(*logs)
