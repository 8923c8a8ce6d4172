"""The controllers' decisions, and their loops closed over a small model of a cluster."""

from __future__ import annotations

import copy
import random
from datetime import UTC, datetime
from typing import Any

import pytest

from fimbria.lab.apiserver.controllers import daemons, deployments, garbage, replicas, schedule, slices
from fimbria.lab.apiserver.controllers.actions import Bind, Create, Delete, Patch, Put, owned_by
from fimbria.lab.apiserver.controllers.garbage import Collect, DropFinalizer, Item, SetOwners

NOW, TEXT = datetime(2026, 1, 2, tzinfo=UTC), "2026-01-02T00:00:00Z"


def node(name: str, **spec: Any) -> Any:
    conditions = [{"type": "Ready", "status": "True"}]
    return {"metadata": {"name": name, "labels": {"host": name}}, "spec": spec, "status": {"conditions": conditions}}


def pod(name: str, where: str = "", labels: Any = None, **spec: Any) -> Any:
    meta = {"name": name, "namespace": "ns", "uid": name, "labels": labels or {}, "creationTimestamp": TEXT}
    body = {"containers": []} | ({"nodeName": where} if where else {}) | spec
    return {"metadata": meta, "spec": body, "status": {"phase": "Pending"}}


def workload(kind: str, replicas_: int = 3, **spec: Any) -> Any:
    template = {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c", "image": "1"}]}}
    meta = {"name": "w", "namespace": "ns", "uid": f"{kind}-w", "generation": 1, "creationTimestamp": TEXT}
    base = {"replicas": replicas_, "selector": {"matchLabels": {"a": "b"}}, "template": template}
    return {"apiVersion": "apps/v1", "kind": kind, "metadata": meta, "spec": base | spec}


def deployment(surge: Any, unavailable: Any, replicas_: int) -> Any:
    strategy = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": surge, "maxUnavailable": unavailable}}
    return workload("Deployment", replicas_, strategy=strategy)


class Sets:
    """ReplicaSets whose pods become ready one by one, in any order."""

    def __init__(self, body: Any, seed: int):
        self.body, self.sets, self.random = body, {}, random.Random(seed)
        self.ready: dict[str, int] = {}

    def step(self) -> bool:
        actions = deployments.plan(self.body, list(self.sets.values()), TEXT)
        changed = False
        for action in actions:
            if isinstance(action, Create):
                made = copy.deepcopy(action.body)
                name = made["metadata"]["name"]
                made["metadata"] |= {
                    "uid": name,
                    "resourceVersion": "1",
                    "creationTimestamp": f"2026-01-01T00:00:{len(self.sets):02}Z",
                }
                self.sets[name], self.ready[name], changed = made, 0, True
            elif isinstance(action, Patch) and action.resource == "replicasets":
                self.sets[action.name]["spec"]["replicas"] = action.body["spec"]["replicas"]
                changed = True
            elif isinstance(action, Delete):
                del self.sets[action.name]
        for name, one in self.sets.items():
            wanted = one["spec"]["replicas"]
            self.ready[name] = min(self.ready[name], wanted)
            if self.ready[name] < wanted and self.random.random() < 0.7:
                self.ready[name] += 1
                changed = True
            one["status"] = {
                "replicas": wanted,
                "availableReplicas": self.ready[name],
                "readyReplicas": self.ready[name],
            }
        return changed or any(self.ready[name] < one["spec"]["replicas"] for name, one in self.sets.items())

    def settle(self, check: Any = None) -> None:
        for _ in range(500):
            busy = self.step()
            if check:
                check(sum(one["spec"]["replicas"] for one in self.sets.values()), sum(self.ready.values()))
            if not busy:
                return
        raise AssertionError("the deployment doesn't settle")


@pytest.mark.parametrize(("surge", "unavailable"), [(1, 0), (0, 1), ("25%", "25%"), (3, 2), ("100%", 0), (0, 0)])
@pytest.mark.parametrize("seed", range(4))
def test_rolling_updates_stay_within_their_bounds(surge: Any, unavailable: Any, seed: int) -> None:
    body = deployment(surge, unavailable, 5)
    world = Sets(body, seed)
    world.settle()
    most = 5 + deployments.resolve(surge, 5, up=True)
    least = 5 - max(deployments.resolve(unavailable, 5, up=False), 0 if surge else 1)
    body["spec"]["template"]["spec"]["containers"][0]["image"] = "2"

    def check(total: int, ready: int) -> None:
        assert total <= most and ready >= least

    world.settle(check)
    live = [one for one in world.sets.values() if one["spec"]["replicas"]]
    assert len(live) == 1 and live[0]["spec"]["template"]["spec"]["containers"][0]["image"] == "2"
    assert live[0]["spec"]["replicas"] == 5
    body["spec"]["template"]["spec"]["containers"][0]["image"] = "1"
    world.settle(check)
    assert len(world.sets) == 2


def test_replica_set_makes_and_chooses() -> None:
    body = workload("ReplicaSet", 3)
    made = [one for one in replicas.plan(body, [], NOW) if isinstance(one, Create)]
    assert len(made) == 3 and made[0].body["metadata"]["ownerReferences"][0]["uid"] == "ReplicaSet-w"
    running = pod("running", "n")
    running["status"] = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}
    body["spec"]["replicas"] = 1
    gone = [
        one.name
        for one in replicas.plan(body, [pod("waiting"), running, pod("bound", "n")], NOW)
        if isinstance(one, Delete)
    ]
    assert gone == ["waiting", "bound"]


def test_scheduler_spreads_and_respects() -> None:
    nodes = [
        node("a"),
        node("b"),
        node("c", unschedulable=True),
        node("d", taints=[{"key": "t", "effect": "NoSchedule"}]),
    ]
    bound = [
        one for one in schedule.plan([pod(f"p{number}") for number in range(4)], nodes, TEXT) if isinstance(one, Bind)
    ]
    assert sorted(one.node for one in bound) == ["a", "a", "b", "b"]
    chosen = schedule.plan([pod("x", nodeSelector={"host": "b"})], nodes, TEXT)
    assert chosen == [Bind("ns", "x", "b")]
    tolerant = pod("y", tolerations=[{"operator": "Exists"}], nodeSelector={"host": "d"})
    assert schedule.plan([tolerant], nodes, TEXT) == [Bind("ns", "y", "d")]
    lost = schedule.plan([pod("z", nodeSelector={"host": "none"})], nodes, TEXT)
    assert isinstance(lost[0], Patch) and lost[0].body["status"]["conditions"][0]["reason"] == "Unschedulable"


def test_scheduler_keeps_the_hostile_apart() -> None:
    term = {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": {"app": "db"}}}
    affinity = {"podAntiAffinity": {schedule.REQUIRED: [term]}}
    pods = [pod(f"p{number}", labels={"app": "db"}, affinity=affinity) for number in range(3)]
    actions = schedule.plan(pods, [node("a"), node("b")], TEXT)
    assert {one.node for one in actions if isinstance(one, Bind)} == {"a", "b"}
    assert [one.name for one in actions if isinstance(one, Patch)] == ["p2"]


def test_daemon_set_one_for_each_node() -> None:
    body = workload("DaemonSet")
    nodes = [node("a"), node("b", unschedulable=True), node("c", taints=[{"key": "t", "effect": "NoSchedule"}])]
    made = [one.body for one in daemons.plan(body, [], nodes, NOW) if isinstance(one, Create)]
    assert [daemons.target_node(one) for one in made] == ["a", "b"]
    there = [one | {"metadata": one["metadata"] | {"name": f"p{at}", "uid": f"u{at}", "creationTimestamp": TEXT}}
             for at, one in enumerate(made)]  # fmt: skip
    again = daemons.plan(body, there, nodes, NOW)
    assert not any(isinstance(one, Create | Delete) for one in again)
    fewer = daemons.plan(body, there, nodes[:1], NOW)
    assert [one.name for one in fewer if isinstance(one, Delete)] == ["p1"]


def service(**spec: Any) -> Any:
    base = {"selector": {"a": "b"}, "ports": [{"name": "h", "port": 80, "targetPort": "web", "protocol": "TCP"}],
            "ipFamilies": ["IPv4"], "clusterIP": "10.0.0.1"}  # fmt: skip
    meta = {"name": "s", "namespace": "ns", "uid": "s"}
    return {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": base | spec}


def backend(number: int, ready: bool = True, port: int = 8080, **meta: Any) -> Any:
    one = pod(f"p{number}", "n", {"a": "b"})
    one["metadata"] |= meta
    one["spec"]["containers"] = [{"name": "c", "ports": [{"name": "web", "containerPort": port, "protocol": "TCP"}]}]
    state = "True" if ready else "False"
    ips = [{"ip": f"10.1.{number // 256}.{number % 256}"}, {"ip": f"fd00::{number:x}"}]
    one["status"] = {"phase": "Running", "podIPs": ips, "conditions": [{"type": "Ready", "status": state}]}
    return one


class Slices:
    def __init__(self) -> None:
        self.all: dict[str, Any] = {}
        self.writes = 0

    def run(self, body: Any, pods: list[Any]) -> None:
        for _ in range(10):
            actions = slices.plan(body, pods, list(self.all.values()), {"n": "zone-1"})
            for action in actions:
                self.writes += 1
                if isinstance(action, Create):
                    name = f"s-{self.writes}"
                    made = copy.deepcopy(action.body)
                    made["metadata"] |= {"name": name, "uid": name}
                    self.all[name] = made
                elif isinstance(action, Put):
                    self.all[action.body["metadata"]["name"]] = action.body
                elif isinstance(action, Delete):
                    del self.all[action.name]
            if not actions:
                return
        raise AssertionError("the slices don't settle")

    def addresses(self, family: str = "IPv4") -> list[str]:
        found = [one["addresses"][0] for each in self.all.values() if each["addressType"] == family
                 for one in each["endpoints"]]  # fmt: skip
        return sorted(found)


def test_slices_hold_every_backend_once_and_change_little() -> None:
    world, body = Slices(), service(ipFamilies=["IPv4", "IPv6"])
    pods = [backend(number) for number in range(250)]
    world.run(body, pods)
    assert len(world.all) == 6 and len(set(world.addresses())) == 250 == len(world.addresses("IPv6"))
    world.writes = 0
    world.run(body, pods[:-1])
    assert world.writes == 2 and len(world.addresses()) == 249
    world.run(body, [])
    assert len(world.all) == 2 and world.addresses() == []


def test_slices_split_by_resolved_port() -> None:
    world = Slices()
    world.run(service(), [backend(1), backend(2, port=9090)])
    assert sorted(each["ports"][0]["port"] for each in world.all.values()) == [8080, 9090]


@pytest.mark.parametrize(
    ("ready", "dying", "publish", "expected"),
    [
        (True, False, False, (True, True, False)),
        (False, False, False, (False, False, False)),
        (True, True, False, (False, True, True)),
        (False, False, True, (True, True, False)),
        (True, True, True, (True, True, True)),
    ],
)
def test_endpoint_conditions(ready: bool, dying: bool, publish: bool, expected: tuple[bool, bool, bool]) -> None:
    world = Slices()
    meta = {"deletionTimestamp": TEXT} if dying else {}
    world.run(service(publishNotReadyAddresses=publish), [backend(1, ready, **meta)])
    conditions = next(iter(world.all.values()))["endpoints"][0]["conditions"]
    assert tuple(conditions[key] for key in ("ready", "serving", "terminating")) == expected


def item(name: str, *owners: str, finalizers: list[str] | None = None, deleting: bool = False) -> Item:
    references = [
        {"apiVersion": "v1", "kind": "ConfigMap", "name": one, "uid": one, "blockOwnerDeletion": True} for one in owners
    ]
    meta: Any = {"name": name, "uid": name, "resourceVersion": "1"}
    meta |= {"ownerReferences": references} if owners else {}
    meta |= {"finalizers": finalizers} if finalizers else {}
    meta |= {"deletionTimestamp": TEXT} if deleting else {}
    return Item("/api/v1/configmaps", meta)


def decide(*items: Item) -> list[Any]:
    return garbage.plan([one for one in items if garbage.is_relevant(one.meta)], {one.uid: one for one in items})


def test_garbage() -> None:
    owner, child = item("o"), item("c", "o")
    assert decide(owner, child) == []
    assert [(one.item.uid, one.policy, one.absent[0][2]) for one in decide(child)] == [("c", "Background", "o")]
    two = item("c", "o", "p")
    (kept,) = decide(owner, two)
    assert isinstance(kept, SetOwners) and [one["uid"] for one in kept.owners] == ["o"]


def test_foreground_waits_and_orphaning_cuts() -> None:
    foreground = item("o", finalizers=["foregroundDeletion"], deleting=True)
    (collect,) = decide(foreground, item("c", "o"))
    assert isinstance(collect, Collect) and collect.policy == "Background"
    assert decide(foreground) == [DropFinalizer(foreground, "foregroundDeletion")]
    orphaning = item("o", finalizers=["orphan"], deleting=True)
    (cut,) = decide(orphaning, item("c", "o"))
    assert isinstance(cut, SetOwners) and cut.owners == []
    assert decide(orphaning) == [DropFinalizer(orphaning, "orphan")]


def test_owned_by_counts_controllers_only() -> None:
    mine = pod("x")
    mine["metadata"]["ownerReferences"] = [{"uid": "u", "controller": True}]
    other = pod("y")
    other["metadata"]["ownerReferences"] = [{"uid": "u"}]
    assert owned_by([mine, other], "u") == [mine]


def test_only_ownership_and_deletion_matter_to_the_collector() -> None:
    plain, child = {"uid": "u"}, {"uid": "u", "ownerReferences": [{"uid": "o"}]}
    assert not garbage.matters(None, plain) and garbage.matters(None, child) and garbage.matters(plain, None)
    assert not garbage.matters(child, child | {"labels": {"a": "b"}})
    assert garbage.matters(child, child | {"deletionTimestamp": TEXT}) and garbage.matters(child, plain)


@pytest.mark.parametrize(
    ("distribution", "ready", "expected"),
    [
        (None, True, None),
        ("PreferClose", True, {"forZones": [{"name": "zone-1"}]}),
        ("PreferSameZone", True, {"forZones": [{"name": "zone-1"}]}),
        ("PreferSameNode", True, {"forZones": [{"name": "zone-1"}], "forNodes": [{"name": "n"}]}),
        ("PreferSameNode", False, None),
    ],
)
def test_hints_follow_the_traffic_distribution(distribution: str | None, ready: bool, expected: Any) -> None:
    world = Slices()
    world.run(service(**{"trafficDistribution": distribution} if distribution else {}), [backend(1, ready)])
    assert next(iter(world.all.values()))["endpoints"][0].get("hints") == expected
