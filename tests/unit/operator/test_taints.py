"""Whose node gets or loses the taint, and what is written: without an API server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from fimbria.operator.taints import (
    GRACE,
    AgentPod,
    Decision,
    NodeState,
    TaintKeeper,
    Wishes,
    agent_pod,
    decide,
    node_state,
    taint_patch,
)
from fimbria.sources.k8s.errors import Invalid
from fimbria.sources.k8s.types.core import Node, NodeSpec, NodeStatus, Pod, PodSpec, PodStatus, Taint
from fimbria.sources.k8s.types.meta import Condition, ObjectMeta, OwnerReference
from fimbria.tables.table import Table

KEY = "node.cilium.io/agent-not-ready"
ALL = Wishes(KEY, remove=True, set=True, network=True)
FRESH, WELL = NodeState((KEY,), ""), NodeState((), "False")


@pytest.mark.parametrize(
    ("wishes", "node", "ready", "silent", "expected"),
    [
        (ALL, FRESH, [True], 0.0, Decision(remove=True, network=True)),
        (ALL, FRESH, [False], 900.0, Decision()),
        (ALL, FRESH, [], 900.0, Decision()),
        (ALL, WELL, [True], 0.0, Decision()),
        (ALL, WELL, [False], 10.0, Decision(wait=GRACE - 10.0)),
        (ALL, WELL, [False], GRACE, Decision(add=True, wait=0.0)),
        (ALL, WELL, [], 900.0, Decision()),
        # A pod that is just being replaced: one of them is enough.
        (ALL, WELL, [False, True], 900.0, Decision()),
        (Wishes(KEY, remove=False, set=False, network=True), FRESH, [True], 0.0, Decision(network=True)),
        (Wishes(KEY, remove=True, set=False, network=False), WELL, [False], 900.0, Decision()),
    ],
)
def test_decisions(wishes: Wishes, node: NodeState, ready: list[bool], silent: float, expected: Decision) -> None:
    assert decide(wishes, node, ready, silent) == expected


def owner(**different: Any) -> OwnerReference:
    return OwnerReference(
        **{"api_version": "apps/v1", "kind": "DaemonSet", "name": "fimbria", "controller": True} | different
    )


OURS = ObjectMeta(owner_references=(owner(),))
READY = PodStatus(conditions=(Condition(type="Ready", status="True"),))


def node(*taints: str, version: str = "7", network: str = "") -> Node:
    conditions = (Condition(type="NetworkUnavailable", status=network),) if network else ()
    return Node(
        metadata=ObjectMeta(name="a", resource_version=version),
        spec=NodeSpec(taints=tuple(Taint(key=k, effect="NoSchedule") for k in taints)),
        status=NodeStatus(conditions=conditions),
    )


def apply(patch: list[dict[str, Any]], taints: list[str]) -> list[str]:
    """RFC 6902, as far as it is used here."""
    found = list(taints)
    for step in patch[1:]:
        if step["op"] == "remove":
            del found[int(step["path"].rpartition("/")[2])]
        elif step["path"].endswith("/-"):
            found.append(step["value"]["key"])
        else:
            found = [t["key"] for t in step["value"]]
    return found


@pytest.mark.parametrize("others", [[], ["x"], ["x", "y"]])
def test_patches_keep_the_taints_of_others(others: list[str]) -> None:
    for place in range(len(others) + 1):
        tainted = [*others[:place], KEY, *others[place:]]
        patch = taint_patch(node(*tainted), KEY, add=False)
        assert patch[0] == {"op": "test", "path": "/metadata/resourceVersion", "value": "7"}
        assert apply(patch, tainted) == others
    assert apply(taint_patch(node(*others), KEY, add=True), others) == [*others, KEY]
    twice = [KEY, *others, KEY]  # of two effects
    assert apply(taint_patch(node(*twice), KEY, add=False), twice) == others


def test_rows() -> None:
    assert node_state(node("x", KEY, network="True")) == NodeState(("x", KEY), "True")
    assert node_state(node(version="8")) == node_state(node(version="9"))  # a heartbeat is no change
    assert agent_pod(Pod(metadata=OURS, spec=PodSpec(node_name="a"), status=READY)) == AgentPod("a", True)
    assert agent_pod(Pod(metadata=OURS, spec=PodSpec(node_name="a"))) == AgentPod("a", False)
    assert agent_pod(Pod(metadata=OURS, status=READY)) is None
    ending = msgspec.structs.replace(OURS, deletion_timestamp="2026-01-01T00:00:00Z")
    assert agent_pod(Pod(metadata=ending, spec=PodSpec(node_name="a"), status=READY)) is None


@pytest.mark.parametrize(
    "owners",
    [
        None,
        (),
        (owner(controller=None),),
        (owner(controller=False),),
        (owner(kind="ReplicaSet"),),
        (owner(name="fimbria-other"),),
        (owner(api_version="apps.example.org/v1"),),
        (owner(controller=False), owner(kind="Job", name="x")),
    ],
)
def test_a_pod_with_the_agents_label_that_its_daemonset_didnt_make(owners: tuple[OwnerReference, ...] | None) -> None:
    """It is Ready, but whoever made it says nothing about the node."""
    labelled = ObjectMeta(name="x", labels={"k8s-app": "fimbria"}, owner_references=owners)
    assert agent_pod(Pod(metadata=labelled, spec=PodSpec(node_name="a"), status=READY)) is None


class Server:
    """One Node, as the API server keeps it: a patch that was decided on another version is refused."""

    def __init__(self, found: Node) -> None:
        self.found, self.patches, self.statuses, self.refuse = found, 0, 0, 0

    async def get(self, _resource: Any, _name: str) -> Node:
        return self.found

    async def patch(self, _resource: Any, _name: str, patch: list[dict[str, Any]], *, kind: str) -> None:
        assert kind == "json"
        if self.refuse:
            self.refuse -= 1
            raise Invalid("patch", 422, text="the test operation failed")
        self.patches += 1
        self.found = node(*apply(patch, [t.key for t in self.found.spec.taints or ()]), network="False")

    async def patch_status(self, _resource: Any, _name: str, status: Any, *, kind: str) -> None:
        assert kind == "strategic" and status["conditions"][0]["status"] == "False"
        self.statuses += 1


async def until(check: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not check():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.01)


async def test_a_node_from_its_first_moment_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fimbria.sources.k8s.retries.RETRY", 0.01)
    nodes: Table[str, NodeState] = Table("nodes")
    pods: Table[tuple[str, str], AgentPod] = Table("pods")
    pods.add_index("node", lambda p: (p.node,))
    server, now = Server(node(KEY, "x")), 1000.0
    keeper = TaintKeeper(server, ALL, nodes, pods, clock=lambda: now)  # type: ignore[arg-type]
    task = asyncio.create_task(keeper.run())
    nodes.upsert("a", node_state(server.found))
    pods.upsert(("kube-system", "p"), AgentPod("a", False))
    for table in (nodes, pods):
        table.mark_synced()
    await asyncio.sleep(0.05)
    assert (server.patches, server.statuses) == (0, 0)

    server.refuse = 2  # somebody else wrote the Node
    pods.upsert(("kube-system", "p"), AgentPod("a", True))
    await until(lambda: server.patches > 0)
    assert server.patches == 1 and [t.key for t in server.found.spec.taints or ()] == ["x"]
    nodes.upsert("a", node_state(server.found))

    pods.upsert(("kube-system", "p"), AgentPod("a", False))
    await asyncio.sleep(0.05)
    assert server.patches == 1
    now += GRACE
    pods.upsert(("kube-system", "q"), AgentPod("a", False))
    await until(lambda: server.patches > 1)
    assert server.patches == 2 and [t.key for t in server.found.spec.taints or ()] == ["x", KEY]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_node_that_stays_refused_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A webhook that denies looks like somebody else's write: only at first."""
    monkeypatch.setattr("fimbria.sources.k8s.retries.RETRY", 0.001)
    nodes: Table[str, NodeState] = Table("nodes")
    pods: Table[tuple[str, str], AgentPod] = Table("pods")
    pods.add_index("node", lambda p: (p.node,))
    server = Server(node(KEY))
    server.refuse = 6
    nodes.upsert("a", node_state(server.found))
    pods.upsert(("kube-system", "p"), AgentPod("a", True))
    for table in (nodes, pods):
        table.mark_synced()
    task = asyncio.create_task(TaintKeeper(server, ALL, nodes, pods).run())  # type: ignore[arg-type]
    try:
        async with asyncio.timeout(10):
            while not server.patches:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
    finally:
        task.cancel()
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
        "Node a is not up to date: patch: 422: the test operation failed"
    ]
    assert not server.refuse
