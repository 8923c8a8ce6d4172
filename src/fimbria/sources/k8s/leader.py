"""Leader election on a Lease (coordination.k8s.io/v1): at most one process acts, without trusting anybody's clock.

Rules
1. The wall clock is only written down for people to read. Whether another holder is alive is judged by whether its
   record *changed* within its lease's duration, measured on our own monotonic clock since we first saw that record.
2. Every write carries the resourceVersion it was decided on; a Conflict means that somebody was faster: look again.
3. A leader counts its lease from *before* it sent the last successful renewal, which is earlier than anybody else can
   count from. It stops acting `duration - renew_within` seconds before the others may take over.
4. Losing the lease ends the work (it is cancelled and waited for) and raises LeadershipLost: the process should end and
   start afresh, because its view may be stale. `holds()` is the fence to ask right before acting from a thread or
   after a long step: it is judged by the clock alone, so it turns false even if the event loop was stuck.
5. On an orderly end the lease is given up, so that the next one needs not wait.
"""

import asyncio
import contextlib
import logging
import random as _random
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from fimbria.sources.k8s.client import ApiClient
from fimbria.sources.k8s.errors import AlreadyExists, ApiError, Conflict, NotFound
from fimbria.sources.k8s.resources import LEASES
from fimbria.sources.k8s.timestamps import to_micro_time
from fimbria.sources.k8s.types.core import Lease, LeaseSpec
from fimbria.sources.k8s.types.meta import ObjectMeta

_log = logging.getLogger("fimbria.k8s")


class LeadershipLost(Exception):
    """Another process holds the lease, or it couldn't be renewed in time."""


class LeaderElection:
    """One candidate for the lease `namespace/name`, known to the others as `identity` (unique per process).

    `duration` seconds pass without a renewal before others take over; a leader gives up when it couldn't renew for
    `renew_within`; candidates look every `retry` seconds. Raises ValueError unless retry < renew_within < duration.
    """

    def __init__(
        self,
        client: ApiClient,
        *,
        namespace: str,
        name: str,
        identity: str,
        duration: int = 15,
        renew_within: float = 10.0,
        retry: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        random: Callable[[], float] = _random.random,
    ) -> None:
        if not 0 < retry < renew_within < duration:
            raise ValueError(f"need 0 < retry < renew_within < duration, not {retry}, {renew_within}, {duration}")
        if not identity:
            raise ValueError("a candidate needs an identity")
        self.identity = identity
        self.holder = ""
        """Who holds the lease, as far as we know; empty when nobody does."""
        self.error = ""
        self._client = client
        self._namespace = namespace
        self._name = name
        self._duration = duration
        self._renew_within = renew_within
        self._retry = retry
        self._clock = clock
        self._wall = wall
        self._sleep = sleep
        self._random = random
        self._leading = False
        self._renewed_at = 0.0
        self._version = ""
        self._transitions = 0
        self._acquire_time = ""
        self._seen: tuple[str | None, str | None, str] = (None, None, "")
        self._seen_at = 0.0

    def holds(self) -> bool:
        """Whether acting as the leader is safe at this very moment."""
        return self._leading and self._clock() - self._renewed_at < self._renew_within

    async def run(self, lead: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Become leader, run `lead()`, return when it returns.

        Raises LeadershipLost after cancelling `lead()`, and whatever `lead()` raises. The lease is released in
        every case but the loss.
        """
        await self._acquire()
        _log.info("leading as %s (lease %s/%s)", self.identity, self._namespace, self._name)
        work = asyncio.create_task(lead())
        keeper = asyncio.create_task(self._keep())
        try:
            await asyncio.wait((work, keeper), return_when=asyncio.FIRST_COMPLETED)
        finally:
            lost = keeper.done() and not keeper.cancelled()
            await self._stop(work, keeper)
            self._leading = False
            if not lost:
                await self._release()
        if lost:
            keeper.result()
        if work.done():
            work.result()

    async def _stop(self, *tasks: asyncio.Task[None]) -> None:
        for task in tasks:
            task.cancel()
        # Work that won't stop mustn't keep the process from ending before others take over.
        _, stuck = await asyncio.wait(tasks, timeout=self._duration - self._renew_within)
        if stuck:
            _log.error("the leader's work didn't stop within %g s", self._duration - self._renew_within)

    # --- candidate ---------------------------------------------------------------------------------------------

    async def _acquire(self) -> None:
        while True:
            try:
                if await self._try():
                    self.error = ""
                    return
                self.error = ""
            except ApiError as error:
                if str(error) != self.error:
                    _log.warning("the lease %s/%s can't be looked after: %s", self._namespace, self._name, error)
                self.error = str(error)
            await self._sleep(self._retry * (1.0 + 0.2 * self._random()))

    async def _try(self) -> bool:
        """Take the lease if it is free, ours or abandoned."""
        now = self._clock()
        try:
            lease = await self._client.get(LEASES, self._name, self._namespace)
        except NotFound:
            return await self._create(now)
        if not self._may_take(lease, self._clock()):
            return False
        spec = lease.spec
        self._version = lease.metadata.resource_version
        # The same identity came back: it is one term, unless it had given the lease up.
        same = spec.holder_identity == self.identity
        self._transitions = (spec.lease_transitions or 0) + (not same)
        self._acquire_time = (spec.acquire_time if same else None) or to_micro_time(self._wall())
        try:
            await self._write(self._clock())
        except Conflict:
            return False
        self._leading = True
        return True

    def _may_take(self, lease: Lease, now: float) -> bool:
        spec = lease.spec
        record = (spec.holder_identity, spec.renew_time, lease.metadata.resource_version)
        if record != self._seen:
            self._seen, self._seen_at = record, now
        self.holder = spec.holder_identity or ""
        if not self.holder or self.holder == self.identity:
            return True
        # Its own duration counts, whatever ours is set to: it relies on being left alone that long.
        return now - self._seen_at > (spec.lease_duration_seconds or self._duration)

    async def _create(self, now: float) -> bool:
        self._transitions, self._acquire_time = 0, to_micro_time(self._wall())
        meta = ObjectMeta(name=self._name, namespace=self._namespace)
        try:
            made = await self._client.create(LEASES, Lease(metadata=meta, spec=self._spec()), self._namespace)
        except (AlreadyExists, Conflict):
            return False
        self._took(made, now)
        self._leading = True
        return True

    # --- leader ------------------------------------------------------------------------------------------------

    async def _keep(self) -> None:
        """Renew until it fails for too long. Raises LeadershipLost."""
        while True:
            await self._sleep(self._retry)
            left = self._renew_within - (self._clock() - self._renewed_at)
            try:
                if left > 0:
                    async with asyncio.timeout(left):
                        await self._renew()
                    self.error = ""
            except (ApiError, TimeoutError) as error:
                self.error = str(error) or "the API server didn't answer in time"
                _log.warning("the lease %s/%s wasn't renewed: %s", self._namespace, self._name, self.error)
            if not self.holds():
                self._leading = False
                raise LeadershipLost(
                    f"{self.identity} could not renew the lease {self._namespace}/{self._name} "
                    f"for {self._renew_within:g} s: {self.error or 'the process was stopped for longer than that'}"
                )

    async def _renew(self) -> None:
        try:
            await self._write(self._clock())
        except NotFound:
            # Without the object nothing keeps another candidate from creating it this instant.
            self._leading = False
            raise LeadershipLost(f"the lease {self._namespace}/{self._name} was deleted") from None
        except Conflict:
            # Somebody wrote it: another holder, or just a label by hand.
            lease = await self._client.get(LEASES, self._name, self._namespace)
            self.holder = lease.spec.holder_identity or ""
            if self.holder != self.identity:
                self._leading = False
                who = self.holder or "nobody"
                raise LeadershipLost(
                    f"the lease {self._namespace}/{self._name} is held by {who}, not by {self.identity}"
                ) from None
            self._version = lease.metadata.resource_version

    async def _release(self) -> None:
        # One second, not zero, is the smallest duration the API accepts.
        free = {"holderIdentity": "", "leaseDurationSeconds": 1}
        with contextlib.suppress(ApiError, TimeoutError):
            async with asyncio.timeout(2.0):
                try:
                    await self._patch(free)
                except Conflict:
                    # Most likely our own last renewal, whose answer we didn't wait for.
                    lease = await self._client.get(LEASES, self._name, self._namespace)
                    if lease.spec.holder_identity == self.identity:
                        self._version = lease.metadata.resource_version
                        await self._patch(free)

    # --- the object --------------------------------------------------------------------------------------------

    def _spec(self) -> LeaseSpec:
        return LeaseSpec(
            holder_identity=self.identity,
            lease_duration_seconds=self._duration,
            acquire_time=self._acquire_time,
            renew_time=to_micro_time(self._wall()),
            lease_transitions=self._transitions,
        )

    async def _write(self, sent_at: float) -> None:
        spec = self._spec()
        self._took(
            await self._patch(
                {
                    "holderIdentity": spec.holder_identity,
                    "leaseDurationSeconds": spec.lease_duration_seconds,
                    "acquireTime": spec.acquire_time,
                    "renewTime": spec.renew_time,
                    "leaseTransitions": spec.lease_transitions,
                }
            ),
            sent_at,
        )

    async def _patch(self, spec: dict[str, Any]) -> Lease:
        # A merge patch with a resourceVersion is refused when the object changed, and keeps what others put on it.
        patch = {"metadata": {"resourceVersion": self._version}, "spec": spec}
        return await self._client.patch(LEASES, self._name, patch, self._namespace)

    def _took(self, lease: Lease, sent_at: float) -> None:
        self._version = lease.metadata.resource_version
        self._renewed_at = sent_at
        self.holder = self.identity
