"""Gives every CiliumNode its pod blocks, and takes them back from nodes that are gone."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import Final

from fimbria.decide.node_blocks import BlockAllocator
from fimbria.model.address import Prefix
from fimbria.sources.k8s.client import ApiClient
from fimbria.sources.k8s.errors import ApiError, Conflict, NotFound
from fimbria.sources.k8s.resources import CILIUM_NODES
from fimbria.sources.k8s.retries import Retries
from fimbria.sources.k8s.types.cilium import CiliumNode
from fimbria.tables.table import Signal, Table

log = logging.getLogger(__name__)
BATCH: Final = 100  # nodes in one step: their blocks are read in a few milliseconds


@dataclass(slots=True)
class NodeBlockWriter:
    """Writes `spec.ipam.podCIDRs`, and `status.ipam.operator-status.error` with what is wrong."""

    client: ApiClient
    nodes: Table[str, CiliumNode]
    allocator: BlockAllocator
    _lacking: set[str] = field(default_factory=set)
    """Nodes that no block was free for."""
    _due: set[str] = field(default_factory=set)
    _signal: Signal = field(default_factory=Signal)
    _retries: Retries[str] = field(init=False)
    conflicts: int = 0

    def __post_init__(self) -> None:
        self._retries = Retries(lambda name: self._look_at({name}))

    async def run(self) -> None:
        """Follow the nodes until cancelled."""
        subscription = self.nodes.subscribe(self._signal)
        await self.nodes.wait_synced()
        self.allocator.restore(await self._held())
        self._look_at(set(self.nodes))
        while True:
            await self._signal.wait()
            self._signal.clear()
            names, self._due = self._due | subscription.drain(), set()
            for name in names:
                await asyncio.sleep(0)  # thousands of nodes that need nothing must not stop the lease's renewal
                try:
                    await self._node(name)
                    self._retries.done(name)
                except ApiError as error:
                    if self._retries.is_news(name, str(error)):
                        log.warning("CiliumNode %s is not up to date: %s", name, error)
                    self._retries.later(name)

    def _look_at(self, names: set[str]) -> None:
        self._due |= names
        self._signal.set()

    async def _held(self) -> list[tuple[str, tuple[Prefix, ...]]]:
        """What nodes hold, oldest first. What changes meanwhile is looked at again as any change."""
        oldest_first = sorted(self.nodes.values(), key=lambda n: n.metadata.creation_timestamp or "")
        held = []
        for start in range(0, len(oldest_first), BATCH):
            held += [(n.metadata.name, _blocks(n)[0]) for n in oldest_first[start : start + BATCH]]
            await asyncio.sleep(0)
        return held

    def _gone(self, name: str) -> None:
        self._lacking.discard(name)
        if self.allocator.release(name):
            self._look_at(self._lacking)

    async def _node(self, name: str) -> None:
        node = self.nodes.get(name)
        if node is None:
            self._gone(name)
            return
        current, bad = _blocks(node)
        decision = self.allocator.assign(name, current)
        if decision.lacks:
            self._lacking.add(name)
        else:
            self._lacking.discard(name)
        problem = "; ".join(filter(None, (decision.problem, bad)))
        cidrs = [str(b) for b in decision.blocks]
        try:
            if cidrs != list(node.spec.ipam.pod_cidrs or ()):
                log.info("node %s gets %s", name, ", ".join(cidrs) or "no block")
                patch = {
                    "metadata": {"resourceVersion": node.metadata.resource_version},
                    "spec": {"ipam": {"podCIDRs": cidrs}},
                }
                await self.client.patch(CILIUM_NODES, name, patch)
            if problem != node.status.ipam.operator_status.error:
                if problem:
                    log.error("node %s: %s", name, problem)
                await self.client.patch_status(CILIUM_NODES, name, {"ipam": {"operator-status": {"error": problem}}})
        except Conflict:
            self.conflicts += 1  # the watch delivers the newer object, and with it another try
        except NotFound:
            self._gone(name)


def _blocks(node: CiliumNode) -> tuple[tuple[Prefix, ...], str]:
    """The blocks a node has, and what is wrong with those that can't be read."""
    found, bad = [], []
    for text in node.spec.ipam.pod_cidrs or ():
        try:
            found.append(Prefix.parse(text))
        except ValueError as error:
            bad.append(f"spec.ipam.podCIDRs: {error}")
    return tuple(found), "; ".join(bad)
