"""Slices or single reports: nobody is lost between one and the other, and of several tales the right one counts."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from fimbria.agent import remotes
from fimbria.agent.remotes import RemoteEndpoints, SliceUnion
from fimbria.model.endpoint import PodSlice, RemoteEndpoint
from fimbria.sources.k8s.rows import COVER
from fimbria.tables import ObjectKey, Tables


def endpoint(identity: int, created: str = "2026-01-01T00:00:00Z") -> RemoteEndpoint:
    return RemoteEndpoint(identity, (identity.to_bytes(16),), bytes(16), (), created)


def batch(version: int, namespace: str = "ns", **endpoints: RemoteEndpoint) -> PodSlice:
    return PodSlice(namespace, endpoints, version)


class Resource:
    plural = "things"


@dataclass
class Follower:
    """Stands in for an informer: fills its table once it is told to."""

    table: Any
    rows: dict[Any, Any] = field(default_factory=dict)
    missing: bool = False
    go: asyncio.Event = field(default_factory=asyncio.Event)
    running: bool = False

    async def run(self) -> None:
        self.running = True
        try:
            await self.go.wait()
            self.table.replace(self.rows)
            self.table.mark_synced()
            await asyncio.Event().wait()
        finally:
            self.running = False


class Node:
    def __init__(self) -> None:
        self.tables = Tables()
        self.now = 0.0
        self.slices = Follower(self.tables.pod_slices)
        self.pods: list[Follower] = []
        self.informers: list[Any] = []
        self.reported: dict[ObjectKey, RemoteEndpoint] = {}
        made: Any = self._reports
        listed: Any = self.slices
        self.remotes = RemoteEndpoints(self.tables, listed, made, self.informers, lambda: self.now)
        self.remotes.random = lambda: 0.0

    def _reports(self) -> Follower:
        self.pods.append(Follower(self.tables.remote_endpoints, self.reported))
        return self.pods[-1]

    @property
    def seen(self) -> dict[str, int]:
        return {name: row.identity for (_, name), row in self.tables.remote_endpoints.items()}


@asynccontextmanager
async def running(node: Node) -> AsyncIterator[None]:
    task = asyncio.create_task(node.remotes.run())
    try:
        yield
        assert not task.done(), task.exception()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def rest() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_covering_slices_are_followed_and_pods_are_not() -> None:
    node = Node()
    node.slices.rows = {"one": batch(5, a=endpoint(300), b=endpoint(301)), COVER: batch(6, "")}
    async with running(node):
        await rest()
        assert not node.tables.remote_endpoints.synced
        node.slices.go.set()
        await rest()
        assert node.tables.remote_endpoints.synced and not node.pods
        assert node.seen == {"a": 300, "b": 301}
        node.tables.pod_slices.upsert("one", batch(7, b=endpoint(302), c=endpoint(303)))
        await rest()
        assert node.seen == {"b": 302, "c": 303}
        node.tables.pod_slices.delete("one")
        await rest()
        assert node.seen == {}
        assert node.informers == [node.slices]


async def test_slices_that_do_not_cover_yet_lose_nobody() -> None:
    """The operator has begun: agents go on with each pod's own report until it is through."""
    node = Node()
    node.reported = {("ns", "a"): endpoint(300), ("ns", "b"): endpoint(301), ("ns", "new"): endpoint(302)}
    node.slices.rows = {"one": batch(5, a=endpoint(300))}
    node.slices.go.set()
    async with running(node):
        await rest()
        assert node.pods[0].running and not node.tables.remote_endpoints.synced
        node.pods[0].go.set()
        await rest()
        assert node.seen == {"a": 300, "b": 301, "new": 302}
        changed = node.tables.remote_endpoints.subscribe(initial=False)
        node.tables.pod_slices.upsert("two", batch(6, b=endpoint(301)))
        await rest()
        node.tables.pod_slices.upsert(COVER, batch(7, ""))
        await rest()
        assert not node.pods[0].running and node.informers == [node.slices]
        assert node.seen == {"a": 300, "b": 301, "new": 302} and not changed.drain()  # not even for a moment
        node.tables.pod_slices.upsert("two", batch(8, b=endpoint(301), new=endpoint(302)))
        await rest()
        node.now = 31.0
        node.tables.pod_slices.upsert("two", batch(9, b=endpoint(301), new=endpoint(302), more=endpoint(303)))
        await rest()
        assert node.seen == {"a": 300, "b": 301, "new": 302, "more": 303}


async def test_who_never_comes_into_a_slice_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    node = Node()
    node.remotes.clock, node.remotes.linger = asyncio.get_running_loop().time, 0.05
    node.reported = {("ns", "gone"): endpoint(300)}
    node.slices.go.set()
    async with running(node):
        await rest()
        node.pods[0].go.set()
        await rest()
        node.tables.pod_slices.upsert(COVER, batch(7, ""))
        await rest()
        assert node.seen == {"gone": 300}
        async with asyncio.timeout(10):
            while node.seen:  # noqa: ASYNC110 - what is waited for has no event
                await asyncio.sleep(0.01)


async def test_back_to_single_reports() -> None:
    """The slices may be deleted at once: what was known stays until all reports have been seen."""
    node = Node()
    node.slices.rows = {"one": batch(5, a=endpoint(300)), COVER: batch(6, "")}
    node.slices.go.set()
    node.reported = {("ns", "a"): endpoint(300), ("ns", "b"): endpoint(301)}
    async with running(node):
        await rest()
        node.tables.pod_slices.delete(COVER)
        node.tables.pod_slices.delete("one")
        await rest()
        assert node.seen == {"a": 300} and node.pods[0].running
        node.pods[0].go.set()
        await rest()
        assert node.seen == {"a": 300, "b": 301}
        node.tables.pod_slices.upsert("one", batch(9, a=endpoint(999)))
        await rest()
        assert node.seen["a"] == 300, "slices that don't cover count for nothing"


async def waiting(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """The node has followed slices, then all of them went; its turn to list comes a minute later."""
    monkeypatch.setattr(remotes, "RELIST_ROW", 60.0)
    monkeypatch.setattr(remotes, "RELIST_MOST", 60.0)
    node.remotes.random = lambda: 1.0
    await rest()
    node.tables.pod_slices.delete(COVER)
    await rest()
    node.tables.pod_slices.delete("one")
    await rest()
    assert not node.pods and node.seen == {"a": 300, "b": 301}


async def test_agents_do_not_all_list_in_the_instant_in_which_slices_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator deletes slices meanwhile: whoever was known stays until this agent's own list is complete."""
    node = Node()
    node.slices.rows = {"one": batch(5, a=endpoint(300), b=endpoint(301)), COVER: batch(6, "")}
    node.slices.go.set()
    node.reported = {("ns", "a"): endpoint(300), ("ns", "new"): endpoint(302)}
    async with running(node):
        await waiting(node, monkeypatch)
        node.now = 59.0
        node.tables.pod_slices.upsert("late", batch(7, a=endpoint(999)))
        await rest()
        assert not node.pods and node.seen == {"a": 300, "b": 301}
        node.now = 60.0
        node.tables.pod_slices.delete("late")
        await rest()
        assert node.pods[0].running and node.seen == {"a": 300, "b": 301}
        node.pods[0].go.set()
        await rest()
        assert node.seen == {"a": 300, "new": 302} and node.remotes.switches == 1


async def test_a_cover_that_comes_back_in_time_costs_no_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody deleted it by hand: the operator writes it again, and what slices say by then counts in one step."""
    node = Node()
    node.slices.rows = {"one": batch(5, a=endpoint(300), b=endpoint(301)), COVER: batch(6, "")}
    node.slices.go.set()
    async with running(node):
        await waiting(node, monkeypatch)
        node.tables.pod_slices.upsert("two", batch(8, a=endpoint(303)))
        node.tables.pod_slices.upsert(COVER, batch(9, ""))
        await rest()
        assert node.seen == {"a": 303, "b": 301}, "who is in no slice yet lingers"
        node.now = 31.0
        node.tables.pod_slices.upsert("two", batch(10, a=endpoint(304)))
        await rest()
        assert node.seen == {"a": 304} and not node.pods and node.remotes.switches == 0


async def test_a_server_without_the_kind() -> None:
    node = Node()
    node.slices.missing = True
    node.reported = {("ns", "a"): endpoint(300)}
    async with running(node):
        await rest()
        node.pods[0].go.set()
        await rest()
        assert node.seen == {"a": 300} and node.tables.remote_endpoints.synced


def union() -> tuple[SliceUnion, dict[ObjectKey, RemoteEndpoint]]:
    shown: dict[ObjectKey, RemoteEndpoint] = {}
    return SliceUnion(shown.__setitem__, lambda key: shown.pop(key, None), shown.__contains__), shown


def test_in_two_slices_the_younger_one_counts_then_what_was_written_last() -> None:
    one, shown = union()
    one.put("a", batch(5, pod=endpoint(300)))
    one.put("b", batch(6, pod=endpoint(301)))
    assert shown["ns", "pod"].identity == 301
    one.put("a", batch(7, pod=endpoint(300), other=endpoint(9)))
    assert shown["ns", "pod"].identity == 300
    one.put("b", batch(4, pod=endpoint(302, "2026-01-01T00:00:01Z")))
    assert shown["ns", "pod"].identity == 302
    one.put("b", None)
    assert shown["ns", "pod"].identity == 300
    one.put("a", None)
    assert not shown


@pytest.mark.parametrize("seed", range(30))
def test_against_a_plain_reading(seed: int) -> None:
    source = random.Random(seed)
    one, shown = union()
    slices: dict[str, PodSlice] = {}
    for version in range(300):
        name = f"s{source.randrange(6)}"
        if name in slices and source.random() < 0.3:
            del slices[name]
            one.put(name, None)
        else:
            endpoints = {
                f"p{n}": endpoint(source.randrange(256, 260), f"2026-01-01T00:00:0{source.randrange(3)}Z")
                for n in range(8) if source.random() < 0.4
            }  # fmt: skip
            slices[name] = batch(version, source.choice("ab"), **endpoints)
            one.put(name, slices[name])
        told = [(s.namespace, n, e.created, s.version, e) for s in slices.values() for n, e in s.endpoints.items()]
        plain = {(ns, n): e for ns, n, _, _, e in sorted(told, key=lambda t: t[:4])}
        assert shown == plain
