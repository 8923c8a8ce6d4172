"""After any sequence of changes and faults the kernel holds what is desired, and the engine's answer doesn't depend on
the order in which it learned what is so now."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from fimbria.agent.engine import DesiredRows, Engine, NumberBook
from fimbria.apply.loop import ApplyLoop, Stage
from fimbria.apply.rows import Delta, Rows
from fimbria.model.address import Prefix, pack
from fimbria.model.endpoint import ClusterIdentity, EndpointIdentity, LocalEndpoint, Pod, RemoteEndpoint
from fimbria.model.network import DeviceSet
from fimbria.model.node import Node
from fimbria.tables import Tables

KEYS = range(6)


@dataclass
class Kernel:
    """One kind of kernel object: a map that can be full, refuse single rows, or be unreadable for a while."""

    name: str
    rows: dict[int, int] = field(default_factory=dict)
    room: int = 100
    refused: set[int] = field(default_factory=set)
    unreadable: bool = False
    writes: int = 0

    def read(self) -> dict[int, int]:
        if self.unreadable:
            raise OSError(5, f"{self.name} can't be read")
        return dict(self.rows)

    def write(self, delta: Delta[int, int], *, order: str) -> Mapping[int, str]:
        failures = {}
        for key, row in delta.upserts.items() if order == "in" else ():
            if key in self.refused:
                failures[key] = "refused"
            elif key not in self.rows and len(self.rows) >= self.room:
                failures[key] = "full"
            else:
                self.rows[key] = row
                self.writes += 1
        for key in delta.deletes if order == "out" else ():
            if key in self.refused:
                failures[key] = "refused"
            else:
                self.rows.pop(key, None)
                self.writes += 1
        return failures


class World:
    """Two targets, `users` rows of which need the `used` row of the same key."""

    def __init__(self) -> None:
        self.kernels = {n: Kernel(n) for n in ("used", "users")}
        self.rows = {n: Rows[int, int](n) for n in self.kernels}
        stages = [Stage(self.kernels[n], self.rows[n], quick=n == "used") for n in self.kernels]
        stages[1].requires = lambda key, _row: [("used", key)]
        self.loop = ApplyLoop(stages, audit_interval=3600)

    def heal(self) -> None:
        for kernel in self.kernels.values():
            kernel.room, kernel.unreadable, kernel.refused = 100, False, set()


STEP = st.tuples(
    st.sampled_from(("put", "drop", "lose", "bend", "stranger", "fill", "refuse", "blind", "audit", "quick", "heal")),
    st.sampled_from(("used", "users")),
    st.sampled_from(KEYS),
    st.integers(0, 3),
)


def strike(world: World, step: tuple[str, str, int, int]) -> None:
    kind, name, key, row = step
    kernel, rows = world.kernels[name], world.rows[name]
    match kind:
        case "put":
            rows.put(key, row)
        case "drop":
            rows.drop(key)
        case "lose":
            kernel.rows.pop(key, None)
        case "bend" if key in kernel.rows:
            kernel.rows[key] = row + 10
        case "stranger":
            kernel.rows[key + 100] = row
        case "fill":
            kernel.room = row
        case "refuse":
            kernel.refused.add(key)
        case "blind":
            kernel.unreadable = True
        case "audit" | "quick":
            world.loop.audit_soon(quick=kind == "quick")
        case "heal":
            world.heal()


@settings(max_examples=150, deadline=None)
@given(st.lists(STEP, max_size=25))
def test_actual_becomes_desired(steps: list[tuple[str, str, int, int]]) -> None:
    async def scenario() -> None:
        world = World()
        loop = world.loop
        running = asyncio.create_task(loop.run())
        loop.open()
        for step in steps:
            strike(world, step)
            if step[3] == 0:  # not after every step: several changes often come together
                await loop.flush()
                for key in world.rows["users"].failed:
                    assert key in world.rows["users"].desired or key in world.kernels["users"].rows
        world.heal()
        loop.audit_soon()
        await loop.flush()
        await loop.flush()
        for name, kernel in world.kernels.items():
            assert kernel.rows == world.rows[name].desired, name
        assert loop.plan() == []
        assert loop.failures() == {}
        before = sum(k.writes for k in world.kernels.values())
        loop.audit_soon()
        await loop.flush()
        assert sum(k.writes for k in world.kernels.values()) == before, "a second audit changes nothing"
        running.cancel()

    asyncio.run(scenario())


# --- the engine ------------------------------------------------------------------------------------------------------

NODES = ("one", "two", "three")
Fact = tuple[str, Any, Any]


def address(block: int, host: int) -> bytes:
    return pack(f"10.244.{block}.{host}")


def facts(choice: random.Random) -> list[Fact]:
    """What is so in a small cluster: rows of tables, some claims of the same address among them."""
    found: list[Fact] = []
    for number, name in enumerate(NODES):
        blocks = (Prefix.parse(f"10.244.{number}.0/24"), Prefix.parse(f"fd00:{number}::/120"))
        routers = (address(number, 1), pack(f"fd00:{number}::1"))
        found.append(("nodes", name, Node(name, (pack(f"192.0.2.{number + 1}"),), routers, blocks)))
    for identity in range(256, 260):
        found.append(("identities", identity, ClusterIdentity({"k8s:app": str(identity)})))
    found.append(("namespaces", "ns", {"name": "ns"}))
    for n in range(choice.randrange(1, 5)):
        pod = f"local{n}"
        found.append(("pods", ("ns", pod), Pod("ns", pod, f"uid{n}", {"app": pod}, "default", (), host_network=False)))
        endpoint = LocalEndpoint(
            id=n + 1, container_id=f"c{n}", ifname="eth0", network="fimbria", netns="", namespace="ns", pod=pod,
            uid=f"uid{n}", host_ifname=f"fim{n}", ifindex=10 + n, pod_mac=bytes([2, 0, 0, 0, 0, n]),
            host_mac=bytes([2, 0, 0, 0, 1, n]), addr4=address(0, 10 + n),
        )  # fmt: skip
        found.append(("endpoints", n + 1, endpoint))
        found.append(("endpoint_identities", n + 1, EndpointIdentity(256 + n % 4, {"k8s:app": pod})))
    for n in range(choice.randrange(6)):
        number = choice.randrange(3)
        remote = RemoteEndpoint(256 + n % 4, (address(number, 10 + n % 3),), pack(f"192.0.2.{number + 1}"), (), str(n))
        found.append(("remote_endpoints", ("ns", f"remote{n}"), remote))
    return found


def engine_for(overlay: bool) -> tuple[Engine, DesiredRows]:
    rows = DesiredRows()
    engine = Engine(Tables(), rows, NumberBook(), node="one", cluster="default", overlay=overlay)
    engine.set_devices(DeviceSet(2, b"\2\0\0\0\0\1", 5 if overlay else 0, (3,), 1500, 1450))
    return engine, rows


def put(engine: Engine, fact: Fact) -> None:
    table, key, row = fact
    getattr(engine.tables, table).upsert(key, row)


def drop(engine: Engine, fact: Fact) -> None:
    getattr(engine.tables, fact[0]).delete(fact[1])


def picture(rows: DesiredRows) -> dict[str, dict[Any, Any]]:
    names = ("ipcache", "endpoints", "local_addrs", "routes", "neighbours", "device_links")
    return {name: dict(getattr(rows, name).desired) for name in names}


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False), st.booleans())
def test_the_order_of_news_does_not_matter(choice: random.Random, overlay: bool) -> None:
    cluster = facts(choice)
    engine, rows = engine_for(overlay)
    for fact in cluster:
        put(engine, fact)
    engine.step()
    squashed = picture(rows)
    assert squashed["endpoints"] and squashed["routes"]

    shuffled = list(cluster)
    choice.shuffle(shuffled)
    for order in (list(reversed(cluster)), shuffled):
        engine, rows = engine_for(overlay)
        for fact in order:  # one step each, now and then with something that goes again
            put(engine, fact)
            engine.step()
            if choice.random() < 0.3:
                drop(engine, fact)
                engine.step()
                put(engine, fact)
                engine.step()
        assert picture(rows) == squashed
        # Everything goes (but for this node, which can't), and comes back.
        for fact in shuffled:
            drop(engine, fact)
            if choice.random() < 0.5:
                engine.step()
        engine.step()
        assert not rows.endpoints.desired and not rows.local_addrs.desired
        for fact in order:
            put(engine, fact)
        engine.step()
        assert picture(rows) == squashed
