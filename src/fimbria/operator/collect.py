"""Removes what nobody uses, from what the replica follows anyway: no list of everything, few and paced requests.

Rules
1. Identities: decide/identity.py says which, from the tables of identities and CiliumEndpoints (and, where the operator
   allocates, of pods). All must be connected: a view that has stood still proves nothing. A watch whose peer is gone
   is noticed within a minute and a half (TCP keep-alive), which the grace must exceed by far.
2. CiliumEndpoints and CiliumNodes that have an owner are removed by Kubernetes' garbage collector when that is gone.
   Those without one are ours: looked at again in the next pass, and removed if by then a fresh read says that their
   pod or Node doesn't exist, and they are still what we saw (uid and resourceVersion).
3. An object that can't be read or written (a webhook refuses it) holds up no other: it is said once, and again only
   if the reason is another. Only what all requests would meet ends a pass: no answer, a busy server, a bad token.
4. `rate` requests a second at most, all together; what is left over is done in the next pass.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from fimbria.decide.identity import SIZE, Existing, IdentityCollector, nearly_exhausted
from fimbria.model.labels import Labels
from fimbria.operator.endpoint_slices import Reported
from fimbria.sources.k8s import resources, rows
from fimbria.sources.k8s.client import ApiClient
from fimbria.sources.k8s.errors import ApiError, Conflict, NotFound, TooMany, Unauthorized, Unavailable
from fimbria.sources.k8s.pacing import TokenBucket
from fimbria.sources.k8s.resources import Resource
from fimbria.sources.k8s.rows import UNUSED_ANNOTATION
from fimbria.sources.k8s.timestamps import to_time
from fimbria.sources.k8s.types.cilium import CiliumIdentity, CiliumNode
from fimbria.tables import ObjectKey
from fimbria.tables.table import Table

log = logging.getLogger(__name__)
GENERAL: Final = (502, 503, 504)


def existing(obj: CiliumIdentity) -> Existing:
    """What the collector needs of a CiliumIdentity. Raises ValueError for a name that is no number of the cluster's."""
    row = rows.identity(obj)
    return Existing(Labels(row.labels), row.marked, obj.metadata.resource_version)


@dataclass(slots=True)
class Collector:
    """One pass every `interval` seconds. `current()` says whether what is followed is up to date; `wanted()` are the
    identities that pods need besides those that CiliumEndpoints name; `tell(text)` passes on what people should
    know."""

    client: ApiClient
    identities: Table[int, Existing]
    endpoints: Table[ObjectKey, Reported]
    nodes: Table[str, CiliumNode]
    decide: IdentityCollector
    interval: float
    rate: float
    current: Callable[[], bool]
    wanted: Callable[[], AbstractSet[int]] = frozenset
    clock: Callable[[], float] = time.monotonic
    tell: Callable[[str], None] = lambda _text: None
    warning: str = ""
    """That numbers run out, "" while they don't."""
    deletions: dict[str, int] = field(default_factory=dict)
    passes: int = 0
    put_off: int = 0
    seconds: float = 0.0
    marked: int = 0
    _suspects: set[tuple[str, str, str]] = field(default_factory=set)
    _refused: dict[str, str] = field(default_factory=dict)
    """Why an object couldn't be dealt with in this pass."""
    _told: dict[str, str] = field(default_factory=dict)
    """The same of the pass before."""

    async def run(self) -> None:
        """Collect until cancelled."""
        for table in (self.identities, self.endpoints, self.nodes):
            await table.wait_synced()
        while True:
            await asyncio.sleep(self.interval)
            began = self.clock()
            try:
                async with asyncio.timeout(10 * self.interval):
                    await self.collect()
            except (ApiError, TimeoutError) as error:
                log.warning("collection put off: %s", error or "it takes too long")
                self.put_off += 1
            self.seconds += self.clock() - began

    async def collect(self) -> None:
        """One pass. Raises ApiError if the server can't be asked."""
        if not self.current():
            self.put_off += 1
            return
        self.passes += 1
        bucket = TokenBucket(self.rate, max(1, int(self.rate)))
        await self._identities(bucket)
        await self._unowned(bucket)
        self._told, self._refused = self._refused, {}

    @contextmanager
    def _by_itself(self, what: str) -> Iterator[None]:
        """Rule 3 for one object. Raises ApiError for what isn't the object's fault."""
        try:
            yield
        except (Conflict, NotFound):
            log.debug("%s changed meanwhile", what)
        except (Unavailable, TooMany, Unauthorized):
            raise
        except ApiError as error:
            if error.status in GENERAL:
                raise
            if error.message not in (self._told.get(what), self._refused.get(what)):
                log.warning("%s stays as it is: %s", what, error)
            self._refused[what] = error.message

    def _room(self, known: Iterable[Existing]) -> None:
        before, self.warning = self.warning, nearly_exhausted(one.labels for one in known)
        if self.warning and self.warning.partition(" ")[0] != before.partition(" ")[0]:  # a percent more or less
            log.warning("%s", self.warning)
            self.tell(self.warning)

    async def _identities(self, bucket: TokenBucket) -> None:
        known = dict(self.identities.items())
        self._room(known.values())
        used = {row.identity for row in self.endpoints.values()} | self.wanted()
        result = self.decide.collect(known, used, self.clock())
        self.marked = sum(one.marked for one in known.values())
        now = to_time(time.time())
        for number in sorted(result.unmark):
            await self._annotate(number, known[number], None, bucket)
        for number in sorted(result.mark):
            await self._annotate(number, known[number], now, bucket)
        for number in sorted(result.delete):
            await self._delete_identity(number, known[number], bucket)

    async def _turn(self, bucket: TokenBucket) -> None:
        await asyncio.sleep(bucket.reserve(self.clock()))

    async def _annotate(self, number: int, seen: Existing, value: str | None, bucket: TokenBucket) -> None:
        if self.identities.get(number) != seen:
            return
        await self._turn(bucket)
        patch: dict[str, Any] = {
            "metadata": {"resourceVersion": seen.version, "annotations": {UNUSED_ANNOTATION: value}}
        }
        with self._by_itself(f"identity {number}"):
            await self.client.patch(resources.CILIUM_IDENTITIES, str(number), patch)

    async def _delete_identity(self, number: int, seen: Existing, bucket: TokenBucket) -> None:
        await self._turn(bucket)
        # Waiting for one's turn can take a while: what came to use it since must not be overlooked.
        if self.identities.get(number) != seen or number in self.wanted():
            return
        with self._by_itself(f"identity {number}"):
            await self.client.delete(resources.CILIUM_IDENTITIES, str(number), resource_version=seen.version)
            self._count("identities")
            log.info("identity %s was unused and is removed", number)

    async def _unowned(self, bucket: TokenBucket) -> None:
        endpoints = (("ciliumendpoints", *key) for key, row in self.endpoints.items() if not row.owned)
        nodes = (("ciliumnodes", "", name) for name, n in self.nodes.items() if not n.metadata.owner_references)
        found: set[tuple[str, str, str]] = {*endpoints, *nodes}
        seen_before, self._suspects = found & self._suspects, found
        await self._check(sorted(seen_before), bucket)

    async def _check(self, suspects: Iterable[tuple[str, str, str]], bucket: TokenBucket) -> None:
        for plural, namespace, name in suspects:
            await self._turn(bucket)
            with self._by_itself(_PAIRS[plural][0].describe(namespace, name)):
                await self._remove_orphan(plural, namespace, name)

    async def _remove_orphan(self, plural: str, namespace: str, name: str) -> None:
        ours, owners = _PAIRS[plural]
        meta = (await self.client.get(ours, name, namespace)).metadata
        with suppress(NotFound):
            await self.client.get(owners, name, namespace)
            return
        await self.client.delete(ours, name, namespace, uid=meta.uid, resource_version=meta.resource_version)
        self._count(plural)
        log.info("%s is removed: its %s is gone", ours.describe(namespace, name), owners.kind)

    def _count(self, kind: str) -> None:
        self.deletions[kind] = self.deletions.get(kind, 0) + 1

    def metrics(self) -> Iterator[Metric]:
        """For the operator's exposition."""
        deletions = CounterMetricFamily("fimbria_gc_deletions", "Unused objects removed", labels=["kind"])
        for kind in ("identities", *_PAIRS):
            deletions.add_metric([kind], self.deletions.get(kind, 0))
        yield deletions
        runs = CounterMetricFamily("fimbria_gc_runs", "Looks for unused objects", labels=["outcome"])
        runs.add_metric(["completed"], self.passes)
        runs.add_metric(["put_off"], self.put_off)
        yield runs
        yield CounterMetricFamily("fimbria_gc_duration_seconds", "Time spent looking", value=self.seconds)
        ratio = len(self.identities) / SIZE
        yield GaugeMetricFamily("fimbria_identities_used_ratio", "Part of the identity numbers that exist", value=ratio)
        yield GaugeMetricFamily("fimbria_identities_unused", "Identities marked as unused", value=self.marked)


_PAIRS: Final[dict[str, tuple[Resource[Any], Resource[Any]]]] = {
    "ciliumendpoints": (resources.CILIUM_ENDPOINTS, resources.PODS),
    "ciliumnodes": (resources.CILIUM_NODES, resources.NODES),
}
