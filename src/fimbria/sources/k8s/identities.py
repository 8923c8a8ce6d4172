"""Carries out what the identity allocator decides: requests to the API server, and what they reveal back into it.

Thousands of nodes may want the same new labels at the same moment. The numbers come out right (decide/identity.py); so
that the API server isn't stormed, each of many waits a random moment of up to `spread()` seconds before it writes, asks
its table again, then looks before it creates: whoever was first has made it by then, and most learn it by their watch.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final

from fimbria.decide.identity import Create, IdentityAllocator, Keep, Use
from fimbria.model.labels import NAMESPACE, Labels
from fimbria.sources.k8s.client import ApiClient
from fimbria.sources.k8s.errors import AlreadyExists, NotFound
from fimbria.sources.k8s.resources import CILIUM_IDENTITIES
from fimbria.sources.k8s.rows import UNUSED_ANNOTATION
from fimbria.sources.k8s.types.cilium import CiliumIdentity

FEW: Final = 50
PER_NODE: Final = 0.5 / 5000  # seconds
MOST: Final = 0.5


def spread(nodes: int) -> float:
    """Seconds over which as many nodes spread their writes for the same labels; 0 for a few."""
    return 0.0 if nodes < FEW else min(nodes * PER_NODE, MOST)


@dataclass(slots=True)
class IdentitySearch:
    """Searches for numbers, one for each set of labels however many wait for it."""

    client: ApiClient
    allocator: IdentityAllocator = field(default_factory=IdentityAllocator)
    spread: Callable[[], float] = lambda: 0.0
    random: Callable[[], float] = random.random
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    created: int = 0
    _searches: dict[Labels, asyncio.Task[int]] = field(default_factory=dict)

    async def number(self, labels: Labels) -> int:
        """The number of labels, made if there is none. Raises ApiError, IdentitiesExhausted."""
        decision = self.allocator.want(labels, self.clock())
        if isinstance(decision, Use):
            return decision.number
        task = self._searches.get(labels)
        if task is None:
            task = asyncio.create_task(self._search(labels))
            self._searches[labels] = task
            task.add_done_callback(lambda _: self._searches.pop(labels, None))
        return await asyncio.shield(task)

    async def _search(self, labels: Labels) -> int:
        spread = self.spread()
        if spread:
            await self.sleep(spread * self.random())
        while True:
            decision = self.allocator.want(labels, self.clock())
            if isinstance(decision, Use):
                return decision.number
            if isinstance(decision, Keep):
                await self._keep(labels, decision)
            elif not spread or not await self._look(labels, decision.number):
                await self._create(labels, decision)

    async def _look(self, labels: Labels, number: int) -> bool:
        """Whether somebody holds the number; read from the server, it proves as much as a conflict."""
        try:
            holder = await self.client.get(CILIUM_IDENTITIES, str(number))
        except NotFound:
            return False
        held = Labels(holder.security_labels or {})
        self.allocator.on_conflict(labels, number, held, marked(holder), self.clock())
        return True

    async def _create(self, labels: Labels, decision: Create) -> None:
        number = decision.number
        if self.allocator.want(labels, self.clock()) != decision:
            return  # the watch was faster than the look
        body: dict[str, Any] = {
            "metadata": {"name": str(number), "labels": {"io.kubernetes.pod.namespace": labels.get(NAMESPACE, "")}},
            "security-labels": dict(labels),
        }
        try:
            self._take(await self.client.create(CILIUM_IDENTITIES, body))
            self.created += 1
        except AlreadyExists:
            if not await self._look(labels, number):
                self.allocator.on_gone(number)

    async def _keep(self, labels: Labels, decision: Keep) -> None:
        patch = {"metadata": {"annotations": {UNUSED_ANNOTATION: None}}}
        try:
            kept = await self.client.patch(CILIUM_IDENTITIES, str(decision.number), patch)
        except NotFound:
            self.allocator.on_gone(decision.number)
            return
        self._take(kept)
        self.allocator.on_kept(labels, decision.number)

    def _take(self, identity: CiliumIdentity) -> None:
        number, labels = int(identity.metadata.name), Labels(identity.security_labels or {})
        self.allocator.on_seen(number, labels, marked(identity))


def marked(identity: CiliumIdentity) -> bool:
    """Whether it is marked for collection."""
    return UNUSED_ANNOTATION in (identity.metadata.annotations or {})
