"""Agents of a simulated cluster, many in one process: the identity allocator and the publisher of real agents, each
with tables of its own, over one connection pool. No kernel, no CNI: a pod is created, read, identified and reported."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, TypeVar

from tests.bench.bigserver import core_pod
from tests.bench.cluster_data import NAMESPACES, block, node_addresses

from fimbria.agent.identities import Identities
from fimbria.agent.publisher import Publisher
from fimbria.model.address import pack
from fimbria.model.endpoint import ClusterIdentity, LocalEndpoint
from fimbria.model.labels import DEFAULT_FILTER, Labels, pod_labels
from fimbria.sources.k8s import resources, rows
from fimbria.sources.k8s.client import ApiClient
from fimbria.sources.k8s.errors import AlreadyExists, Unavailable
from fimbria.sources.k8s.informer import Informer
from fimbria.tables import Tables
from fimbria.tables.table import Table

MAC: Final = b"\x02\0\0\0\0\1"
T = TypeVar("T")


async def insist(ask: Callable[[], Awaitable[T]]) -> T:
    """One process with the connections of thousands, on a busy machine: what wasn't answered is asked again."""
    while True:
        try:
            return await ask()
        except Unavailable:
            await asyncio.sleep(0.5)


@dataclass(slots=True)
class SimAgent:
    """One node's agent. `identities` is the table of all identities, shared by all that run here."""

    client: ApiClient
    node: int
    known: Table[int, ClusterIdentity]
    tables: Tables = field(init=False)
    identities: Identities = field(init=False)
    pods: dict[tuple[str, str], int] = field(default_factory=dict)
    _next: int = 1

    def __post_init__(self) -> None:
        self.tables = Tables(identities=self.known)
        self.tables.endpoints.add_index("pod", lambda e: ((e.namespace, e.pod),))
        self.identities = Identities(self.client, self.tables, DEFAULT_FILTER)

    async def run(self) -> None:
        """Until cancelled."""
        publisher = Publisher(self.client, self.tables, f"far{self.node}", (pack(node_addresses(self.node)[0]),))
        async with asyncio.TaskGroup() as group:
            group.create_task(self.identities.run())
            group.create_task(publisher.run())

    async def add(self, namespace: str, name: str, address: str) -> None:
        """A pod that the API server has, as after CNI ADD."""
        pod = rows.pod(await self.client.get(resources.PODS, name, namespace))
        labels = pod_labels(namespace, pod.labels, {}, pod.service_account)
        identity = await self.identities.identify(labels)
        endpoint_id, self._next = self._next, self._next + 1
        self.pods[namespace, name] = endpoint_id
        self.tables.pods.upsert((namespace, name), pod)
        self.tables.endpoint_identities.upsert(endpoint_id, identity)
        self.tables.endpoints.upsert(endpoint_id, LocalEndpoint(
            endpoint_id, f"{self.node:032x}{endpoint_id:032x}", "eth0", "fimbria", "/run/netns/x", namespace, name,
            pod.uid, f"fim{endpoint_id}", endpoint_id + 10, MAC, MAC, pack(address),
        ))  # fmt: skip

    async def relabel(self, namespace: str, name: str, namespace_labels: Mapping[str, str]) -> None:
        """The pod's namespace has these labels now."""
        endpoint_id, pod = self.pods[namespace, name], self.tables.pods.get((namespace, name))
        assert pod is not None
        identity = await self.identities.identify(pod_labels(namespace, pod.labels, namespace_labels))
        self.tables.endpoint_identities.upsert(endpoint_id, identity)

    def remove(self, namespace: str, name: str) -> None:
        """As after CNI DEL."""
        endpoint_id = self.pods.pop((namespace, name))
        self.tables.endpoints.delete(endpoint_id)
        self.tables.endpoint_identities.delete(endpoint_id)
        self.tables.pods.delete((namespace, name))


@dataclass(slots=True)
class Fleet:
    """Simulated agents on the nodes 0 to `count` - 1, with the identities that exist."""

    client: ApiClient
    count: int
    agents: Sequence[SimAgent] = ()
    known: Table[int, ClusterIdentity] = field(default_factory=lambda: Table("identities"))
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def __aenter__(self) -> Fleet:
        follow: Informer[Any, int, ClusterIdentity] = Informer(
            self.client, resources.CILIUM_IDENTITIES, self.known, rows.identity, key=rows.identity_key
        )
        self._tasks = [asyncio.create_task(follow.run())]
        await self.known.wait_synced()
        self.agents = [SimAgent(self.client, n, self.known) for n in range(self.count)]
        self._tasks += [asyncio.create_task(agent.run()) for agent in self.agents]
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def storm(
        self, names: Sequence[str], rate: float, labels: Mapping[str, str], namespaces: int = NAMESPACES
    ) -> dict[str, float]:
        """Create pods at a steady rate, one after the other on all nodes; when each was, just before its request."""
        created: dict[str, float] = {}
        began = time.monotonic()

        async def one(at: int, name: str) -> None:
            await asyncio.sleep(max(began + at / rate - time.monotonic(), 0))
            agent, namespace = self.agents[at % len(self.agents)], f"ns{at % namespaces}"
            body = core_pod(namespace, name, f"far{agent.node}", labels)
            created[name] = time.monotonic()
            pod = {k: body[k] for k in ("metadata", "spec")}
            with suppress(AlreadyExists):  # a busy server may have made it without saying so
                await insist(partial(self.client.create, resources.PODS, pod, namespace))
            # above those that the node's pods have from the beginning, in its own block: others' count for nothing
            address = f"{block(agent.node)[0]}{200 + at // len(self.agents)}"
            await insist(partial(agent.add, namespace, name, address))

        await asyncio.gather(*(one(at, name) for at, name in enumerate(names)))
        return created

    async def gone(self) -> None:
        """All pods that storms made are deleted."""

        async def one(agent: SimAgent, namespace: str, name: str) -> None:
            agent.remove(namespace, name)
            await insist(partial(self.client.delete, resources.PODS, name, namespace, grace_seconds=0, missing_ok=True))

        await asyncio.gather(*(one(a, *key) for a in self.agents for key in list(a.pods)))

    async def ask_at_once(self, label_sets: Sequence[Labels]) -> set[tuple[Labels, int]]:
        """Every agent asks for the identity of each label set in the same instant; what they were told."""
        told: set[tuple[Labels, int]] = set()

        async def one(agent: SimAgent, labels: Labels) -> None:
            told.add((labels, (await insist(partial(agent.identities.identify, labels))).number))

        await asyncio.gather(*(one(a, labels) for a in self.agents for labels in label_sets))
        return told
