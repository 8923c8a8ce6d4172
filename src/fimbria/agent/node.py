"""This node in the cluster: its addresses, and the CiliumNode object through which it gets pod addresses.

What was learned last is kept in the journal, so that a restart does not need the API server to serve the node's pods.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Any, Final

from fimbria.agent.journal import Journal
from fimbria.compute.network import routers
from fimbria.model.address import pack, unpack
from fimbria.model.rows import NO_ADDR
from fimbria.sources.k8s.client import ApiClient
from fimbria.sources.k8s.errors import AlreadyExists, ApiError, NotFound
from fimbria.sources.k8s.resources import CILIUM_NODES, NODES
from fimbria.tables import Tables

log = logging.getLogger(__name__)
RETRY: Final = 1.0


@dataclass(slots=True)
class NodeRegistration:
    """Keeps this node's CiliumNode up to date. `addrs` are the node's own addresses (16 bytes)."""

    client: ApiClient
    tables: Tables
    journal: Journal
    name: str
    boot_id: str
    addrs: tuple[bytes, ...] = ()

    async def addresses(self) -> tuple[bytes, ...]:
        """The node's InternalIPs, from the journal or the Node object; waits until there are any."""
        saved = self.journal.node()
        if saved is not None and saved.addrs:
            self.addrs = saved.addrs
            self.tables.nodes.upsert(self.name, saved)
            return self.addrs
        told = ""
        while not self.addrs:
            try:
                node = await self.client.get(NODES, self.name)
                listed = node.status.addresses or ()
                self.addrs = tuple(pack(a.address) for a in listed if a.type == "InternalIP")
                reason = f"Node {self.name} has no InternalIP yet"
            except NotFound:
                reason = f"Node {self.name} does not exist yet"
            except ApiError as error:
                reason = str(error)
            if not self.addrs:
                if reason != told:
                    log.warning("waiting for this node's addresses: %s", reason)
                    told = reason
                await asyncio.sleep(RETRY)
        return self.addrs

    async def run(self) -> None:
        """Register, and keep registered, until cancelled."""
        subscription = self.tables.nodes.subscribe()
        pause = RETRY
        while True:
            try:
                await self._reconcile()
                pause = RETRY
            except ApiError as error:
                log.warning("CiliumNode %s is not up to date: %s", self.name, error)
                await asyncio.sleep(pause)
                pause = min(pause * 2, 30.0)
                continue
            await subscription.wait()
            while self.name not in subscription.drain():
                await subscription.wait()

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
