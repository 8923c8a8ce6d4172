"""Writes CiliumEndpointSlices: carries out what decide/endpoint_slices.py says, and tells agents when it is through.

Agents follow slices while the slice `rows.COVER` is there (agent/remotes.py). It is made when everybody who was there
at the start is in a stored slice, and stays: a new leader goes on from what is stored. An operator that shall write no
slices takes it away first and the others after it (`withdraw`).

Requests are limited as users of Cilium know it: 10 a second (20 at once), from 100 nodes on 50 (100).
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from fimbria.decide.endpoint_slices import EndpointSlices, Stored, Write
from fimbria.operator.origins import Origins
from fimbria.sources.k8s import rows
from fimbria.sources.k8s.client import ApiClient
from fimbria.sources.k8s.errors import AlreadyExists, ApiError, Conflict, NotFound
from fimbria.sources.k8s.pacing import TokenBucket
from fimbria.sources.k8s.resources import CILIUM_ENDPOINT_SLICES
from fimbria.sources.k8s.rows import COVER
from fimbria.sources.k8s.types.cilium import CiliumEndpoint, CiliumEndpointSlice, CiliumNode, CoreCiliumEndpoint
from fimbria.sources.k8s.types.core import Namespace
from fimbria.sources.k8s.watch import read_meta
from fimbria.tables import ObjectKey
from fimbria.tables.table import Signal, Table

log = logging.getLogger(__name__)
PRIORITY: Final = "cilium.io/ces-namespace"
WORKERS: Final = 8
RETRY: Final = 1.0
LARGE: Final = 100  # nodes
RATE_SMALL: Final = (10.0, 20)
RATE_LARGE: Final = (50.0, 100)
NAMED_PORTS: Final = 128
"""Of one endpoint in a slice: a hundred endpoints with as many stay well below what etcd takes as one object."""
ALPHABET: Final = "bcdfghjklmnpqrstvwxz2456789"


class Reported(NamedTuple):
    """What the operator keeps of a CiliumEndpoint. `entry` is its place in a slice, as JSON; empty if it isn't
    complete. `owned`: Kubernetes removes it together with its pod. `writer`: the node whose agent wrote it, or ""."""

    identity: int
    owned: bool
    entry: bytes
    writer: str = ""


def reported(obj: CiliumEndpoint, *, entries: bool = True) -> Reported:
    """Raises ValueError for what agents wouldn't use either. Without `entries` they are left out, to save memory."""
    usable = rows.remote_endpoint(obj) is not None
    return Reported(
        obj.status.identity.id, bool(obj.metadata.owner_references), entry(obj) if usable and entries else b"",
        rows.written_by(obj.metadata),
    )  # fmt: skip


def entry(obj: CiliumEndpoint) -> bytes:
    """An endpoint as slices hold it, in one canonical way. Named ports beyond NAMED_PORTS are left out: a rule that
    names one doesn't allow it from other nodes, but the neighbours in its slice can be written."""
    s = obj.status
    core = CoreCiliumEndpoint(
        name=obj.metadata.name, id=s.identity.id, networking=s.networking,
        named_ports=(s.named_ports or ())[:NAMED_PORTS] or None,
        service_account=s.service_account, created=obj.metadata.creation_timestamp or "",
    )  # fmt: skip
    if s.encryption.key:  # an absent one and an empty one are the same, but not the same text
        core = msgspec.structs.replace(core, encryption=s.encryption)
    return msgspec.json.encode(core)


def stored(obj: CiliumEndpointSlice) -> Stored[bytes]:
    """A slice as it is. What can't be right in it becomes an endpoint without a name, so that it is written anew."""
    found: dict[str, bytes] = {}
    for e in obj.endpoints or ():
        if not e.name or e.name in found:
            found[""] = b""
        else:
            found[e.name] = msgspec.json.encode(e)
    return Stored(obj.namespace, found, obj.metadata.resource_version)


def unreadable(_key: str, _error: str, raw: bytes) -> Stored[bytes]:
    """For a slice that doesn't decode."""
    return Stored("", {"": b""}, read_meta(raw).resource_version)


class NamespaceWords(NamedTuple):
    """A namespace's labels, and whether it asks for its slices to be written first."""

    labels: Mapping[str, str]
    priority: bool


def namespace_words(obj: Namespace) -> NamespaceWords:
    """From the object."""
    return NamespaceWords(rows.namespace(obj), (obj.metadata.annotations or {}).get(PRIORITY) == "priority")


def slice_name() -> str:
    """As users know them: ces-9-5 letters."""
    letters = "".join(random.choices(ALPHABET, k=14))  # noqa: S311 a name, no secret
    return f"ces-{letters[:9]}-{letters[9:]}"


@dataclass(slots=True)
class EndpointSliceWriter:
    """Follows the tables until cancelled."""

    client: ApiClient
    endpoints: Table[ObjectKey, Reported]
    slices: Table[str, Stored[bytes]]
    namespaces: Table[str, NamespaceWords]
    nodes: Table[str, CiliumNode]
    plan: EndpointSlices[bytes] = field(default_factory=lambda: EndpointSlices(slice_name, random.random))
    outcomes: dict[tuple[str, str], int] = field(default_factory=dict)
    """Requests by kind and outcome."""
    written: int = 0
    """Endpoints in all that was written."""
    changes: int = 0
    origins: Origins = field(init=False)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _wake: Signal = field(default_factory=Signal)
    _bucket: TokenBucket = field(default_factory=lambda: TokenBucket(*RATE_SMALL))
    _large: bool = False
    _token: bool = False
    _cover_at: float = 0.0
    _broken: BaseException | None = None

    def __post_init__(self) -> None:
        self.origins = Origins(self.nodes)

    async def run(self) -> None:
        """Write until cancelled."""
        for table in (self.endpoints, self.slices, self.namespaces, self.nodes):
            await table.wait_synced()
        nodes = self.nodes.subscribe(self._wake, initial=False)
        endpoints = self.endpoints.subscribe(self._wake, initial=False)
        slices = self.slices.subscribe(self._wake, initial=False)
        namespaces = self.namespaces.subscribe(self._wake)
        for name in self.nodes:
            self.origins.node(name)
        reports = {key: self._admitted(key) for key in self.endpoints}
        self.plan.start(
            {name: one for name, one in self.slices.items() if name != COVER},
            {key: entry for key, entry in reports.items() if entry is not None},
            time.monotonic(),
        )
        try:
            while True:
                self._wake.clear()
                if self._broken is not None:
                    raise self._broken  # not a refusal, which is dealt with: a fault of ours
                now = time.monotonic()
                changed = endpoints.drain()
                self.changes += len(changed)
                for key in changed.union(*(self.origins.node(name) for name in nodes.drain())):
                    self.plan.on_endpoint(key, self._admitted(key), now)
                for name in slices.drain() - {COVER}:
                    self.plan.on_slice(name, self.slices.get(name), now)
                for namespace in namespaces.drain():
                    words = self.namespaces.get(namespace)
                    self.plan.set_priority(namespace, words is not None and words.priority)
                wait = await self._advance(now)
                # Not wait_for: in Python 3.11 that forgets a cancellation that comes together with the signal.
                with suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await self._wake.wait()
        finally:
            for subscription in (endpoints, slices, namespaces, nodes):
                subscription.close()
            for task in self._tasks:
                task.cancel()

    def _admitted(self, key: ObjectKey) -> bytes | None:
        row = self.endpoints.get(key)
        return self.origins.admit(key, row.entry, row.writer) if row is not None else self.origins.admit(key, b"", "")

    async def _advance(self, now: float) -> float | None:
        """Begin what can begin; seconds until there may be more."""
        self.plan.tidy(now)
        while len(self._tasks) < WORKERS and (at := self.plan.wait()) is not None and at <= now:
            self._token = self._token or self._limit().try_take(now)
            if not self._token:
                return 1.0 / RATE_LARGE[0]
            write = self.plan.next(now)
            if write is not None:
                self._token = False
                task = asyncio.create_task(self._carry_out(write))
                self._tasks.add(task)
                task.add_done_callback(self._finished)
        if self.plan.covered and COVER not in self.slices and now >= self._cover_at:
            await self._cover()
        busy = len(self._tasks) >= WORKERS
        waits = [t - now for t in (None if busy else self.plan.wait(), self._next_cover()) if t is not None]
        return max(0.0, min(waits)) if waits else None

    def _next_cover(self) -> float | None:
        return self._cover_at if self.plan.covered and COVER not in self.slices else None

    def _limit(self) -> TokenBucket:
        large = len(self.nodes) >= LARGE
        if large != self._large:
            self._large, self._bucket = large, TokenBucket(*(RATE_LARGE if large else RATE_SMALL))
        return self._bucket

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            self._broken = self._broken or task.exception()
        self._wake.set()

    async def _carry_out(self, write: Write[bytes]) -> None:
        outcome = "failed"
        try:
            version = await self._send(write)
            self.plan.done(write, version, time.monotonic())
            self.written += len(write.endpoints)
            outcome = "done"
        except (Conflict, AlreadyExists, NotFound) as error:
            log.info("%s; judged again", error)
            outcome = "refused"
            await self._look(write)
        except ApiError as error:
            log.warning(
                "CiliumEndpointSlice %s of namespace %s is not up to date: %s", write.name, write.namespace, error
            )
            self.plan.done(write, None, time.monotonic())
        finally:
            key = (write.kind, outcome)
            self.outcomes[key] = self.outcomes.get(key, 0) + 1

    async def _send(self, write: Write[bytes]) -> str:
        """The resourceVersion that it has afterwards."""
        kind = CILIUM_ENDPOINT_SLICES
        if write.kind == "delete":
            await self.client.delete(kind, write.name, resource_version=write.version)
            return ""
        body: dict[str, Any] = {
            "metadata": {"name": write.name},
            "namespace": write.namespace,
            "endpoints": [msgspec.Raw(e) for e in write.endpoints.values()],
        }
        if write.kind == "create":
            made = await self.client.create(kind, body)
        else:
            body["metadata"]["resourceVersion"] = write.version
            made = await self.client.replace(kind, write.name, body)
        return made.metadata.resource_version

    async def _look(self, write: Write[bytes]) -> None:
        try:
            found = stored(await self.client.get(CILIUM_ENDPOINT_SLICES, write.name))
        except NotFound:
            self.plan.refused(write, None, time.monotonic())
        except ApiError:
            self.plan.done(write, None, time.monotonic())
        else:
            self.plan.refused(write, found, time.monotonic())

    async def _cover(self) -> None:
        self._cover_at = time.monotonic() + RETRY
        try:
            await self.client.create(
                CILIUM_ENDPOINT_SLICES, {"metadata": {"name": COVER}, "namespace": "", "endpoints": []}
            )
            log.info(
                "slices hold all endpoints: %d in %d slices; agents follow them now",
                len(self.endpoints),
                len(self.plan),
            )
        except AlreadyExists:
            pass  # the watch will tell
        except ApiError as error:
            log.warning("agents can't be told that slices hold all endpoints: %s", error)

    def metrics(self) -> Iterator[Metric]:
        """For the operator's exposition."""
        requests = CounterMetricFamily(
            "fimbria_ces_sync", "Requests for CiliumEndpointSlices", labels=["request", "outcome"]
        )
        for (kind, outcome), count in sorted(self.outcomes.items()):
            requests.add_metric([kind, outcome], count)
        yield requests
        yield CounterMetricFamily("fimbria_ces_endpoint_changes", "Changed CiliumEndpoints", value=self.changes)
        yield CounterMetricFamily("fimbria_ces_endpoints_written", "Endpoints in written slices", value=self.written)
        yield CounterMetricFamily("fimbria_ces_merges", "Sparse slices merged into others", value=self.plan.merges)
        yield GaugeMetricFamily("fimbria_ces_slices", "CiliumEndpointSlices", value=len(self.plan))
        yield GaugeMetricFamily(
            "fimbria_reports_ignored", "CiliumEndpoints with other nodes' addresses", value=len(self.origins)
        )
        yield GaugeMetricFamily(
            "fimbria_ces_covered", "Whether agents may follow slices", value=int(COVER in self.slices)
        )


async def withdraw(client: ApiClient) -> None:
    """Remove all slices, the one that agents go by first. Returns when there are none."""
    bucket = TokenBucket(*RATE_LARGE)
    while True:
        try:
            names = [s.metadata.name for s in (await client.list(CILIUM_ENDPOINT_SLICES)).items]
            if COVER in names:
                await client.delete(CILIUM_ENDPOINT_SLICES, COVER, missing_ok=True)
            for name in names:
                await asyncio.sleep(bucket.reserve(time.monotonic()))
                await client.delete(CILIUM_ENDPOINT_SLICES, name, missing_ok=True)
            if names:
                log.info("%d slices of CiliumEndpoints are removed; agents follow single CiliumEndpoints", len(names))
            return
        except NotFound:
            return  # a server that doesn't know the kind has none
        except ApiError as error:
            log.warning("slices of CiliumEndpoints can't be removed: %s", error)
            await asyncio.sleep(10 * RETRY)
