"""Carries out what the identity allocator decides: requests to the API server, and what they reveal back into it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from fimbria.decide.identity import Create, IdentitiesExhausted, IdentityAllocator, Keep, Use
from fimbria.model.endpoint import EndpointIdentity
from fimbria.model.labels import NAMESPACE, LabelFilter, Labels
from fimbria.sources.k8s.client import ApiClient
from fimbria.sources.k8s.errors import AlreadyExists, ApiError, NotFound
from fimbria.sources.k8s.resources import CILIUM_IDENTITIES
from fimbria.sources.k8s.rows import UNUSED_ANNOTATION
from fimbria.sources.k8s.types.cilium import CiliumIdentity
from fimbria.tables import Tables

log = logging.getLogger(__name__)
RETRY: Final = 0.5
RETRY_MAX: Final = 30.0


@dataclass(slots=True)
class Identities:
    """Gives labels their number. `on_changed(endpoint id, identity)` tells of running pods whose labels changed."""

    client: ApiClient
    tables: Tables
    labels: LabelFilter
    on_changed: Callable[[int, EndpointIdentity], None] = lambda _endpoint_id, _identity: None
    _allocator: IdentityAllocator = field(default_factory=IdentityAllocator)
    _searches: dict[Labels, asyncio.Task[int]] = field(default_factory=dict)
    _wanted: dict[int, Labels] = field(default_factory=dict)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def run(self) -> None:
        """Follow what exists, until cancelled."""
        subscription = self.tables.identities.subscribe()
        while True:
            await subscription.wait()
            for number in subscription.drain():
                self._seen(number)

    async def identify(self, labels: Mapping[str, str]) -> EndpointIdentity:
        """The identity of a pod's labels, made if it doesn't exist.

        Raises ApiError if the API server is needed and refuses, IdentitiesExhausted if no number is left.
        """
        relevant = self.labels.apply(labels)
        return EndpointIdentity(await self._number(relevant), dict(relevant))

    def labels_changed(self, endpoint_id: int, labels: Mapping[str, str]) -> None:
        """A running endpoint's labels, as often as they are computed; does something only if its identity differs."""
        relevant = self.labels.apply(labels)
        decided = self.tables.endpoint_identities.get(endpoint_id)
        if decided is None or Labels(decided.labels) == relevant:
            self._wanted.pop(endpoint_id, None)
            return
        if self._wanted.get(endpoint_id) == relevant:
            return
        self._wanted[endpoint_id] = relevant
        task = asyncio.create_task(self._change(endpoint_id, relevant))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _change(self, endpoint_id: int, labels: Labels) -> None:
        pause = RETRY
        while self._wanted.get(endpoint_id) == labels:
            try:
                number = await self._number(labels)
            except (ApiError, IdentitiesExhausted) as error:
                log.warning("endpoint %s keeps its old identity for now: %s", endpoint_id, error)
                await asyncio.sleep(pause)
                pause = min(pause * 2, RETRY_MAX)
                continue
            if self._wanted.get(endpoint_id) == labels:
                del self._wanted[endpoint_id]
                self.on_changed(endpoint_id, EndpointIdentity(number, dict(labels)))

    async def _number(self, labels: Labels) -> int:
        decision = self._allocator.want(labels, time.monotonic())
        if isinstance(decision, Use):
            return decision.number
        # One search per label set, however many pods wait for it.
        task = self._searches.get(labels)
        if task is None:
            task = asyncio.create_task(self._search(labels))
            self._searches[labels] = task
            task.add_done_callback(lambda _: self._searches.pop(labels, None))
        return await asyncio.shield(task)

    async def _search(self, labels: Labels) -> int:
        while True:
            decision = self._allocator.want(labels, time.monotonic())
            if isinstance(decision, Use):
                return decision.number
            if isinstance(decision, Create):
                await self._create(labels, decision.number)
            else:
                await self._keep(labels, decision)

    async def _create(self, labels: Labels, number: int) -> None:
        body: dict[str, Any] = {
            "metadata": {"name": str(number), "labels": {"io.kubernetes.pod.namespace": labels.get(NAMESPACE, "")}},
            "security-labels": dict(labels),
        }
        try:
            self._take(await self.client.create(CILIUM_IDENTITIES, body))
        except AlreadyExists:
            try:
                holder = await self.client.get(CILIUM_IDENTITIES, str(number))
            except NotFound:
                self._allocator.on_gone(number)
                return
            held, marked = Labels(holder.security_labels or {}), _marked(holder)
            self._allocator.on_conflict(labels, number, held, marked, time.monotonic())

    async def _keep(self, labels: Labels, decision: Keep) -> None:
        patch = {"metadata": {"annotations": {UNUSED_ANNOTATION: None}}}
        try:
            kept = await self.client.patch(CILIUM_IDENTITIES, str(decision.number), patch)
        except NotFound:
            self._allocator.on_gone(decision.number)
            return
        self._take(kept)
        self._allocator.on_kept(labels, decision.number)

    def _take(self, identity: CiliumIdentity) -> None:
        number, labels = int(identity.metadata.name), Labels(identity.security_labels or {})
        self._allocator.on_seen(number, labels, _marked(identity))

    def _seen(self, number: int) -> None:
        row = self.tables.identities.get(number)
        if row is not None:
            self._allocator.on_seen(number, Labels(row.labels), row.marked)
            return
        labels = self._allocator.on_gone(number)
        if labels is None:
            return
        for endpoint_id, decided in self.tables.endpoint_identities.items():
            if decided.number == number and endpoint_id not in self._wanted:
                # Somebody deleted an identity in use: it is made again, most likely with the same number.
                log.warning("identity %s was deleted although endpoint %s uses it; made again", number, endpoint_id)
                self._wanted[endpoint_id] = labels
                task = asyncio.create_task(self._change(endpoint_id, labels))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)


def _marked(identity: CiliumIdentity) -> bool:
    return UNUSED_ANNOTATION in (identity.metadata.annotations or {})
