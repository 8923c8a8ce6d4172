"""What is open in the kernel is complete there: endpoints, their policy, and the identities that policy knows.

The real engine, loop and requirements, on targets that refuse rows, forget them and can't be read.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from fimbria.agent import requires
from fimbria.agent.engine import DesiredRows, Engine, NumberBook
from fimbria.apply.attach import DeviceHook
from fimbria.apply.loop import ApplyLoop, Stage
from fimbria.apply.rows import Delta, Rows
from fimbria.model.address import Prefix, pack
from fimbria.model.endpoint import ClusterIdentity, EndpointIdentity, LocalEndpoint, Pod
from fimbria.model.labels import DEFAULT_FILTER
from fimbria.model.network import DeviceSet
from fimbria.model.node import Node
from fimbria.model.rows import Endpoint, PolicyEntry, PolicyKey
from fimbria.sources.k8s.policies import Vocabulary
from fimbria.sources.k8s.policies_cilium import cilium_policy
from fimbria.sources.k8s.types.cilium_policy import CiliumNetworkPolicy
from fimbria.tables import Tables

ORDER = ("policy_sets", "identities", "cidrs", "ipcache", "device_links", "endpoints", "local_addrs")
ALLOW, DENY, READY, ENFORCED, CIDRS = 1, 2, 1, 2 | 4, 8 | 16


@dataclass
class Kernel:
    """One target; `refused(key)` rows can't be written."""

    name: str
    world: World
    rows: dict[Any, Any] = field(default_factory=dict)
    refused: set[Any] = field(default_factory=set)
    refuses_all: bool = False
    blind: bool = False

    def read(self) -> dict[Any, Any]:
        if self.blind:
            raise OSError(5, "can't be read")
        return dict(self.rows)

    def write(self, delta: Delta[Any, Any], *, order: str) -> Mapping[Any, str]:
        failures: dict[Any, str] = {}
        if order == "swap":
            return failures
        for key, row in delta.upserts.items():
            if self.refuses_all or key in self.refused:
                failures[key] = "refused"
            else:
                self.rows[key] = row
                self.world.check(self.name, key)
        for key in delta.deletes:
            self.rows.pop(key, None)
            self.world.check(self.name, key)
        return failures


class World:
    def __init__(self) -> None:
        self.rows = DesiredRows()
        self.engine = Engine(Tables(), self.rows, NumberBook(), node="one", cluster="default", overlay=False)
        self.tables = self.engine.tables
        self.kernels = {n: Kernel(n, self) for n in ORDER}
        stages = [Stage(self.kernels[n], self.of(n), quick=n == "device_links") for n in ORDER]
        named = {s.rows.name: s for s in stages}
        named["identities"].vouches = True
        named["identities"].requires = requires.of_identity(self.engine)
        named["endpoints"].requires = requires.of_endpoint(self.rows)
        self.loop = ApplyLoop(stages, audit_interval=3600)
        self.engine.set_devices(DeviceSet(2, b"\2\0\0\0\0\1", 0, (3,), 1500, 1450))
        block = (Prefix.parse("10.244.0.0/24"),)
        self.tables.nodes.upsert("one", Node("one", (pack("192.0.2.1"),), (pack("10.244.0.1"),), block))
        self.tables.namespaces.upsert("ns", {"name": "ns"})
        self.opened = 0
        self.vouched = 0

    def start(self) -> None:
        self.running = asyncio.create_task(self.loop.run())
        self.loop.open()

    def of(self, name: str) -> Rows[Any, Any]:
        rows: Rows[Any, Any] = getattr(self.rows, name)
        return rows

    def check(self, name: str, key: Any) -> None:
        """After each single write."""
        kernel = {n: k.rows for n, k in self.kernels.items()}
        if name == "endpoints" and key in kernel["endpoints"]:
            row: Endpoint = kernel["endpoints"][key]
            self.opened += 1
            assert {DeviceHook(key, s) for s in ("ingress", "egress")} <= kernel["device_links"].keys()
            if row.policy_set:
                assert row.policy_set in kernel["policy_sets"]
                assert kernel["policy_sets"][row.policy_set] == self.rows.policy_sets.desired[row.policy_set]
            if row.flags & CIDRS:
                assert self.rows.cidrs.desired.keys() <= kernel["cidrs"].keys()
        if name == "identities" and key in kernel["identities"]:
            # Whatever policy says about who is listed is in the kernel, where it has the set at all.
            self.vouched += 1
            for number, content in kernel["policy_sets"].items():
                wanted = self.rows.policy_sets.desired.get(number, {})
                assert about(content, key) == about(wanted, key)

    def pod(self, n: int, app: str) -> None:
        self.tables.pods.upsert(
            ("ns", f"p{n}"), Pod("ns", f"p{n}", "", {"app": app}, "default", (), host_network=False)
        )
        self.tables.endpoint_identities.upsert(n, EndpointIdentity(1000 + n, labels(app)))
        endpoint = LocalEndpoint(
            id=n, container_id=f"c{n}", ifname="eth0", network="f", netns="", namespace="ns", pod=f"p{n}", uid="",
            host_ifname=f"fim{n}", ifindex=10 + n, pod_mac=bytes(6), host_mac=bytes(6),
            addr4=pack(f"10.244.0.{10 + n}"),
        )  # fmt: skip
        self.tables.endpoints.upsert(n, endpoint)

    def policy(self, name: str, spec: dict[str, Any]) -> None:
        obj = {"metadata": {"name": name, "namespace": "ns"}, "spec": spec}
        decoded = msgspec.json.decode(msgspec.json.encode(obj), type=CiliumNetworkPolicy)
        found = cilium_policy(decoded, Vocabulary(DEFAULT_FILTER, "default"))
        assert found.policy is not None and not found.problems
        self.tables.cilium_policies.upsert(("ns", name), found.policy)

    def identity(self, number: int, app: str) -> None:
        self.tables.identities.upsert(number, ClusterIdentity(labels(app)))


def labels(app: str) -> dict[str, str]:
    return {"k8s:app": app, "k8s:io.kubernetes.pod.namespace": "ns"}


def about(content: Mapping[PolicyKey, PolicyEntry], peer: int) -> dict[PolicyKey, PolicyEntry]:
    return {k: e for k, e in content.items() if k.peer == peer}


def everyone_but(app: str, block: str = "") -> dict[str, Any]:
    denied: list[dict[str, Any]] = [{"fromEndpoints": [{"matchLabels": {"app": app}}]}]
    if block:
        denied.append({"fromCIDR": [block]})
    return {"endpointSelector": {"matchLabels": {"app": "web"}},
            "ingress": [{"fromEntities": ["all"]}], "ingressDeny": denied}  # fmt: skip


async def settled(world: World) -> None:
    """Raises what a check of the loop's writes raised."""
    world.engine.step()
    flushed = asyncio.create_task(world.loop.flush())
    await asyncio.wait({flushed, world.running}, return_when=asyncio.FIRST_COMPLETED)
    if world.running.done():
        flushed.cancel()
        await world.running


async def test_an_identity_waits_for_the_sets_that_deny_it() -> None:
    world = World()
    world.start()
    try:
        world.pod(1, "web")
        world.policy("p", everyone_but("evil"))
        world.identity(300, "good")
        await settled(world)
        (number,) = world.kernels["policy_sets"].rows
        assert {300, 1001} <= world.kernels["identities"].rows.keys()

        world.kernels["policy_sets"].refused.add(number)
        world.identity(301, "evil")
        world.identity(302, "good")
        await settled(world)
        known = world.kernels["identities"].rows
        assert 301 not in known
        assert "policy_sets" in world.rows.identities.failed[301]
        world.loop.audit_soon()
        await settled(world)
        assert 301 not in known
        world.kernels["policy_sets"].refused.clear()
        world.loop.audit_soon()
        await settled(world)
        assert {301, 302} <= known.keys()
        assert about(world.kernels["policy_sets"].rows[number], 301)
    finally:
        world.running.cancel()


async def test_an_identity_is_unknown_before_its_entries_go() -> None:
    world = World()
    world.start()
    seen: list[tuple[str, bool]] = []
    try:
        world.pod(1, "web")
        world.policy("p", everyone_but("evil"))
        world.identity(300, "evil")
        await settled(world)
        world.check = lambda name, _key: seen.append((name, 300 in world.kernels["identities"].rows))  # type: ignore[method-assign]
        world.tables.identities.delete(300)
        await settled(world)
        assert seen == [("identities", False), ("policy_sets", False)]
    finally:
        world.running.cancel()


async def test_a_local_pods_identity_is_known_before_the_cluster_tells_of_it() -> None:
    world = World()
    world.pod(1, "web")
    world.engine.step()
    assert 1001 in world.rows.identities.desired
    world.identity(1001, "web")
    world.engine.step()
    world.tables.identities.delete(1001)
    world.engine.step()
    assert 1001 in world.rows.identities.desired  # its pod is still here
    world.tables.endpoints.delete(1)
    world.tables.endpoint_identities.delete(1)
    world.engine.step()
    assert 1001 not in world.rows.identities.desired


def strike(world: World, rng: random.Random) -> None:
    kernel = world.kernels[rng.choice(ORDER[:-1])]
    number = rng.randrange(1, 5)
    match rng.randrange(9):
        case 0 | 1:
            world.pod(number, rng.choice(("web", "db")))
        case 2:
            world.tables.endpoints.delete(number)
            world.tables.endpoint_identities.delete(number)
        case 3:
            world.identity(300 + number, rng.choice(("evil", "good")) + str(number % 2))
        case 4:
            world.tables.identities.delete(300 + number)
        case 5:
            block = rng.choice(("", "198.51.100.0/24", "203.0.113.0/25"))
            world.policy("p", everyone_but(rng.choice(("evil0", "evil1")), block))
        case 6:
            world.tables.cilium_policies.delete(("ns", "p"))
        case 7:
            kernel.refuses_all = not kernel.refuses_all
            kernel.blind = rng.random() < 0.2
        case _:
            world.loop.audit_soon(quick=rng.random() < 0.5)


async def one_life(seed: int) -> tuple[int, int]:
    rng = random.Random(seed)
    world = World()
    world.start()
    try:
        for _ in range(40):
            strike(world, rng)
            if rng.random() < 0.6:
                await settled(world)
        for kernel in world.kernels.values():
            kernel.refuses_all = kernel.blind = False
        world.loop.audit_soon()
        await settled(world)
        await settled(world)
        for name, kernel in world.kernels.items():
            assert kernel.rows == world.of(name).desired
        return world.opened, world.vouched
    finally:
        world.running.cancel()
        await asyncio.gather(world.running, return_exceptions=True)


def test_nothing_is_open_that_is_incomplete() -> None:
    lives = [asyncio.run(one_life(seed)) for seed in range(60)]
    assert sum(opened for opened, _ in lives) > 200
    assert sum(vouched for _, vouched in lives) > 200
