"""Gives this node's pods their identities: allocates numbers, or waits until the operator did (--identity-allocation).

A running pod whose labels changed gets a number that was there for a while at once. A new one, whoever made it, waits
until it is `SETTLE` seconds old and the other nodes know it: they drop packets of identities that they don't know
(docs/design/policy.md).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Final

from fimbria.decide.identity import IdentitiesExhausted
from fimbria.model.endpoint import EndpointIdentity
from fimbria.model.labels import LabelFilter, Labels
from fimbria.sources.k8s.client import ApiClient
from fimbria.sources.k8s.errors import ApiError, Unavailable
from fimbria.sources.k8s.identities import IdentitySearch, spread
from fimbria.tables import Tables

log = logging.getLogger(__name__)
RETRY: Final = 0.5
RETRY_MAX: Final = 30.0
SETTLE: Final = 2.0
PATIENCE: Final = 20.0  # well within the time that runtimes give an ADD


@dataclass(slots=True)
class Identities:
    """Gives labels their number. `on_changed(endpoint id, identity)` tells of running pods whose labels changed.

    Without `allocate` it never writes: it waits for `patience` seconds for the operator to make what is missing.
    """

    client: ApiClient
    tables: Tables
    labels: LabelFilter
    on_changed: Callable[[int, EndpointIdentity], None] = lambda _endpoint_id, _identity: None
    allocate: bool = True
    patience: float = PATIENCE
    _search: IdentitySearch = field(init=False)
    _waiting: dict[Labels, asyncio.Event] = field(default_factory=dict)
    _wanted: dict[int, Labels] = field(default_factory=dict)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _young: dict[int, float] = field(default_factory=dict)
    """When numbers appeared that other nodes may not know yet, oldest first."""

    def __post_init__(self) -> None:
        self._search = IdentitySearch(self.client, spread=lambda: spread(len(self.tables.nodes)))

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
            known = self._search.allocator.number(labels) is not None
            try:
                number = await self._number(labels)
                await asyncio.sleep(self._left(number) if known else SETTLE)
            except (ApiError, IdentitiesExhausted) as error:
                log.warning("endpoint %s keeps its old identity for now: %s", endpoint_id, error)
                await asyncio.sleep(pause)
                pause = min(pause * 2, RETRY_MAX)
                continue
            if self._wanted.get(endpoint_id) == labels:
                del self._wanted[endpoint_id]
                self.on_changed(endpoint_id, EndpointIdentity(number, dict(labels)))

    async def _number(self, labels: Labels) -> int:
        if self.allocate:
            return await self._search.number(labels)
        deadline = time.monotonic() + self.patience
        while (number := self._search.allocator.number(labels)) is None:
            appeared = self._waiting.setdefault(labels, asyncio.Event())
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    await appeared.wait()
            except TimeoutError:
                shown = ", ".join(labels.texts())
                text = f"the operator has not made it within {self.patience:g} s; is it running? ({shown})"
                raise Unavailable("wait for the CiliumIdentity", 0, text=text) from None
        return number

    def _left(self, number: int) -> float:
        """How long other nodes may not know it yet, seconds."""
        return max(0.0, self._young.get(number, -SETTLE) + SETTLE - time.monotonic())

    def _appeared(self, number: int) -> None:
        now = time.monotonic()
        for old in list(takewhile(lambda n: self._young[n] + SETTLE < now, self._young)):
            del self._young[old]
        self._young.setdefault(number, now)

    def _seen(self, number: int) -> None:
        row = self.tables.identities.get(number)
        if row is not None:
            if self.tables.identities.synced:
                self._appeared(number)
            there = Labels(row.labels)
            self._search.allocator.on_seen(number, there, row.marked)
            if (waiting := self._waiting.pop(there, None)) is not None:
                waiting.set()
            return
        labels = self._search.allocator.on_gone(number)
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
