"""The writer of pod blocks against a server of a few lines: refusals, and nodes that wait for a block."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from fimbria.decide.node_blocks import BlockAllocator, Pool
from fimbria.operator.blocks import BATCH, NodeBlockWriter
from fimbria.sources.k8s.errors import Forbidden
from fimbria.sources.k8s.types.cilium import CiliumNode, CiliumNodeSpec, NodeIPAMSpec
from fimbria.sources.k8s.types.meta import ObjectMeta
from fimbria.tables.table import Table


def node(name: str, *cidrs: str) -> CiliumNode:
    return CiliumNode(metadata=ObjectMeta(name=name), spec=CiliumNodeSpec(ipam=NodeIPAMSpec(pod_cidrs=cidrs)))


class Server:
    """Stores what is patched and shows it, as a watch does."""

    def __init__(self) -> None:
        self.nodes: Table[str, CiliumNode] = Table("nodes")
        self.nodes.mark_synced()
        self.refused: dict[str, int] = {}
        self.problems: dict[str, str] = {}

    async def patch(self, _resource: Any, name: str, patch: Any) -> None:
        if name in self.refused:
            self.refused[name] += 1
            raise Forbidden(f"patch {name}", 403, text="no right")
        self.nodes.upsert(name, node(name, *patch["spec"]["ipam"]["podCIDRs"]))

    async def patch_status(self, _resource: Any, name: str, patch: Any) -> None:
        self.problems[name] = patch["ipam"]["operator-status"]["error"]

    def has(self, name: str) -> tuple[str, ...]:
        return tuple(self.nodes[name].spec.ipam.pod_cidrs or ())


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


def start(server: Server, pool: str) -> asyncio.Task[None]:
    writer = NodeBlockWriter(server, server.nodes, BlockAllocator((Pool.parse(pool),)))  # type: ignore[arg-type]
    return asyncio.create_task(writer.run())


async def test_a_freed_block_goes_to_the_node_that_waits_for_one() -> None:
    server = Server()
    server.nodes.upsert("a", node("a", "10.0.0.0/24"))
    server.nodes.upsert("b", node("b"))
    task = start(server, "10.0.0.0/24/24")
    try:
        await until(lambda: "no IPv4 block is free" in server.problems.get("b", ""))
        server.nodes.delete("a")
        await until(lambda: server.has("b") == ("10.0.0.0/24",))
    finally:
        task.cancel()


async def test_a_refused_node_is_said_once_and_delays_no_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fimbria.sources.k8s.retries.RETRY", 0.001)
    server = Server()
    server.refused["a"] = 0
    for name in "ab":
        server.nodes.upsert(name, node(name))
    task = start(server, "10.0.0.0/16/24")
    try:
        await until(lambda: bool(server.has("b")) and server.refused["a"] > 3)
        assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
            "CiliumNode a is not up to date: patch a: 403: no right"
        ]
        del server.refused["a"]
        await until(lambda: bool(server.has("a")))
    finally:
        task.cancel()


async def test_others_on_the_loop_have_their_turn_while_many_nodes_are_looked_at() -> None:
    server = Server()
    for i in range(10 * BATCH):
        server.nodes.upsert(f"n{i}", node(f"n{i}", f"10.{i // 256}.{i % 256}.0/24"))
    task = start(server, "10.0.0.0/8/24")
    server.nodes.upsert("new", node("new"))
    turns = 0
    try:
        async with asyncio.timeout(10):
            while not server.has("new"):
                await asyncio.sleep(0)
                turns += 1
    finally:
        task.cancel()
    assert turns > 10
    assert server.has("new") == ("10.3.232.0/24",)
