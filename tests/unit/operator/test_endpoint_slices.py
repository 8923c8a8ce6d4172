"""The writer of slices against a server of a few lines: refusals, foreign hands, limits, and what agents are told."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from fimbria.operator import endpoint_slices
from fimbria.operator.endpoint_slices import (
    COVER,
    EndpointSliceWriter,
    NamespaceWords,
    Reported,
    entry,
    namespace_words,
    reported,
    slice_name,
    stored,
    withdraw,
)
from fimbria.sources.k8s.errors import AlreadyExists, Conflict, NotFound, Unavailable
from fimbria.sources.k8s.types.cilium import CiliumEndpoint, CiliumEndpointSlice, CiliumNode
from fimbria.sources.k8s.types.core import Namespace
from fimbria.tables import ObjectKey
from fimbria.tables.table import Table


def endpoint(name: str, identity: int = 300, **meta: Any) -> CiliumEndpoint:
    networking = {"addressing": [{"ipv4": "10.0.0.9", "ipv6": "fd00::9"}], "node": "172.31.2.10"}
    status = {
        "id": 7, "state": "ready", "identity": {"id": identity, "labels": ["k8s:app=x"]}, "networking": networking,
        "encryption": {"key": 0}, "named-ports": [{"name": "web", "port": 80, "protocol": "TCP"}],
    }  # fmt: skip
    metadata = {"name": name, "namespace": "ns", "creationTimestamp": "2026-01-01T00:00:00Z", **meta}
    return msgspec.convert({"metadata": metadata, "status": status}, CiliumEndpoint)


class Server:
    """Slices by name, and the tables that its watches fill; `trouble` is raised instead of the next answers."""

    def __init__(self) -> None:
        self.objects: dict[str, CiliumEndpointSlice] = {}
        self.version = 0
        self.trouble: list[Exception] = []
        self.requests: list[tuple[str, str]] = []
        self.slices: Table[str, Any] = Table("slices")
        self.endpoints: Table[ObjectKey, Reported] = Table("endpoints")
        self.namespaces: Table[str, NamespaceWords] = Table("namespaces")
        self.nodes: Table[str, CiliumNode] = Table("nodes")
        self.watching = True
        for table in (self.slices, self.endpoints, self.namespaces, self.nodes):
            table.mark_synced()

    def put(self, name: str, body: Any) -> CiliumEndpointSlice:
        self.version += 1
        data = json.loads(msgspec.json.encode(body))
        data.setdefault("metadata", {}).update(name=name, resourceVersion=str(self.version))
        self.objects[name] = made = msgspec.convert(data, CiliumEndpointSlice)
        if self.watching:
            self.slices.upsert(name, stored(made))
        return made

    def drop(self, name: str) -> None:
        del self.objects[name]
        self.slices.delete(name)

    async def _turn(self, method: str, name: str) -> None:
        self.requests.append((method, name))
        await asyncio.sleep(0)
        if self.trouble and name != COVER:
            raise self.trouble.pop(0)

    async def create(self, _kind: Any, body: Any, _namespace: str = "") -> CiliumEndpointSlice:
        name = body["metadata"]["name"]
        await self._turn("create", name)
        if name in self.objects:
            raise AlreadyExists("create", 409)
        return self.put(name, body)

    async def replace(self, _kind: Any, name: str, body: Any) -> CiliumEndpointSlice:
        await self._turn("replace", name)
        if name not in self.objects:
            raise NotFound("replace", 404)
        if self.objects[name].metadata.resource_version != body["metadata"]["resourceVersion"]:
            raise Conflict("replace", 409)
        return self.put(name, body)

    async def delete(self, _kind: Any, name: str, resource_version: str = "", missing_ok: bool = False) -> None:
        await self._turn("delete", name)
        if name not in self.objects:
            if missing_ok:
                return
            raise NotFound("delete", 404)
        self.drop(name)

    async def get(self, _kind: Any, name: str) -> CiliumEndpointSlice:
        if name not in self.objects:
            raise NotFound("get", 404)
        return self.objects[name]

    async def list(self, _kind: Any) -> Any:
        class Listed:
            items = tuple(self.objects.values())

        return Listed

    def report(self, name: str, identity: int = 300) -> None:
        self.endpoints.upsert(("ns", name), reported(endpoint(name, identity)))

    def held(self) -> dict[str, int]:
        found = [(e.name, e.id) for name, s in self.objects.items() if name != COVER for e in s.endpoints or ()]
        assert len(found) == len(dict(found))
        return dict(found)


@asynccontextmanager
async def writing(server: Server) -> AsyncIterator[EndpointSliceWriter]:
    client: Any = server
    writer = EndpointSliceWriter(client, server.endpoints, server.slices, server.namespaces, server.nodes)
    task = asyncio.create_task(writer.run())
    try:
        yield writer
        assert not task.done(), task.exception()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(check: Callable[[], bool], within: float = 10.0) -> None:
    deadline = time.monotonic() + within
    while not check():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def test_everybody_is_written_before_agents_are_told() -> None:
    server = Server()
    for n in range(250):
        server.report(f"pod{n}")
    async with writing(server) as writer:
        await until(lambda: COVER in server.objects)
        assert server.held() == {f"pod{n}": 300 for n in range(250)}
        assert [m for m, _ in server.requests] == ["create"] * 4 and server.requests[-1][1] == COVER
        server.report("late")
        server.report("pod3", 301)
        await until(lambda: server.held().get("late") == 300 and server.held()["pod3"] == 301)
        assert writer.outcomes == {("create", "done"): 3, ("update", "done"): 2}


async def test_refusals_and_failures_are_mended() -> None:
    server = Server()
    server.trouble = [Unavailable("create", 0), Conflict("create", 409), AlreadyExists("create", 409)]
    server.report("a")
    async with writing(server) as writer:
        await until(lambda: server.held() == {"a": 300})
        (name,) = (n for n in server.objects if n != COVER)
        server.watching = False  # the watch is late: what others wrote is found out by the refusal
        server.put(name, {"namespace": "ns", "endpoints": []})
        server.report("b")
        await until(lambda: server.held() == {"a": 300, "b": 300})
        assert writer.outcomes["update", "refused"] >= 1


async def test_a_slice_that_makes_no_sense_is_put_right() -> None:
    server = Server()
    server.report("a")
    twice = [{"name": "a", "id": 300, "networking": {"addressing": []}}] * 2
    server.put("odd", {"namespace": "ns", "endpoints": twice})
    server.put("nowhere", {"endpoints": twice})
    server.put("full", {"namespace": "ns", "endpoints": [{"name": f"gone{n}"} for n in range(150)]})
    async with writing(server):
        await until(lambda: server.held() == {"a": 300} and COVER in server.objects if _unique(server) else False)
    assert set(server.objects) == {"odd", COVER}


def _unique(server: Server) -> bool:
    names = [e.name for s in server.objects.values() for e in s.endpoints or ()]
    return len(names) == len(set(names))


async def test_a_fault_of_ours_ends_the_process() -> None:
    server = Server()
    server.trouble = [ValueError("no such thing")]
    server.report("a")
    client: Any = server
    writer = EndpointSliceWriter(client, server.endpoints, server.slices, server.namespaces, server.nodes)
    with pytest.raises(ValueError, match="no such thing"):
        await asyncio.wait_for(writer.run(), 20)


async def test_the_limit_is_the_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_slices, "RATE_SMALL", (10.0, 5))
    server = Server()
    for n in range(20):
        server.endpoints.upsert((f"ns{n}", "a"), reported(endpoint("a")))
    began = time.monotonic()
    async with writing(server) as writer:
        writer._bucket = endpoint_slices.TokenBucket(10.0, 5)
        await until(lambda: COVER in server.objects)
    assert time.monotonic() - began > 1.3, "5 at once, 15 more at 10 a second"


async def test_withdrawing_begins_with_what_agents_go_by() -> None:
    server = Server()
    for name in ("a", COVER, "b"):
        server.put(name, {"namespace": "ns", "endpoints": []})
    client: Any = server
    await withdraw(client)
    assert not server.objects and server.requests[0] == ("delete", COVER)


def node(name: str, *blocks: str) -> CiliumNode:
    return msgspec.convert({"metadata": {"name": name}, "spec": {"ipam": {"podCIDRs": blocks}}}, CiliumNode)


async def test_a_report_of_another_nodes_address_gets_into_no_slice(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever has taken over one node can write reports under free names, but only about that node's addresses."""
    server = Server()
    server.nodes.upsert("victim", node("victim", "10.0.0.0/24", "fd00::/64"))
    server.nodes.upsert("taken", node("taken", "10.0.1.0/24", "fd00:1::/64"))

    def report(name: str, writer: str, identity: int = 300) -> None:
        made = endpoint(name, identity, annotations={"fimbria.io/node": writer})
        server.endpoints.upsert(("ns", name), reported(made))

    report("lie", "taken")
    report("true", "victim")
    server.report("by-hand")
    async with writing(server) as writer:
        await until(lambda: COVER in server.objects)
        assert set(server.held()) == {"true", "by-hand"} and len(writer.origins) == 1
        ignored = next(m for m in writer.metrics() if m.name == "fimbria_reports_ignored")
        assert ignored.samples[0].value == 1
        told = [r.getMessage() for r in caplog.records if "gets into no slice" in r.message]
        assert told == [
            "CiliumEndpoint ns/lie gets into no slice: 10.0.0.9 is in no pod block of node taken, whose agent wrote it"
        ]
        # One that was true becomes one: others' rights for the same address.
        report("by-hand", "taken", 301)
        await until(lambda: set(server.held()) == {"true"})
        server.endpoints.delete(("ns", "lie"))
        await until(lambda: len(writer.origins) == 1)


async def test_a_report_that_comes_before_its_node_waits_for_it(caplog: pytest.LogCaptureFixture) -> None:
    server = Server()
    made = endpoint("a", annotations={"fimbria.io/node": "new"})
    async with writing(server) as writer:
        server.endpoints.upsert(("ns", "a"), reported(made))
        server.nodes.upsert("new", node("new"))  # it asks for its blocks
        await until(lambda: len(writer.origins) == 1 and COVER in server.objects)
        assert server.held() == {}
        server.nodes.upsert("new", node("new", "10.0.0.0/24"))
        await until(lambda: bool(writer.origins.waiting["new"][("ns", "a")]))
        server.nodes.upsert("new", node("new", "10.0.0.0/24", "fd00::/64", "no block"))
        await until(lambda: server.held() == {"a": 300})
        assert len(writer.origins) == 0 and not writer.origins.waiting
        # What was let in stays while its node is gone: its pods' reports are removed by who removes them.
        server.nodes.delete("new")
        await asyncio.sleep(0.05)
        assert server.held() == {"a": 300}
    assert [r.message for r in caplog.records].count(
        "CiliumEndpoint ns/a gets into no slice: fd00::9 is in no pod block of node new, whose agent wrote it"
    ) == 1


def test_what_is_kept_of_a_report() -> None:
    one = reported(endpoint("a"))
    assert (one.identity, one.owned) == (300, False)
    assert json.loads(one.entry) == {
        "name": "a", "id": 300, "created": "2026-01-01T00:00:00Z",
        "networking": {"addressing": [{"ipv4": "10.0.0.9", "ipv6": "fd00::9"}], "node": "172.31.2.10"},
        "named-ports": [{"name": "web", "port": 80, "protocol": "TCP"}],
    }  # fmt: skip
    owner = [{"kind": "Pod", "name": "a", "uid": "1"}]
    assert reported(endpoint("a", ownerReferences=owner), entries=False) == Reported(300, True, b"")
    assert reported(endpoint("a", 0)).entry == b""
    with pytest.raises(ValueError, match="no pod's identity"):
        reported(endpoint("a", 1))
    # What is stored reads back as the same bytes, or each slice would be written again and again.
    back = msgspec.json.decode(b'{"namespace":"ns","endpoints":[' + one.entry + b"]}", type=CiliumEndpointSlice)
    assert stored(back).endpoints == {"a": entry(endpoint("a"))}


def test_a_pod_with_very_many_ports_leaves_its_neighbours_room() -> None:
    """etcd takes 1.5 MiB as one object: a slice that is larger could never be written again."""
    ports = [{"name": f"port-number-{n:03d}"[:15], "port": n + 1, "protocol": "TCP"} for n in range(3000)]
    raw = msgspec.to_builtins(endpoint("many"))
    raw["status"]["named-ports"] = ports
    written = endpoint_slices.entry(msgspec.convert(raw, CiliumEndpoint))
    assert len(json.loads(written)["named-ports"]) == endpoint_slices.NAMED_PORTS
    assert 100 * len(written) < 1 << 20


def test_names_and_priorities() -> None:
    name = slice_name()
    assert len(name) == 19 and [len(p) for p in name.split("-")] == [3, 9, 5]
    notes = {"cilium.io/ces-namespace": "priority"}
    asked = msgspec.convert({"metadata": {"name": "x", "annotations": notes, "labels": {"a": "b"}}}, Namespace)
    assert namespace_words(asked) == NamespaceWords({"a": "b"}, True)


async def test_a_cancellation_that_comes_with_news_is_heard() -> None:
    for _ in range(200):
        server = Server()
        client: Any = server
        writer = EndpointSliceWriter(client, server.endpoints, server.slices, server.namespaces, server.nodes)
        task = asyncio.create_task(writer.run())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        server.report("a")
        task.cancel()
        _, pending = await asyncio.wait((task,), timeout=5)
        assert not pending
