"""This node in the cluster: its addresses, and the CiliumNode object through which it gets pod addresses.

What was learned last is kept in the journal, so that a restart does not need the API server to serve the node's pods.

Rules
1. A node's addresses are the InternalIPs of its Node object. Those of the journal serve until that was seen, if this
   host still has one of them: a machine may have come back with another address.
2. When they change everything follows: the CiliumNode, by which the other nodes send to the new address, the programs,
   and the reports of the pods. The pods keep their own addresses, and their connections.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from fimbria.agent.journal import Journal
from fimbria.compute.network import routers
from fimbria.model.address import unpack
from fimbria.model.rows import NO_ADDR
from fimbria.sources.k8s.client import ApiClient
from fimbria.sources.k8s.errors import AlreadyExists, ApiError, NotFound
from fimbria.sources.k8s.resources import CILIUM_NODES, NODES
from fimbria.sources.k8s.services import to_topology
from fimbria.tables import Tables
from fimbria.tables.table import Signal

log = logging.getLogger(__name__)
RETRY: Final = 1.0
RETRY_MAX: Final = 30.0


@dataclass(slots=True)
class NodeRegistration:
    """Keeps this node's CiliumNode up to date. `addrs` are the node's own addresses (16 bytes), `on_moved` is called
    when they have changed; `held(address)` says whether this host has one."""

    client: ApiClient
    tables: Tables
    journal: Journal
    name: str
    boot_id: str
    held: Callable[[bytes], bool]
    addrs: tuple[bytes, ...] = ()
    on_moved: Callable[[], None] = lambda: None
    _told: str = field(default="", init=False)

    async def addresses(self) -> tuple[bytes, ...]:
        """The node's InternalIPs, from the journal or the Node object; waits until there are any."""
        saved = self.journal.node()
        if saved is not None and any(map(self.held, saved.addrs)):
            self.addrs = saved.addrs
            self.tables.nodes.upsert(self.name, saved)
            return self.addrs
        if saved is not None and saved.addrs:
            # What its pods' addresses come from is still true.
            log.warning("this host doesn't have %s any more, which this node had", ", ".join(map(unpack, saved.addrs)))
            self.tables.nodes.upsert(self.name, saved)
        while not self.addrs:
            try:
                found = to_topology(await self.client.get(NODES, self.name)).internal
                reason = f"Node {self.name} has no InternalIP yet"
                if found and not any(map(self.held, found)):
                    reason = f"this host has none of Node {self.name}'s addresses: {', '.join(map(unpack, found))}"
                else:
                    self.addrs = found
            except NotFound:
                reason = f"Node {self.name} does not exist yet"
            except ApiError as error:
                reason = str(error)
            if not self.addrs:
                self._tell("waiting for this node's addresses: %s", reason)
                await asyncio.sleep(RETRY)
        return self.addrs

    async def run(self) -> None:
        """Register, and keep registered, until cancelled."""
        signal = Signal()
        nodes = self.tables.nodes.subscribe(signal)
        own = self.tables.own_node.subscribe(signal)
        pause = RETRY
        while True:
            self._follow()
            try:
                await self._reconcile()
                pause, self._told = RETRY, ""
            except ApiError as error:
                self._tell("CiliumNode %s is not up to date: %s", self.name, str(error))
                await asyncio.sleep(pause)
                pause = min(pause * 2, RETRY_MAX)
                continue
            while True:
                await signal.wait()
                signal.clear()
                # Both, always: what is left in one would not wake us again.
                if self.name in nodes.drain() | own.drain():
                    break

    def _tell(self, text: str, *args: str) -> None:
        """Once for the same trouble."""
        said = text % args
        if said != self._told:
            log.warning("%s", said)
            self._told = said

    def _follow(self) -> None:
        """Take over the addresses that the Node object has now."""
        seen = self.tables.own_node.get(self.name)
        if seen is None or not seen.internal or seen.internal == self.addrs:
            return
        now, before = (", ".join(map(unpack, addrs)) for addrs in (seen.internal, self.addrs))
        log.warning("this node's addresses are %s now; they were %s", now, before)
        self.addrs = seen.internal
        self.on_moved()

    async def _reconcile(self) -> None:
        wanted = self._spec_addresses()
        node = self.tables.nodes.get(self.name)
        if node is not None and node.pod_cidrs:
            self.journal.save_node(node)
        try:
            found = await self.client.get(CILIUM_NODES, self.name)
        except NotFound:
            await self._create(wanted)
            return
        listed = [{"type": a.type, "ip": a.ip} for a in found.spec.addresses or ()]
        if listed != wanted or found.spec.boot_id != self.boot_id:
            await self.client.patch(CILIUM_NODES, self.name, {"spec": {"addresses": wanted, "bootid": self.boot_id}})

    async def _create(self, addresses: list[dict[str, str]]) -> None:
        # Somebody deleted the object of a running node: it asks for the blocks that its pods have addresses of.
        saved = self.journal.node()
        blocks = [str(c) for c in saved.pod_cidrs] if saved else []
        body: dict[str, Any] = {
            "metadata": {"name": self.name},
            "spec": {"addresses": addresses, "bootid": self.boot_id, "ipam": {"podCIDRs": blocks} if blocks else {}},
        }
        try:
            owner = await self.client.get(NODES, self.name)
            body["metadata"]["ownerReferences"] = [
                {"apiVersion": "v1", "kind": "Node", "name": self.name, "uid": owner.metadata.uid}
            ]
            await self.client.create(CILIUM_NODES, body)
        except AlreadyExists:
            await self._reconcile()

    def _spec_addresses(self) -> list[dict[str, str]]:
        node = self.tables.nodes.get(self.name) or self.journal.node()
        pod_side = [r for r in routers(node) if r != NO_ADDR] if node else []
        rows = [{"type": "InternalIP", "ip": unpack(a)} for a in self.addrs]
        return rows + [{"type": "CiliumInternalIP", "ip": unpack(a)} for a in pod_side]
