"""Tells the cluster about this node's endpoints: one CiliumEndpoint per pod, named like it.

Rules
1. The object is written as a whole from what the tables say now; a change that arrives while writing is written next.
   What says the same as what was written last isn't written again, unless the object is gone.
2. An object is written over or removed only if it describes an endpoint of this node, or our pod is the one that the
   API server knows by that name: it may be another node's by now (StatefulSets), and a node that was away must not
   take the name back. An object says by an annotation which node wrote it (no label: those have 63 characters, a node's
   name has up to 253). One that doesn't is of this node if it names its address, or has a pod address of its blocks: a
   node may have come back with another address.
3. On start, objects of this node that describe no endpoint of ours are removed: a crash loses no cleaning up.
4. What the API server refuses is tried again later and later, each object by itself: one namespace's full quota delays
   no other's. The log says why once, and an Event tells the pod's owner. So it is with an object that was stored other
   than written (a webhook changed it): other nodes believe what is stored, and we don't fight over it.
5. With the chart's admission policy the API server lets no agent change another node's object. That of a pod that
   moved here (StatefulSets) goes with the pod it was of: the other agent removes it, or the garbage collector. That is
   no trouble unless it lasts; ours is made as soon as the watch says that it is gone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

from fimbria.model.address import Prefix, is_v4, pack, unpack
from fimbria.model.endpoint import EndpointIdentity, LocalEndpoint, is_static
from fimbria.model.protocol import protocol_name
from fimbria.sources.k8s.client import ApiClient
from fimbria.sources.k8s.errors import AlreadyExists, ApiError, Conflict, Forbidden, NotFound
from fimbria.sources.k8s.events import EventRecorder
from fimbria.sources.k8s.resources import CILIUM_ENDPOINTS, PODS
from fimbria.sources.k8s.retries import Retries
from fimbria.sources.k8s.rows import NODE_ANNOTATION
from fimbria.sources.k8s.types.cilium import CiliumEndpoint
from fimbria.sources.k8s.types.meta import ObjectMeta
from fimbria.tables import ObjectKey, Tables

log = logging.getLogger(__name__)
WORKERS: Final = 8
MOVES: Final = 5  # tries (16 to 31 s) after which a report of another node is in the way


@dataclass(slots=True)
class Publisher:
    """Writes CiliumEndpoints of `node`. `node_addrs` are this node's own addresses, `blocks()` its pod blocks; `events`
    tell about pods whose report is refused."""

    client: ApiClient
    tables: Tables
    node: str
    node_addrs: tuple[bytes, ...]
    blocks: Callable[[], tuple[Prefix, ...]] = tuple
    events: EventRecorder | None = None
    pending: set[ObjectKey] = field(default_factory=set)
    _known: dict[int, LocalEndpoint] = field(default_factory=dict)
    _busy: set[ObjectKey] = field(default_factory=set)
    _retries: Retries[ObjectKey] = field(init=False)
    _holders: dict[ObjectKey, str] = field(default_factory=dict)
    """Nodes whose report was in the way of ours."""
    _written: dict[ObjectKey, dict[str, Any]] = field(default_factory=dict)
    _wake: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._retries = Retries(lambda key: self._note([key]))

    async def run(self) -> None:
        """Publish until cancelled."""
        async with asyncio.TaskGroup() as group:
            for _ in range(WORKERS):
                group.create_task(self._work())
            group.create_task(self._watch())

    def moved(self, node_addrs: tuple[bytes, ...]) -> None:
        """The node has other addresses: every report says where its pod is."""
        self.node_addrs = node_addrs
        self._note((e.namespace, e.pod) for e in self.tables.endpoints.values() if e.pod)

    def _ours(self, node: bytes, addrs: Iterable[bytes]) -> bool:
        return node in self.node_addrs or any(a in block for a in addrs for block in self.blocks())

    async def _watch(self) -> None:
        endpoints = self.tables.endpoints.subscribe()
        identities = self.tables.endpoint_identities.subscribe(endpoints.signal)
        pods = self.tables.pods.subscribe(endpoints.signal)
        reports = self.tables.remote_endpoints.subscribe(endpoints.signal)
        self._note(self._stale())
        while True:
            await endpoints.wait()
            endpoints.signal.clear()
            for endpoint_id in endpoints.drain() | identities.drain():
                self._changed(endpoint_id)
            for gone in [key for key in reports.drain() if key not in self.tables.remote_endpoints]:
                if self._written.pop(gone, None) is not None or gone in self._retries:
                    self._note([gone])
            self._note(pod for pod in pods.drain() if self.tables.endpoints.by("pod", pod))

    def _changed(self, endpoint_id: int) -> None:
        old, new = self._known.pop(endpoint_id, None), self.tables.endpoints.get(endpoint_id)
        if new is not None:
            self._known[endpoint_id] = new
        self._note((e.namespace, e.pod) for e in (old, new) if e is not None and e.pod)

    def _stale(self) -> Iterable[ObjectKey]:
        """Objects of this node without an endpoint here."""
        for key, remote in self.tables.remote_endpoints.items():
            if self._ours(remote.node, remote.addrs) and not self.tables.endpoints.by("pod", key):
                yield key

    def _note(self, keys: Iterable[ObjectKey]) -> None:
        self.pending.update(keys)
        if self.pending:
            self._wake.set()

    async def _work(self) -> None:
        while True:
            key = next((k for k in self.pending if k not in self._busy), None)
            if key is None:
                self._wake.clear()
                await self._wake.wait()
                continue
            self.pending.discard(key)
            self._busy.add(key)
            try:
                await self._publish(key)
                self._retries.done(key)
                self._holders.pop(key, None)
            except ApiError as error:
                self._refused(key, error, await self._holder(key) if isinstance(error, Forbidden) else "")
            finally:
                self._busy.discard(key)
                self._note(())

    async def _holder(self, key: ObjectKey) -> str:
        """The other node whose report has the name; empty if there is none."""
        with suppress(ApiError):
            wrote = _writer(await self.client.get(CILIUM_ENDPOINTS, key[1], key[0]))
            return wrote if wrote != self.node else ""
        return ""

    def _refused(self, key: ObjectKey, error: ApiError, holder: str) -> None:
        before, attempts = self._holders.pop(key, ""), self._retries.attempts(key)
        if error.namespace_ends:
            log.debug("namespace %s ends, and with it the report of pod %s", *key)
        elif not holder and before:
            log.debug("the report of node %s for pod %s/%s has just gone", before, *key)
        elif holder and attempts < MOVES:
            level = logging.DEBUG if attempts else logging.INFO
            log.log(level, "pod %s/%s was on node %s; it is reported once that node's report is gone", *key, holder)
        elif self._retries.is_news(key, error.message):
            log.warning("CiliumEndpoint %s/%s is not up to date: %s", *key, error)
            self._tell(key, "NotReported", f"other nodes may not know this pod: {error}")
        if holder:
            self._holders[key] = holder
        self._retries.later(key)

    def _tell(self, key: ObjectKey, reason: str, message: str) -> None:
        pod = self.tables.pods.get(key)
        if self.events is not None and pod is not None:
            meta = ObjectMeta(name=key[1], namespace=key[0], uid=pod.uid)
            self.events.emit(PODS, meta, "Warning", reason, message)

    def _compare(self, key: ObjectKey, written: dict[str, Any], stored: CiliumEndpoint) -> None:
        """Whether what decides about packets was stored as it was written."""
        there = stored.status
        said = (there.identity.id, [{k: v for k, v in (("ipv4", p.ipv4), ("ipv6", p.ipv6)) if v}
                                    for p in there.networking.addressing or ()], there.networking.node)  # fmt: skip
        meant = (written["identity"]["id"], written["networking"]["addressing"], written["networking"]["node"])
        if said != meant:
            problem = f"it was changed on its way into the API server: {meant} was written, {said} is stored"
            log.error("CiliumEndpoint %s/%s: %s", *key, problem)
            self._tell(key, "ReportChanged", f"other nodes treat this pod as another: {problem}")

    async def _publish(self, key: ObjectKey) -> None:
        ids = self.tables.endpoints.by("pod", key)
        endpoint = self.tables.endpoints.get(max(ids)) if ids else None
        identity = self.tables.endpoint_identities.get(endpoint.id) if endpoint else None
        if endpoint is None or identity is None:
            await self._remove(key)
            return
        if is_static(endpoint.uid) and key not in self.tables.pods:
            return  # the API server doesn't know it yet, and would have nothing to collect the report by
        status = self._status(endpoint, identity)
        body: dict[str, Any] = {"metadata": self._metadata(endpoint), "status": status}
        if self._written.get(key) == body:
            return
        known = self._written.pop(key, None) is not None
        try:
            stored = await self._write(key, endpoint, body, known)
        except NotFound:
            log.debug("namespace %s is gone, and with it the report of pod %s", *key)
            return
        if stored is None:
            log.info("pod %s/%s is another node's by now; its report is left alone", *key)
            return
        self._written[key] = body
        self._compare(key, status, stored)

    async def _write(
        self, key: ObjectKey, endpoint: LocalEndpoint, body: dict[str, Any], known: bool
    ) -> CiliumEndpoint | None:
        """The object as stored; None if the name is another's. What is `known` to be there isn't made first."""
        while True:
            if not known:
                with suppress(AlreadyExists):
                    return await self.client.create(CILIUM_ENDPOINTS, body, key[0])
            if not self._is_the_pod(endpoint) and not await self._describes_ours(key):
                return None
            try:
                return await self.client.patch(CILIUM_ENDPOINTS, key[1], body, key[0])
            except NotFound:
                pass
            except Forbidden:
                if await self._exists(key):
                    raise
            known = False  # somebody was faster to delete it

    async def _exists(self, key: ObjectKey) -> bool:
        with suppress(NotFound):
            await self.client.get(CILIUM_ENDPOINTS, key[1], key[0])
            return True
        return False

    def _is_the_pod(self, endpoint: LocalEndpoint) -> bool:
        """Whether the API server has this very pod on this node."""
        pod = self.tables.pods.get((endpoint.namespace, endpoint.pod))
        return pod is not None and pod.is_of(endpoint.uid)

    async def _describes_ours(self, key: ObjectKey) -> bool:
        try:
            return self._reported_here(await self.client.get(CILIUM_ENDPOINTS, key[1], key[0]))
        except NotFound:
            return True

    def _reported_here(self, found: CiliumEndpoint) -> bool:
        """Whether a report is of this node, or of none. One that can't be read is none that an agent wrote."""
        if wrote := _writer(found):
            return wrote == self.node
        networking = found.status.networking
        if not networking.node:
            return True
        try:
            addrs = [pack(ip) for pair in networking.addressing or () for ip in (pair.ipv4, pair.ipv6) if ip]
            return self._ours(pack(networking.node), addrs)
        except ValueError as error:
            meta = found.metadata
            log.warning(
                "CiliumEndpoint %s/%s is left alone, for it can't be read: %s", meta.namespace, meta.name, error
            )
            return False

    async def _remove(self, key: ObjectKey) -> None:
        self._written.pop(key, None)
        namespace, name = key
        try:
            found = await self.client.get(CILIUM_ENDPOINTS, name, namespace)
            if not self._reported_here(found):
                return
            uid, version = found.metadata.uid, found.metadata.resource_version
            await self.client.delete(CILIUM_ENDPOINTS, name, namespace, uid=uid, resource_version=version)
        except NotFound:
            return
        except Conflict:
            self._note([key])

    def _metadata(self, endpoint: LocalEndpoint) -> dict[str, Any]:
        pod = self.tables.pods.get((endpoint.namespace, endpoint.pod))
        # Of a static pod the runtime knows another uid than the API server, whose collector goes by its own.
        uid = pod.uid if pod else endpoint.uid
        meta: dict[str, Any] = {
            "name": endpoint.pod,
            "namespace": endpoint.namespace,
            "annotations": {NODE_ANNOTATION: self.node},
        }
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


def _writer(report: CiliumEndpoint) -> str:
    """The node whose agent wrote it, empty if it doesn't say."""
    return (report.metadata.annotations or {}).get(NODE_ANNOTATION, "")
