"""Removes what nobody uses: identities (see decide/identity.py for the rules), reports of pods that are gone, and
CiliumNodes whose Node is gone."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Any

from fimbria.decide.identity import Existing, IdentityCollector
from fimbria.model.labels import Labels
from fimbria.sources.k8s import resources
from fimbria.sources.k8s.client import ApiClient
from fimbria.sources.k8s.errors import ApiError, Conflict, NotFound
from fimbria.sources.k8s.rows import UNUSED_ANNOTATION, identity_key
from fimbria.sources.k8s.timestamps import to_time

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Collector:
    """One pass every `interval` seconds. Counters are for metrics."""

    client: ApiClient
    identities: IdentityCollector
    interval: float
    deleted_identities: int = 0
    deleted_endpoints: int = 0
    deleted_nodes: int = 0

    async def run(self) -> None:
        """Collect until cancelled."""
        while True:
            await asyncio.sleep(self.interval)
            for work in (self._nodes, self._endpoints, self._collect_identities):
                try:
                    await work()
                except ApiError as error:
                    log.warning("collection put off: %s", error)

    async def _collect_identities(self) -> None:
        listed = await self.client.list(resources.CILIUM_IDENTITIES)
        existing = {
            number: Existing(
                Labels(i.security_labels or {}),
                UNUSED_ANNOTATION in (i.metadata.annotations or {}),
                i.metadata.resource_version,
            )
            for i in listed.items
            if (number := identity_key(i.metadata))
        }
        # Read after the identities: one in use now must not look unused.
        endpoints = await self.client.list(resources.CILIUM_ENDPOINTS)
        used = {e.status.identity.id for e in endpoints.items}
        result = self.identities.collect(existing, used, time.monotonic())
        now = to_time(time.time())
        for number in result.mark:
            await self._annotate(number, existing[number].version, now)
        for number in result.unmark:
            await self._annotate(number, existing[number].version, None)
        for number in result.delete:
            await self._delete_identity(number, existing[number].version)

    async def _annotate(self, number: int, version: str, value: str | None) -> None:
        patch: dict[str, Any] = {"metadata": {"resourceVersion": version, "annotations": {UNUSED_ANNOTATION: value}}}
        try:
            await self.client.patch(resources.CILIUM_IDENTITIES, str(number), patch)
        except (Conflict, NotFound):
            log.debug("identity %s changed meanwhile", number)

    async def _delete_identity(self, number: int, version: str) -> None:
        try:
            await self.client.delete(resources.CILIUM_IDENTITIES, str(number), resource_version=version)
            self.deleted_identities += 1
            log.info("identity %s was unused and is removed", number)
        except (Conflict, NotFound):
            log.debug("identity %s changed meanwhile", number)

    async def _endpoints(self) -> None:
        """Reports without a pod. Owner references do the same where a garbage collector runs."""
        endpoints = await self.client.list(resources.CILIUM_ENDPOINTS)
        pods = await self.client.list(resources.PODS)
        alive = {(p.metadata.namespace, p.metadata.name) for p in pods.items}
        for e in endpoints.items:
            meta = e.metadata
            if (meta.namespace, meta.name) in alive:
                continue
            try:
                await self.client.delete(
                    resources.CILIUM_ENDPOINTS, meta.name, meta.namespace, uid=meta.uid,
                    resource_version=meta.resource_version,
                )  # fmt: skip
                self.deleted_endpoints += 1
            except (Conflict, NotFound):
                continue

    async def _nodes(self) -> None:
        ours = await self.client.list(resources.CILIUM_NODES)
        nodes = {n.metadata.name for n in (await self.client.list(resources.NODES)).items}
        for node in ours.items:
            if node.metadata.name in nodes:
                continue
            log.info("node %s is gone, and its blocks are free again", node.metadata.name)
            await self.client.delete(
                resources.CILIUM_NODES, node.metadata.name, uid=node.metadata.uid, missing_ok=True
            )  # fmt: skip
            self.deleted_nodes += 1
