"""The operator's leader dies, and both operators die: pods start all the while, nodes that join wait a moment at most,
and agents go on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from tests.cluster.bed import Cluster
from tests.cluster.bed.install import NAMESPACE, unready
from tests.cluster.traffic import storm
from tests.cluster.traffic.release import OPERATORS, Release

pytestmark = pytest.mark.timeout(600)
LEASE = "fimbria-operator"
TAKEN_OVER = 30.0  # seconds: the lease lasts 15, the next candidate looks every 2; the rest is a busy machine
PODS = 6


@pytest.fixture
def release(cluster: Cluster) -> Iterator[Release]:
    release = Release(cluster)
    release.wait()
    yield release
    release.wait()


def leader(cluster: Cluster) -> dict[str, Any]:
    """The lease's specification. Nobody may hold it."""
    return dict(cluster.get("lease", "-n", NAMESPACE, LEASE)["spec"])


def leading_pod(cluster: Cluster) -> dict[str, Any]:
    """The pod of who holds the lease: operators call themselves by their node, and no two share one."""
    node, _, _ = str(leader(cluster)["holderIdentity"]).rpartition("_")
    found = [p for p in _operators(cluster) if p["spec"].get("nodeName") == node]
    assert len(found) == 1, (node, [p["metadata"]["name"] for p in _operators(cluster)])
    return dict(found[0])


def wait_taken_over(cluster: Cluster, before: dict[str, Any]) -> float:
    """Seconds until somebody else holds the lease, or the same one anew."""
    began = time.monotonic()
    while True:
        now = leader(cluster)
        if now.get("holderIdentity") and now["acquireTime"] != before["acquireTime"]:
            return time.monotonic() - began
        assert time.monotonic() - began < TAKEN_OVER, (before, now)
        time.sleep(0.2)


def pods_start(cluster: Cluster, namespace: str, tag: str) -> None:
    """Of labels that are new to the cluster, on both nodes, at the first attempt."""
    nodes = ("node1", "node2")
    pods = [p for n in nodes for p in storm.pods(namespace, n, PODS // 2, tag=f"{tag}-{n}", labels_each=True)]
    lines = storm.run(cluster, pods, "once", patience=60)
    print(storm.table(storm.spans(lines)))
    assert [line["name"] for line in lines if line["ready"] is None or line["refusals"]] == []


def wait_ready(cluster: Cluster, node: str, patience: float) -> float:
    """Seconds until a node is Ready and takes pods."""
    began = time.monotonic()
    while any(text.startswith(f"{node} ") for text in unready(cluster)):
        assert time.monotonic() - began < patience, unready(cluster)
        time.sleep(0.3)
    return time.monotonic() - began


def forget(cluster: Cluster, node: str) -> None:
    """Removes a node that a test has added, and waits for its agent's pod to go with it."""
    cluster.remove_node(node)
    cluster.kubectl("delete", "node", node, "--ignore-not-found")
    Release.until(lambda: node not in Release(cluster).agents(), 120, f"the agent of {node} is gone")


def test_leader_killed(cluster: Cluster, namespace: str, release: Release) -> None:
    """SIGKILL: its lease must run out. Pods don't wait for that."""
    before, pod = leader(cluster), leading_pod(cluster)
    node = pod["spec"]["nodeName"]
    cluster.node(node).exec(["kill", "-9", str(release.process(node, "operator"))])
    pods_start(cluster, namespace, "killed")
    print(f"taken over {wait_taken_over(cluster, before):.1f} s after pods had started")


@pytest.mark.long
def test_leader_deleted(cluster: Cluster, namespace: str, release: Release) -> None:
    """In good order: the lease is given up, and the other one has it at once."""
    before, pod = leader(cluster), leading_pod(cluster)
    cluster.kubectl("-n", NAMESPACE, "delete", "pod", pod["metadata"]["name"], "--wait=false")
    took = wait_taken_over(cluster, before)
    print(f"taken over after {took:.1f} s")
    pods_start(cluster, namespace, "deleted")
    assert took < 10


@pytest.mark.long
def test_node_joins_while_the_leader_dies(cluster: Cluster, release: Release) -> None:
    before, pod = leader(cluster), leading_pod(cluster)
    at = pod["spec"]["nodeName"]
    cluster.node(at).exec(["kill", "-9", str(release.process(at, "operator"))])
    name = cluster.add_node().name
    try:
        took = wait_ready(cluster, name, 120)
        print(f"{name} is Ready {took:.1f} s after it was registered; taken over {leader(cluster)['acquireTime']}")
        assert leader(cluster)["acquireTime"] != before["acquireTime"]
    finally:
        forget(cluster, name)


@pytest.mark.long
def test_no_operator(cluster: Cluster, namespace: str, release: Release) -> None:
    """Agents go on without: pods start, of labels new to the cluster, too. A node that joins waits for an operator."""
    cluster.kubectl("-n", NAMESPACE, "scale", OPERATORS, "--replicas=0")
    name = ""
    try:
        Release.until(lambda: not _operators(cluster), 60, "operators are gone")
        for number in range(2):
            pods_start(cluster, namespace, f"nobody-{number}")
        name = cluster.add_node().name
        time.sleep(10)
        assert any(text.startswith(f"{name} ") for text in unready(cluster)), "somebody gave it pod addresses"
    finally:
        cluster.kubectl("-n", NAMESPACE, "scale", OPERATORS, "--replicas=2")
        if name:
            took = wait_ready(cluster, name, 120)
            forget(cluster, name)
    print(f"{name} was Ready {took:.1f} s after operators were asked for")


def _operators(cluster: Cluster) -> list[Any]:
    return list(cluster.get("pods", "-n", NAMESPACE, "-l", "app.kubernetes.io/name=fimbria-operator")["items"])
