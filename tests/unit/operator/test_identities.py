"""Which identities the operator makes for which pods."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from fimbria.decide.identity import Existing, IdentitiesExhausted, IdentityAllocator
from fimbria.model.labels import NAMESPACE, LabelFilter, Labels
from fimbria.operator.endpoint_slices import NamespaceWords
from fimbria.operator.identities import WORKERS, IdentityMaker, PodWords, SlimPod, pod_words
from fimbria.sources.k8s.errors import Unavailable
from fimbria.tables.table import Table


class Search:
    """Stands in for IdentitySearch: the first attempt for each set of labels fails."""

    def __init__(self, identities: Table[int, Existing]) -> None:
        self.allocator = IdentityAllocator()
        self.identities = identities
        self.asked: list[Labels] = []
        self.created = 0

    async def number(self, labels: Labels) -> int:
        self.asked.append(labels)
        if self.asked.count(labels) == 1:
            raise Unavailable("create", 0)
        number = self.allocator.number(labels) or 300 + len(self.identities)
        self.allocator.on_seen(number, labels)
        self.identities.upsert(number, Existing(labels, False, "1"))
        return number


class World:
    def __init__(self) -> None:
        self.pods: Table[Any, PodWords] = Table("pods")
        self.namespaces: Table[str, NamespaceWords] = Table("namespaces")
        self.identities: Table[int, Existing] = Table("identities")
        for table in (self.pods, self.namespaces, self.identities):
            table.mark_synced()
        self.search = Search(self.identities)
        search: Any = self.search
        self.maker = IdentityMaker(
            search, self.pods, self.namespaces, self.identities, LabelFilter.of(["!build"]), "default"
        )

    def pod(self, name: str, namespace: str = "ns", **labels: str) -> None:
        self.pods.upsert((namespace, name), PodWords(Labels(labels), "default"))

    def made(self) -> list[dict[str, str]]:
        rows = (row.labels for row in self.identities.values())
        return [{k: v for k, v in labels.items() if not k.startswith("k8s:io.cilium.k8s.policy")} for labels in rows]


@asynccontextmanager
async def making(world: World, monkeypatch: Any) -> AsyncIterator[None]:
    monkeypatch.setattr("fimbria.operator.identities.RETRY", 0.001)
    task = asyncio.create_task(world.maker.run())
    try:
        yield
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(check: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not check():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.005)
    await asyncio.sleep(0.02)  # what shouldn't follow has its chance


async def test_one_for_each_set_of_relevant_labels(monkeypatch: Any) -> None:
    world = World()
    async with making(world, monkeypatch):
        world.pod("a", app="web", build="1")
        world.pod("b", app="web", build="2")
        await asyncio.sleep(0.02)
        assert world.made() == [], "nothing is known of the namespace yet"
        world.namespaces.upsert("ns", NamespaceWords({}, False))
        await until(lambda: bool(world.made()))
        assert world.made() == [{"k8s:app": "web", "k8s:io.kubernetes.pod.namespace": "ns"}]
        assert len(world.search.asked) == 2, "a failure is tried again, success isn't"
        assert world.maker.wanted() == {300}
        world.namespaces.upsert("ns", NamespaceWords({"team": "red"}, False))
        await until(lambda: len(world.made()) > 1)
        assert len(world.made()) == 2 and world.maker.wanted() == {301}
        world.namespaces.upsert("ns", NamespaceWords({"team": "red"}, True))
        await asyncio.sleep(0.02)
        assert len(world.search.asked) == 4, "a namespace's priority is no label"
        world.pods.delete(("ns", "a"))
        world.pods.delete(("ns", "b"))
        await until(lambda: not world.maker.wanted())
        assert world.maker.wanted() == set()


async def test_a_namespace_that_gets_none_keeps_no_other_waiting(
    monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """More of its labels wait than there are workers; each is said once."""
    world = World()
    really = world.search.number

    async def number(labels: Labels) -> int:
        if labels[NAMESPACE] == "greedy":
            raise IdentitiesExhausted("namespace greedy has enough")
        return await really(labels)

    monkeypatch.setattr(world.search, "number", number)
    async with making(world, monkeypatch):
        for namespace in ("greedy", "ns"):
            world.namespaces.upsert(namespace, NamespaceWords({}, False))
        for n in range(2 * WORKERS):
            world.pod(str(n), "greedy", app=str(n))
        await asyncio.sleep(0.02)
        world.pod("a", app="web")
        await until(lambda: bool(world.made()))
        assert world.made() == [{"k8s:app": "web", "k8s:io.kubernetes.pod.namespace": "ns"}]
    said = [r for r in caplog.records if r.levelname == "WARNING" and "has enough" in r.getMessage()]
    assert len(said) == 2 * WORKERS


async def test_what_is_deleted_or_marked_while_pods_have_it_is_made_again(monkeypatch: Any) -> None:
    world = World()
    async with making(world, monkeypatch):
        world.namespaces.upsert("ns", NamespaceWords({}, False))
        world.pod("a", app="web")
        await until(lambda: bool(world.made()))
        asked = len(world.search.asked)
        world.identities.delete(300)
        await until(lambda: bool(world.made()))
        assert len(world.search.asked) == asked + 1 and len(world.identities) == 1
        (number,) = world.identities
        world.identities.upsert(number, Existing(world.identities[number].labels, True, "9"))
        await until(lambda: len(world.search.asked) > asked + 1)
        assert len(world.search.asked) == asked + 2


def test_pods_without_an_identity() -> None:
    def words(**spec: Any) -> PodWords | None:
        status = {"phase": spec.pop("phase", "Running")}
        obj = {"metadata": {"name": "a", "labels": {"app": "x"}}, "spec": spec, "status": status}
        return pod_words(msgspec.convert(obj, SlimPod))

    assert words(serviceAccountName="sa") == PodWords(Labels({"app": "x"}), "sa")
    assert words(phase="Pending") is not None
    assert words(hostNetwork=True) is None
    assert words(phase="Succeeded") is words(phase="Failed") is None
