"""Pods of all nodes: from the slices that the operator fills, or from each pod's own CiliumEndpoint.

Rules
1. While the slice `rows.COVER` is there, slices hold everybody and are followed. It is written after them, and taken
   away before they are, so that who sees it has seen them. Without it CiliumEndpoints are followed. So it doesn't
   matter in which order operator and agents learn of a changed setting, and agents of a version without slices go on
   as before.
2. From pods to slices: the table is changed in one step. Who was known but is in no slice yet (its slice is written a
   moment after it) stays for up to `LINGER` seconds more.
3. From slices to pods: what was known stays as it is until all CiliumEndpoints have been seen, also while slices are
   deleted. Every agent sees the cover go in the same instant, so the list is put off by a random time that grows with
   what it costs, as informers do (sources/k8s/informer.py, rule 3). If the cover comes back before, nothing is listed.
4. A server that doesn't know slices, or doesn't let us read them, is one without the operator's: rule 1.
5. An endpoint in two slices (it moves, or two leaders overlapped for an instant): the younger CiliumEndpoint counts, of
   one and the same what the slice written last says, for slices are always written from what is known by then. Of two
   pods with one address compute/ipcache.py decides.

`remote_endpoints` has one writer at a time: the informer of CiliumEndpoints, or this.
"""

from __future__ import annotations

import asyncio
import logging
import random as _random
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

from fimbria.model.endpoint import PodSlice, RemoteEndpoint
from fimbria.sources.k8s.informer import RELIST_MOST, RELIST_ROW, Informer
from fimbria.sources.k8s.rows import COVER
from fimbria.tables import ObjectKey, Tables

log = logging.getLogger(__name__)
LINGER: Final = 30.0
LOOK: Final = 0.2


@dataclass(slots=True)
class SliceUnion:
    """The endpoints of many slices, by (namespace, name), of slices that come one by one and in any order."""

    upsert: Callable[[ObjectKey, RemoteEndpoint], object]
    delete: Callable[[ObjectKey], object]
    known: Callable[[ObjectKey], bool]
    _shown: dict[str, PodSlice] = field(default_factory=dict)
    _names: dict[str, set[str]] = field(default_factory=dict)
    _rivals: dict[ObjectKey, set[str]] = field(default_factory=dict)
    """Who is in more than one slice, which is rare."""

    def put(self, name: str, new: PodSlice | None) -> None:
        """A slice says this now; None: it is gone."""
        old = self._shown.pop(name, None)
        if old is not None:
            self._names[old.namespace].discard(name)
        if new is not None:
            self._shown[name] = new
            self._names.setdefault(new.namespace, set()).add(name)
        before = {(old.namespace, n): e for n, e in old.endpoints.items()} if old is not None else {}
        after = {(new.namespace, n): e for n, e in new.endpoints.items()} if new is not None else {}
        for key in before.keys() - after.keys():
            self._left(key, name)
        for key, endpoint in after.items():
            if key in self._rivals or (key not in before and self.known(key)):
                self._contested(key)
            elif before.get(key) is not endpoint:
                self.upsert(key, endpoint)

    def _left(self, key: ObjectKey, name: str) -> None:
        if key in self._rivals:
            self._contested(key)
        else:
            self.delete(key)

    def _contested(self, key: ObjectKey) -> None:
        """Rule 5, for an endpoint that may be in several slices."""
        holders = {n for n in self._names.get(key[0], ()) if key[1] in self._shown[n].endpoints}
        if len(holders) > 1:
            self._rivals[key] = holders
        else:
            self._rivals.pop(key, None)
        if not holders:
            self.delete(key)
            return
        best = max(holders, key=lambda n: (self._shown[n].endpoints[key[1]].created, self._shown[n].version, n))
        self.upsert(key, self._shown[best].endpoints[key[1]])


@dataclass(slots=True)
class RemoteEndpoints:
    """Follows one or the other. `slices` fills `tables.pod_slices`; `reports()` makes an informer of CiliumEndpoints
    that fills `tables.remote_endpoints`; `informers` is the list of those that run, for people."""

    tables: Tables
    slices: Informer[Any, str, PodSlice]
    reports: Callable[[], Informer[Any, ObjectKey, RemoteEndpoint]]
    informers: list[Informer[Any, Any, Any]]
    clock: Callable[[], float] = time.monotonic
    linger: float = LINGER
    random: Callable[[], float] = _random.random
    covered: bool | None = None
    """Whether slices are followed; None before anything is known."""
    switches: int = 0
    _union: SliceUnion = field(init=False)
    _task: asyncio.Task[None] | None = None
    _informer: Informer[Any, Any, Any] | None = None
    _lingering: dict[ObjectKey, float] = field(default_factory=dict)
    _list_at: float | None = None
    """When to go from slices to pods; None if slices count, or pods are followed already."""

    def __post_init__(self) -> None:
        self._union = self._new_union()

    async def run(self) -> None:
        """Follow until cancelled."""
        subscription = self.tables.pod_slices.subscribe()
        self.informers.append(self.slices)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.slices.run())
                while True:
                    await self._step(group, subscription.drain())
                    # Not wait_for: in Python 3.11 that forgets a cancellation that comes together with the signal.
                    with suppress(TimeoutError):
                        async with asyncio.timeout(self._patience()):
                            await subscription.wait()
        finally:
            self.informers.remove(self.slices)

    def _patience(self) -> float | None:
        if self.covered is None:
            return LOOK
        if self._list_at is not None:
            return max(0.0, self._list_at - self.clock())
        return max(0.0, min(self._lingering.values()) - self.clock()) if self._lingering else None

    async def _step(self, group: asyncio.TaskGroup, changed: Iterable[str]) -> None:
        slices = self.tables.pod_slices
        covered = slices.synced and COVER in slices
        if not covered:
            if self.covered is not False and (slices.synced or self.slices.missing) and self._may_list():
                self._follow_pods(group)
        elif self.covered and self._list_at is None:
            for name in changed:
                self._union.put(name, slices.get(name) if name != COVER else None)
            self._expire()
        else:
            await self._follow_slices()

    def _may_list(self) -> bool:
        """Rule 3. An agent that has just started knows nobody yet and doesn't wait."""
        if self.covered is None:
            return True
        now = self.clock()
        if self._list_at is None:
            delay = self.random() * min(len(self.tables.remote_endpoints) * RELIST_ROW, RELIST_MOST)
            self._list_at = now + delay
            log.info(
                "slices don't hold everybody any more; what they said counts until pods are listed in %.1f s", delay
            )
        return now >= self._list_at

    def _follow_pods(self, group: asyncio.TaskGroup) -> None:
        log.info("following each pod's CiliumEndpoint: the operator fills no slices")
        self._informer = self.reports()
        self.informers.append(self._informer)
        self._task = group.create_task(self._informer.run())
        self._union, self._lingering = self._new_union(), {}
        self._switched(False)

    async def _follow_slices(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))
            self._task = None
        if self._informer is not None:
            self.informers.remove(self._informer)
            self._informer = None
        # No await from here on: the table changes from one complete view to the other.
        table, rows = self.tables.remote_endpoints, dict[ObjectKey, RemoteEndpoint]()
        union = SliceUnion(rows.__setitem__, lambda key: rows.pop(key, None), rows.__contains__)
        for name, one in self.tables.pod_slices.items():
            union.put(name, one if name != COVER else None)
        until = self.clock() + self.linger
        self._lingering = {key: until for key in table if key not in rows}
        table.replace({**{key: table[key] for key in self._lingering}, **rows})
        union.upsert, union.delete, union.known = self._upsert, self._delete, self._known
        self._union = union
        table.mark_synced()
        self._switched(True)
        log.info(
            "following slices of CiliumEndpoints: %d, with %d endpoints", len(self.tables.pod_slices) - 1, len(rows)
        )

    def _switched(self, covered: bool) -> None:
        self.switches += self.covered not in (None, covered)
        self.covered, self._list_at = covered, None

    def _expire(self) -> None:
        now = self.clock()
        for key in [k for k, until in self._lingering.items() if until <= now]:
            self._delete(key)

    def _new_union(self) -> SliceUnion:
        return SliceUnion(self._upsert, self._delete, self._known)

    def _upsert(self, key: ObjectKey, row: RemoteEndpoint) -> None:
        self._lingering.pop(key, None)
        self.tables.remote_endpoints.upsert(key, row)

    def _delete(self, key: ObjectKey) -> None:
        self._lingering.pop(key, None)
        self.tables.remote_endpoints.delete(key)

    def _known(self, key: ObjectKey) -> bool:
        return key in self.tables.remote_endpoints and key not in self._lingering
