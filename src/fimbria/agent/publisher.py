"""Tells the cluster about this node's endpoints: one CiliumEndpoint per pod, named like it.

Rules
1. The object is written as a whole from what the tables say now; a change that arrives while writing is written next.
2. An object is removed only if it still describes our endpoint: the pod's name may already be another node's
   (StatefulSets).
3. On start, objects of this node that describe no endpoint of ours are removed: a crash loses no cleaning up.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from fimbria.model.address import is_v4, pack, unpack
from fimbria.model.endpoint import EndpointIdentity, LocalEndpoint
from fimbria.model.protocol import protocol_name
from fimbria.sources.k8s.client import ApiClient
from fimbria.sources.k8s.errors import AlreadyExists, ApiError, Conflict, NotFound
from fimbria.sources.k8s.resources import CILIUM_ENDPOINTS
from fimbria.tables import ObjectKey, Tables

log = logging.getLogger(__name__)
WORKERS: Final = 8
RETRY: Final = 1.0


@dataclass(slots=True)
class Publisher:
    """Writes CiliumEndpoints. `node_addrs` are this node's own addresses."""

    client: ApiClient
    tables: Tables
    node_addrs: tuple[bytes, ...]
    pending: set[ObjectKey] = field(default_factory=set)
    _known: dict[int, LocalEndpoint] = field(default_factory=dict)
    _wake: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """Publish until cancelled."""
        async with asyncio.TaskGroup() as group:
            for _ in range(WORKERS):
                group.create_task(self._work())
            group.create_task(self._watch())

    async def _watch(self) -> None:
        endpoints = self.tables.endpoints.subscribe()
        identities = self.tables.endpoint_identities.subscribe(endpoints.signal)
        pods = self.tables.pods.subscribe(endpoints.signal)
        self._note(self._stale())
        while True:
            await endpoints.wait()
            endpoints.signal.clear()
            for endpoint_id in endpoints.drain() | identities.drain():
                self._changed(endpoint_id)
            self._note(pod for pod in pods.drain() if self.tables.endpoints.by("pod", pod))

    def _changed(self, endpoint_id: int) -> None:
        old, new = self._known.pop(endpoint_id, None), self.tables.endpoints.get(endpoint_id)
        if new is not None:
            self._known[endpoint_id] = new
        self._note((e.namespace, e.pod) for e in (old, new) if e is not None and e.pod)

    def _stale(self) -> Iterable[ObjectKey]:
        """Objects of this node without an endpoint here."""
        for key, remote in self.tables.remote_endpoints.items():
            if remote.node in self.node_addrs and not self.tables.endpoints.by("pod", key):
                yield key

    def _note(self, keys: Iterable[ObjectKey]) -> None:
        self.pending.update(keys)
        if self.pending:
            self._wake.set()

    async def _work(self) -> None:
        while True:
            while not self.pending:
                self._wake.clear()
                await self._wake.wait()
            key = self.pending.pop()
            try:
                await self._publish(key)
            except ApiError as error:
                log.warning("CiliumEndpoint %s/%s is not up to date: %s", *key, error)
                await asyncio.sleep(RETRY)
                self._note([key])

    async def _publish(self, key: ObjectKey) -> None:
        ids = self.tables.endpoints.by("pod", key)
        endpoint = self.tables.endpoints.get(max(ids)) if ids else None
        identity = self.tables.endpoint_identities.get(endpoint.id) if endpoint else None
        if endpoint is None or identity is None:
            await self._remove(key)
            return
        status = self._status(endpoint, identity)
        body: dict[str, Any] = {"metadata": self._metadata(endpoint), "status": status}
        try:
            await self.client.create(CILIUM_ENDPOINTS, body, key[0])
        except AlreadyExists:
            await self.client.patch(CILIUM_ENDPOINTS, key[1], body, key[0])
        except NotFound:
            log.debug("namespace %s is gone, and with it the report of pod %s", *key)

    async def _remove(self, key: ObjectKey) -> None:
        namespace, name = key
        try:
            found = await self.client.get(CILIUM_ENDPOINTS, name, namespace)
            node = found.status.networking.node
            if node and pack(node) not in self.node_addrs:
                return
            uid, version = found.metadata.uid, found.metadata.resource_version
            await self.client.delete(CILIUM_ENDPOINTS, name, namespace, uid=uid, resource_version=version)
        except NotFound:
            return
        except Conflict:
            self._note([key])

    def _metadata(self, endpoint: LocalEndpoint) -> dict[str, Any]:
        pod = self.tables.pods.get((endpoint.namespace, endpoint.pod))
        uid = pod.uid if pod else endpoint.uid
        meta: dict[str, Any] = {"name": endpoint.pod, "namespace": endpoint.namespace}
        if uid:
            meta["ownerReferences"] = [{"apiVersion": "v1", "kind": "Pod", "name": endpoint.pod, "uid": uid}]
        return meta

    def _status(self, endpoint: LocalEndpoint, identity: EndpointIdentity) -> dict[str, Any]:
        pair: dict[str, str] = {("ipv4" if is_v4(a) else "ipv6"): unpack(a) for a in endpoint.addrs}
        node = next(iter(sorted(self.node_addrs, key=is_v4, reverse=True)))
        pod = self.tables.pods.get((endpoint.namespace, endpoint.pod))
        ports = pod.named_ports if pod else ()
        return {
            "id": endpoint.id,
            "state": "ready",
            "identity": {"id": identity.number, "labels": sorted(f"{k}={v}" for k, v in identity.labels.items())},
            "networking": {"addressing": [pair], "node": unpack(node)},
            "external-identifiers": {
                "container-id": endpoint.container_id,
                "k8s-namespace": endpoint.namespace,
                "k8s-pod-name": endpoint.pod,
                "cni-attachment-id": f"{endpoint.container_id}:{endpoint.ifname}",
            },
            "named-ports": [{"name": p.name, "port": p.port, "protocol": protocol_name(p.proto)} for p in ports],
        }
