"""Reports of endpoints: what the API server refuses, and what it stores otherwise than written."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from fimbria.agent.publisher import Publisher
from fimbria.model.address import pack
from fimbria.model.endpoint import EndpointIdentity, LocalEndpoint, Pod, RemoteEndpoint
from fimbria.sources.k8s import retries as module
from fimbria.sources.k8s.errors import AlreadyExists, Forbidden, NotFound
from fimbria.sources.k8s.rows import NODE_ANNOTATION
from fimbria.sources.k8s.types.cilium import CiliumEndpoint
from fimbria.sources.k8s.types.meta import Status, StatusCause, StatusDetails
from fimbria.tables import Tables

NODE = (pack("192.0.2.1"),)


class Server:
    """Stores what it is sent; refuses namespaces, and changes what it is told to."""

    def __init__(self) -> None:
        self.stored: dict[tuple[str, str], Any] = {}
        self.refused: set[str] = set()
        self.ending: set[str] = set()
        self.tries = 0
        self.identity = 0
        self.deleted: list[str] = []
        self.fleeting = False

    def admit(self, verb: str, namespace: str, name: str, body: Any = None) -> Any:
        """What the chart's policy says about an agent of node `here`; the object that is there."""
        if (namespace, name) not in self.stored:
            raise NotFound(verb, 404)
        found = self.stored[namespace, name]
        marks = [o["metadata"].get("annotations", {}).get(NODE_ANNOTATION, "") for o in (found, body) if o]
        if marks[0] not in ("", "here") or marks[1:] not in ([], ["here"]):
            self.tries += 1
            if self.fleeting:
                del self.stored[namespace, name]
            raise Forbidden(verb, 403, Status(message="of its own node only", reason="Forbidden"))
        return found

    async def get(self, _resource: Any, name: str, namespace: str) -> CiliumEndpoint:
        await asyncio.sleep(0)
        if (namespace, name) not in self.stored:
            raise NotFound("get", 404)
        return msgspec.convert(self.stored[namespace, name], CiliumEndpoint)

    async def patch(self, _resource: Any, name: str, body: Any, namespace: str) -> CiliumEndpoint:
        await asyncio.sleep(0)
        self.admit("patch", namespace, name, body)
        self.stored[namespace, name] = body
        return msgspec.convert(body, CiliumEndpoint)

    async def delete(self, _resource: Any, name: str, namespace: str, **_preconditions: Any) -> None:
        await asyncio.sleep(0)
        self.admit("delete", namespace, name)
        self.deleted.append(name)
        del self.stored[namespace, name]

    async def create(self, _resource: Any, body: Any, namespace: str) -> CiliumEndpoint:
        await asyncio.sleep(0)
        if namespace in self.ending:
            self.tries += 1
            cause = StatusDetails(causes=(StatusCause(reason="NamespaceTerminating"),))
            raise Forbidden("create", 403, Status(message="is being terminated", reason="Forbidden", details=cause))
        if namespace in self.refused:
            self.tries += 1
            raise Forbidden("create", 403, Status(message=f"exceeded quota in {namespace}", reason="Forbidden"))
        if (namespace, body["metadata"]["name"]) in self.stored:
            raise AlreadyExists("create", 409)
        if self.identity:
            body = {**body, "status": {**body["status"], "identity": {"id": self.identity}}}
        self.stored[namespace, body["metadata"]["name"]] = body
        return msgspec.convert(body, CiliumEndpoint)


class Told:
    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def emit(self, _resource: Any, meta: Any, _type: str, reason: str, _message: str) -> None:
        self.events.append((meta.name, reason))


def add(tables: Tables, number: int, namespace: str) -> None:
    name = f"p{number}"
    tables.pods.upsert((namespace, name), Pod(namespace, name, f"uid{number}", {}, "default", (), False))
    tables.endpoint_identities.upsert(number, EndpointIdentity(1000, {"k8s:app": "a"}))
    tables.endpoints.upsert(number, LocalEndpoint(
        number, f"{number:064x}", "eth0", "n", "/run/netns/x", namespace, name, f"uid{number}", "fim1", 7, bytes(6),
        bytes(6), pack(f"10.0.0.{number}"),
    ))  # fmt: skip


@asynccontextmanager
async def running(server: Server, told: Told, tables: Tables | None = None) -> AsyncIterator[Tables]:
    if tables is None:
        tables = Tables()
        tables.endpoints.add_index("pod", lambda e: ((e.namespace, e.pod),))
    client: Any = server
    events: Any = told
    task = asyncio.create_task(Publisher(client, tables, "here", NODE, events=events).run())
    await asyncio.sleep(0)
    try:
        yield tables
        assert not task.done(), task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(condition: Any, seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_a_refused_namespace_delays_no_other(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(module, "RETRY", 1.0)
    server, told = Server(), Told()
    server.refused = {"full"}
    with caplog.at_level(logging.WARNING):
        async with running(server, told) as tables:
            for number in range(1, 31):
                add(tables, number, "full")
            await until(lambda: server.tries >= 30)
            began = asyncio.get_running_loop().time()
            add(tables, 99, "fine")
            await until(lambda: ("fine", "p99") in server.stored)
            assert asyncio.get_running_loop().time() - began < module.RETRY, "it waited for others"
            await until(lambda: server.tries >= 60)
            assert told.events.count(("p7", "NotReported")) == 1
            assert caplog.text.count("full/p7 is not up to date") == 1
            server.refused = set()
            await until(lambda: len(server.stored) == 31)


async def test_a_namespace_that_ends_is_no_news(caplog: Any) -> None:
    server, told = Server(), Told()
    server.ending.add("ending")
    with caplog.at_level(logging.WARNING):
        async with running(server, told) as tables:
            add(tables, 1, "ending")
            await until(lambda: server.tries)
    assert (told.events, caplog.text) == ([], "")


async def test_what_is_stored_otherwise_is_said(caplog: Any) -> None:
    server, told = Server(), Told()
    server.identity = 4711
    async with running(server, told) as tables:
        add(tables, 1, "ns")
        await until(lambda: told.events)
    assert told.events == [("p1", "ReportChanged")]
    assert "4711" in caplog.text


def report(name: str, node: str, addr: str = "10.9.0.9") -> dict[str, Any]:
    """As `node`'s agent writes it (nobody's if empty), or as the one that had our address before."""
    meta: dict[str, Any] = {"name": name, "namespace": "ns"}
    if node:
        meta["annotations"] = {NODE_ANNOTATION: node}
    networking = {"node": "192.0.2.1", "addressing": [{"ipv4": addr}]}
    return {"metadata": meta, "status": {"id": 1, "identity": {"id": 1000}, "networking": networking}}


def reported(tables: Tables, server: Server, name: str, node: str) -> None:
    server.stored["ns", name] = report(name, node)
    seen = RemoteEndpoint(1000, (pack("10.9.0.9"),), NODE[0], (), "")
    tables.remote_endpoints.upsert(("ns", name), seen)


def writer(server: Server, name: str) -> str:
    return str(server.stored["ns", name]["metadata"]["annotations"][NODE_ANNOTATION])


async def test_a_pod_that_moved_here_is_reported_when_the_former_report_is_gone(caplog: Any) -> None:
    server, told = Server(), Told()
    with caplog.at_level(logging.INFO):
        async with running(server, told) as tables:
            reported(tables, server, "p1", "there")
            add(tables, 1, "ns")
            await until(lambda: server.tries >= 2)
            assert writer(server, "p1") == "there"
            del server.stored["ns", "p1"]
            tables.remote_endpoints.delete(("ns", "p1"))
            # The watch says it: there is no waiting for the next try, which would come after twice the first pause.
            await until(lambda: ("ns", "p1") in server.stored, module.RETRY)
            assert writer(server, "p1") == "here"
    assert told.events == []
    assert [r.levelname for r in caplog.records if "was on node there" in r.getMessage()] == ["INFO"]
    assert "not up to date" not in caplog.text


async def test_a_report_that_goes_while_it_is_in_the_way_is_no_news(caplog: Any) -> None:
    server, told = Server(), Told()
    server.fleeting = True
    with caplog.at_level(logging.INFO):
        async with running(server, told) as tables:
            reported(tables, server, "p1", "there")
            add(tables, 1, "ns")
            await until(lambda: ("ns", "p1") in server.stored and writer(server, "p1") == "here")
    assert (server.tries, told.events, caplog.text) == (1, [], "")


async def test_a_report_that_another_node_keeps_is_said(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(module, "RETRY", 0.001)
    server, told = Server(), Told()
    async with running(server, told) as tables:
        reported(tables, server, "p1", "there")
        add(tables, 1, "ns")
        await until(lambda: told.events)
    assert told.events == [("p1", "NotReported")] and "of its own node only" in caplog.text


async def test_what_nobody_wrote_is_taken_over() -> None:
    server, told = Server(), Told()
    async with running(server, told) as tables:
        reported(tables, server, "p1", "")
        add(tables, 1, "ns")
        await until(lambda: server.stored["ns", "p1"]["metadata"].get("annotations"))
    assert writer(server, "p1") == "here" and told.events == []


async def test_only_this_nodes_old_reports_are_removed() -> None:
    """Also where another node had the address before that is ours now."""
    server, told = Server(), Told()
    tables = Tables()
    tables.endpoints.add_index("pod", lambda e: ((e.namespace, e.pod),))
    for name, node in (("mine", "here"), ("other", "there"), ("older", "")):
        reported(tables, server, name, node)
    async with running(server, told, tables):
        await until(lambda: len(server.deleted) == 2)
        await asyncio.sleep(0.05)
    assert set(server.deleted) == {"mine", "older"} and server.tries == 0


@pytest.mark.parametrize("networking", [
    {"node": "node-1.example", "addressing": []},
    {"node": "192.0.2.1", "addressing": [{"ipv4": "pending"}]},
])  # fmt: skip
async def test_a_report_that_cannot_be_read_is_left_alone(
    networking: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Anybody who may write CiliumEndpoints may write such a one: it ends no agent, and others are still removed."""
    server = Server()
    for name, said in (("odd", networking), ("old", {"node": "192.0.2.1", "addressing": []})):
        server.stored["ns", name] = {"metadata": {"name": name, "namespace": "ns"}, "status": {"networking": said}}
    client: Any = server
    tables = Tables()
    tables.endpoints.add_index("pod", lambda e: ((e.namespace, e.pod),))
    publisher = Publisher(client, tables, "here", NODE)
    task = asyncio.create_task(publisher.run())
    try:
        await asyncio.sleep(0)
        publisher._note([("ns", "odd"), ("ns", "old")])
        for _ in range(20):
            await asyncio.sleep(0)
        assert not task.done() and server.deleted == ["old"] and ("ns", "odd") in server.stored
        assert "CiliumEndpoint ns/odd is left alone" in caplog.text
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
