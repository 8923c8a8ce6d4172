"""Keeps pods away from nodes whose agent isn't ready, by a taint; and says so in the Node's conditions.

Rules
1. A node whose agent's pod is Ready loses the taint, which kubelet gave it when it registered, and its condition
   NetworkUnavailable becomes False. Ready means that the node forwards (see the agent's probes).
2. A node whose agent's pod is there but hasn't been Ready for GRACE seconds gets the taint (again), after a reboot say,
   for kubelet registers taints only once. Pods that run there stay; that is why the effect is NoSchedule. An upgrade is
   over sooner.
3. A node without an agent's pod is left alone: nobody wants one there, or it is just being replaced.
4. A pod counts as the agent's if the agents' DaemonSet made it: its label may be given by anybody who may make pods
   there.
5. Time is measured from when we first saw it, on our own clock. A new leader begins anew.
6. Every write is guarded by what it was decided on, so that no taint of somebody else is lost.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from fimbria.sources.k8s.client import ApiClient
from fimbria.sources.k8s.errors import ApiError, Conflict, Invalid, NotFound
from fimbria.sources.k8s.resources import NODES
from fimbria.sources.k8s.retries import Retries
from fimbria.sources.k8s.timestamps import to_time
from fimbria.sources.k8s.types.core import Node, Pod
from fimbria.sources.k8s.types.meta import Condition
from fimbria.tables.table import Signal, Table

log = logging.getLogger(__name__)
AGENT_PODS: Final = "k8s-app=fimbria"
AGENTS: Final = ("apps", "DaemonSet", "fimbria")
GRACE: Final = 60.0
RACES: Final = 3  # refusals in a row that are no news: somebody else wrote the object meanwhile
EFFECT: Final = "NoSchedule"
NETWORK: Final = "NetworkUnavailable"
REASON: Final = "FimbriaIsUp"
MESSAGE: Final = "Fimbria forwards on this node"


@dataclass(frozen=True, slots=True)
class NodeState:
    """What matters of a Node: the keys of its taints, in the object's order, and the status of its condition
    NetworkUnavailable, "" without one."""

    taints: tuple[str, ...]
    network: str


@dataclass(frozen=True, slots=True)
class AgentPod:
    """An agent's pod on a node."""

    node: str
    ready: bool


@dataclass(frozen=True, slots=True)
class Wishes:
    """What is to be done at all. `taint` is its key."""

    taint: str
    remove: bool
    set: bool
    network: bool

    def __bool__(self) -> bool:
        return self.remove or self.set or self.network


@dataclass(frozen=True, slots=True)
class Decision:
    """What a Node needs. `wait`: seconds until it may need something else, None for never."""

    remove: bool = False
    add: bool = False
    network: bool = False
    wait: float | None = None


def decide(wishes: Wishes, node: NodeState, ready: Iterable[bool], silent: float) -> Decision:
    """`ready` has one entry for each agent's pod on the node; `silent` are the seconds since one was Ready."""
    pods, tainted = list(ready), wishes.taint in node.taints
    if any(pods):
        return Decision(remove=wishes.remove and tainted, network=wishes.network and node.network != "False")
    if not pods or not wishes.set or tainted:
        return Decision()
    return Decision(add=silent >= GRACE, wait=max(GRACE - silent, 0.0))


def node_state(node: Node) -> NodeState:
    """The row of a Node. What kubelet writes every few minutes isn't in it, so that it is no change."""
    return NodeState(tuple(t.key for t in node.spec.taints or ()), _condition(node.status.conditions, NETWORK))


def agent_pod(pod: Pod) -> AgentPod | None:
    """The row of an agent's pod; none before it has a node, or once it is ending, and none of others' (rule 4)."""
    if not pod.spec.node_name or pod.metadata.deletion_timestamp or not _of_agents(pod):
        return None
    return AgentPod(pod.spec.node_name, _condition(pod.status.conditions, "Ready") == "True")


def _of_agents(pod: Pod) -> bool:
    controllers = [o for o in pod.metadata.owner_references or () if o.controller]
    return [(o.api_version.partition("/")[0], o.kind, o.name) for o in controllers] == [AGENTS]


def _condition(conditions: Iterable[Condition] | None, kind: str) -> str:
    return next((c.status for c in conditions or () if c.type == kind), "")


def taint_patch(node: Node, key: str, *, add: bool) -> list[dict[str, Any]]:
    """A JSON patch (RFC 6902) that adds or removes our taint; it fails if the object isn't that version any more."""
    taints = node.spec.taints or ()
    guard = {"op": "test", "path": "/metadata/resourceVersion", "value": node.metadata.resource_version}
    taint = {"key": key, "effect": EFFECT}
    if add and taints:
        return [guard, {"op": "add", "path": "/spec/taints/-", "value": taint}]
    if add:
        return [guard, {"op": "add", "path": "/spec/taints", "value": [taint]}]
    # From the back: each removal moves what follows.
    places = [n for n, t in enumerate(taints) if t.key == key]
    return [guard, *({"op": "remove", "path": f"/spec/taints/{n}"} for n in reversed(places))]


@dataclass(slots=True)
class TaintKeeper:
    """Follows Nodes and the agents' pods, and writes Nodes."""

    client: ApiClient
    wishes: Wishes
    nodes: Table[str, NodeState]
    pods: Table[tuple[str, str], AgentPod]
    clock: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    _ready_at: dict[str, float] = field(default_factory=dict)
    _wake_at: dict[str, float] = field(default_factory=dict)
    _nodes_of: dict[tuple[str, str], str] = field(default_factory=dict)
    _due: set[str] = field(default_factory=set)
    _signal: Signal = field(default_factory=Signal)
    _retries: Retries[str] = field(init=False)

    def __post_init__(self) -> None:
        self._retries = Retries(self._again)

    def _again(self, name: str) -> None:
        self._due.add(name)
        self._signal.set()

    async def run(self) -> None:
        """Until cancelled."""
        signal = self._signal
        nodes, pods = self.nodes.subscribe(signal), self.pods.subscribe(signal)
        await self.nodes.wait_synced()
        await self.pods.wait_synced()
        self._due.update(self.nodes)
        while True:
            signal.clear()
            names, self._due = self._due | nodes.drain() | self._nodes(pods.drain()), set()
            names |= {name for name, at in self._wake_at.items() if at <= self.clock()}
            for name in names:
                await self._node(name)
            due = min(self._wake_at.values(), default=None)
            pause = None if due is None else max(due - self.clock(), 0.0)
            try:
                async with asyncio.timeout(pause):  # wait_for may forget a cancellation (Python 3.11)
                    await signal.wait()
            except TimeoutError:
                continue

    def _nodes(self, keys: Iterable[tuple[str, str]]) -> set[str]:
        """The nodes that changed pods are, or were, on."""
        found: set[str] = set()
        for key in keys:
            pod = self.pods.get(key)
            before = self._nodes_of.pop(key, None)
            if pod is not None:
                self._nodes_of[key] = pod.node
            found.update(n for n in (before, pod.node if pod else None) if n)
        return found

    async def _node(self, name: str) -> None:
        """Do what a node needs."""
        self._wake_at.pop(name, None)
        node = self.nodes.get(name)
        if node is None:
            self._ready_at.pop(name, None)
            self._retries.done(name)
            return
        ready = [p.ready for p in (self.pods[k] for k in self.pods.by("node", name))]
        now = self.clock()
        if any(ready) or not ready:
            self._ready_at[name] = now
        decision = decide(self.wishes, node, ready, now - self._ready_at.setdefault(name, now))
        if decision.wait:
            self._wake_at[name] = now + decision.wait
        try:
            await self._write(name, node, decision)
        except NotFound:
            self._retries.done(name)
        except ApiError as error:
            self._refused(name, error)
        else:
            self._retries.done(name)

    def _refused(self, name: str, error: ApiError) -> None:
        # A test of a JSON patch that fails is 422 as well.
        raced = isinstance(error, (Conflict, Invalid)) and self._retries.attempts(name) < RACES
        if not raced and self._retries.is_news(name, str(error)):
            log.warning("Node %s is not up to date: %s", name, error)
        self._retries.later(name)

    async def _write(self, name: str, node: NodeState, decision: Decision) -> None:
        if decision.network:
            now = to_time(self.wall())
            condition = {
                "type": NETWORK, "status": "False", "reason": REASON, "message": MESSAGE,
                "lastHeartbeatTime": now, "lastTransitionTime": now,
            }  # fmt: skip
            await self.client.patch_status(NODES, name, {"conditions": [condition]}, kind="strategic")
        if not decision.add and not decision.remove:
            return
        # Rare enough to ask for the object as it is now, instead of keeping every version of every Node.
        found = await self.client.get(NODES, name)
        if (self.wishes.taint in node_state(found).taints) is decision.add:
            return  # our own write of just now: the watch hasn't brought it yet
        if decision.remove:
            log.info("node %s forwards: its taint %s goes", name, self.wishes.taint)
        else:
            log.warning("node %s gets the taint %s: its agent isn't ready", name, self.wishes.taint)
        patch = taint_patch(found, self.wishes.taint, add=decision.add)
        await self.client.patch(NODES, name, patch, kind="json")
