"""Reports of endpoints: what the API server refuses, and what it stores otherwise than written."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from fimbria.agent import publisher as module
from fimbria.agent.publisher import Publisher
from fimbria.model.address import pack
from fimbria.model.endpoint import EndpointIdentity, LocalEndpoint, Pod
from fimbria.sources.k8s.errors import Forbidden
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

    async def create(self, _resource: Any, body: Any, namespace: str) -> CiliumEndpoint:
        await asyncio.sleep(0)
        if namespace in self.ending:
            self.tries += 1
            cause = StatusDetails(causes=(StatusCause(reason="NamespaceTerminating"),))
            raise Forbidden("create", 403, Status(message="is being terminated", reason="Forbidden", details=cause))
        if namespace in self.refused:
            self.tries += 1
            raise Forbidden("create", 403, Status(message=f"exceeded quota in {namespace}", reason="Forbidden"))
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
async def running(server: Server, told: Told) -> AsyncIterator[Tables]:
    tables = Tables()
    tables.endpoints.add_index("pod", lambda e: ((e.namespace, e.pod),))
    client: Any = server
    events: Any = told
    task = asyncio.create_task(Publisher(client, tables, NODE, events=events).run())
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
    monkeypatch.setattr(module, "RETRY", 0.2)
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
            assert asyncio.get_running_loop().time() - began < 0.2, "it waited for others"
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
