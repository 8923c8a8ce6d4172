"""What is removed, and what isn't although it looks unused."""

from functools import partial
from typing import Any

import msgspec
import pytest

from fimbria.decide.identity import SIZE, Existing, IdentityCollector, nearly_exhausted
from fimbria.model.labels import Labels
from fimbria.operator import collect
from fimbria.operator.collect import Collector
from fimbria.operator.endpoint_slices import Reported
from fimbria.sources.k8s.errors import ApiError, Forbidden, Invalid, NotFound, Unavailable
from fimbria.sources.k8s.rows import UNUSED_ANNOTATION
from fimbria.sources.k8s.types.cilium import CiliumNode
from fimbria.sources.k8s.types.meta import ApiObject
from fimbria.tables.table import Table


class Server:
    """Objects by (plural, namespace, name); identities' marks and deletions come back into the table."""

    def __init__(self) -> None:
        self.objects: set[tuple[str, str, str]] = set()
        self.identities: Table[int, Existing] = Table("identities")
        self.endpoints: Table[Any, Reported] = Table("endpoints")
        self.nodes: Table[str, CiliumNode] = Table("nodes")
        self.deleted: list[tuple[str, str, str]] = []
        self.requests = 0
        self.version = 0

    def identity(self, number: int, *, marked: bool = False) -> None:
        self.version += 1
        self.identities.upsert(number, Existing(Labels({"k8s:n": str(number)}), marked, str(self.version)))

    async def get(self, kind: Any, name: str, namespace: str = "") -> ApiObject:
        self.requests += 1
        if (kind.plural, namespace, name) not in self.objects:
            raise NotFound("get", 404)
        return msgspec.convert({"metadata": {"name": name, "uid": "u", "resourceVersion": "5"}}, ApiObject)

    async def patch(self, _kind: Any, name: str, patch: Any) -> None:
        self.requests += 1
        assert patch["metadata"]["resourceVersion"] == self.identities[int(name)].version
        self.identity(int(name), marked=patch["metadata"]["annotations"][UNUSED_ANNOTATION] is not None)

    async def delete(self, kind: Any, name: str, namespace: str = "", **preconditions: str) -> None:
        self.requests += 1
        assert preconditions["resource_version"], "never without"
        self.deleted.append((kind.plural, namespace, name))
        if kind.plural == "ciliumidentities":
            self.identities.delete(int(name))


class World:
    def __init__(self, grace: float = 100.0) -> None:
        self.server = Server()
        self.now = 0.0
        self.up_to_date = True
        client: Any = self.server
        self.wanted: set[int] = set()
        self.collector = Collector(
            client, self.server.identities, self.server.endpoints, self.server.nodes, IdentityCollector(grace),
            60.0, 1e6, lambda: self.up_to_date, lambda: self.wanted, lambda: self.now,
        )  # fmt: skip

    async def passes(self, *times: float) -> list[tuple[str, str, str]]:
        self.server.deleted.clear()
        for self.now in times:
            await self.collector.collect()
        return self.server.deleted


async def test_numbers_that_run_out_are_told_once_for_each_percent(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(collect, "nearly_exhausted", partial(nearly_exhausted, size=100))
    world, told = World(), list[str]()
    world.collector.tell = told.append
    for number in range(300, 379):
        world.server.identity(number)
    world.wanted.update(range(300, 400))
    await world.passes(0)
    assert not told and world.collector.warning == ""
    world.server.identity(379)
    await world.passes(1, 2, 3)
    world.server.identity(380)
    await world.passes(4, 5)
    assert [t[:4] for t in told] == ["80 %", "81 %"] and world.collector.warning == told[-1]
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == told
    (ratio,) = [m for m in world.collector.metrics() if m.name == "fimbria_identities_used_ratio"]
    assert ratio.samples[0].value == pytest.approx(81 / SIZE)
    for number in (379, 380):
        world.server.identities.delete(number)
    await world.passes(6)
    assert world.collector.warning == ""


async def test_identities_go_after_the_grace_and_used_ones_stay() -> None:
    world = World()
    for number in (300, 301, 302):
        world.server.identity(number)
    world.server.endpoints.upsert(("ns", "a"), Reported(300, True, b""))
    world.wanted = {301}
    assert await world.passes(0, 60, 120) == []
    assert await world.passes(180) == [("ciliumidentities", "", "302")]
    assert not world.server.identities[300].marked and not world.server.identities[301].marked
    world.wanted = set()
    assert await world.passes(200, 240) == []
    world.server.endpoints.upsert(("ns", "b"), Reported(301, True, b""))
    assert await world.passes(360) == []
    assert not world.server.identities[301].marked, "used again: the mark is taken away"


async def test_a_view_that_stood_still_proves_nothing() -> None:
    world = World(grace=0.0)
    world.server.identity(300)
    world.up_to_date = False
    assert await world.passes(0, 60, 120, 180) == []
    assert world.server.requests == 0 and world.collector.put_off == 4
    world.up_to_date = True
    assert await world.passes(240, 300) == [("ciliumidentities", "", "300")]


async def test_owned_objects_are_kubernetes_business_and_others_are_asked_for_twice() -> None:
    world, server = World(), Server
    del server
    for name, owned in (("owned", True), ("dead", False), ("alive", False)):
        world.server.endpoints.upsert(("ns", name), Reported(0, owned, b""))
        world.server.objects.add(("ciliumendpoints", "ns", name))
    world.server.objects.add(("pods", "ns", "alive"))
    orphan = msgspec.convert({"metadata": {"name": "gone"}}, CiliumNode)
    world.server.nodes.upsert("gone", orphan)
    world.server.objects.add(("ciliumnodes", "", "gone"))
    assert await world.passes(0) == [] and world.server.requests == 0
    assert sorted(await world.passes(60)) == [("ciliumendpoints", "ns", "dead"), ("ciliumnodes", "", "gone")]
    assert world.collector.deletions == {"ciliumendpoints": 1, "ciliumnodes": 1}


async def test_a_pass_over_many_objects_asks_for_nothing() -> None:
    world = World()
    for n in range(2_000):
        world.server.endpoints.upsert(("ns", f"pod{n}"), Reported(256 + n % 50, True, b""))
    for number in range(256, 306):
        world.server.identity(number)
    await world.passes(0, 60, 120)
    assert world.server.requests == 0


async def test_an_object_that_is_refused_holds_up_no_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of identities and of reports without an owner; said once for each reason; a server that is away ends the pass."""
    world, patch, get, reason = World(), world_patch, world_get, ["denied by a webhook"]
    errors: list[type[ApiError]] = [Invalid]

    async def refuse_patch(kind: Any, name: str, body: Any) -> None:
        if name == "300":
            raise errors[0]("patch 300", 422, text=reason[0])
        await patch(world.server, kind, name, body)

    async def refuse_get(kind: Any, name: str, namespace: str = "") -> ApiObject:
        if name == "a":
            raise Forbidden("get a", 403, text="no")
        return await get(world.server, kind, name, namespace)

    monkeypatch.setattr(world.server, "patch", refuse_patch)
    monkeypatch.setattr(world.server, "get", refuse_get)
    for number in (300, 301, 302):
        world.server.identity(number)
    for name in "ab":
        world.server.endpoints.upsert(("ns", name), Reported(999, False, b""))
        world.server.objects.add(("ciliumendpoints", "ns", name))
    gone = await world.passes(0, 1000, 2000, 3000)
    assert ("ciliumendpoints", "ns", "b") in gone and ("ciliumendpoints", "ns", "a") not in gone
    assert {("ciliumidentities", "", "301"), ("ciliumidentities", "", "302")} <= set(gone)
    said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(said) == 2 and "identity 300" in said[0] and "ns/a" in said[1], said
    reason[0] = "denied by another"
    await world.passes(4000, 5000)
    assert sum("denied by another" in r.getMessage() for r in caplog.records) == 1
    errors[0] = Unavailable
    with pytest.raises(Unavailable):
        await world.passes(6000)


world_patch, world_get = Server.patch, Server.get
