"""Keeps the node's workers equal to the pods that the API server assigns to it, and tells the API server how they
are."""

import asyncio
import logging
from collections.abc import Coroutine
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from fimbria.lab.errors import LabError
from fimbria.lab.runner.cni import CniError
from fimbria.lab.runner.containers import Sandbox
from fimbria.lab.runner.pods import Host, PodWorker, attachment, end_sandbox
from fimbria.lab.runner.spec import PODS, PodObject, plan
from fimbria.sources.k8s.client import ApiClient
from fimbria.sources.k8s.errors import ApiError, Conflict, NotFound
from fimbria.tables.table import Table

RETRY = 1.0
log = logging.getLogger("runner.manager")


@dataclass
class _Entry:
    """A pod that is being run or ended. `dirty` says that its status should be looked at again."""

    key: str
    worker: PodWorker
    run: asyncio.Task[None]
    dirty: asyncio.Event = field(default_factory=asyncio.Event)
    publisher: asyncio.Task[None] | None = None
    ending: asyncio.Task[None] | None = None


class Manager:
    """`pods` holds this node's pods by namespace/name, kept by an informer."""

    def __init__(self, client: ApiClient, pods: Table[str, PodObject], host: Host, labtool: str) -> None:
        self._client, self._pods, self._host, self._labtool = client, pods, host, labtool
        self._entries: dict[str, _Entry] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """For ever. Nothing is done before the list of pods is complete: a pod that isn't listed yet isn't an
        orphan."""
        await self._pods.wait_synced()
        subscription = self._pods.subscribe(initial=True)
        known = {s.uid: s for s in self._host.store.sandboxes()}
        listed = {p.metadata.uid for p in self._pods.values()}
        for sandbox in known.values():
            if sandbox.uid not in listed:
                self._spawn(self._end_orphan(sandbox))
        # before the first ADD: what is attached after the list was made isn't garbage
        await self._collect_garbage([s for s in known.values() if s.uid in listed])
        while True:
            for key in subscription.drain():
                self._look(key, known)
            await subscription.wait()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception():
            log.error("unexpected", exc_info=task.exception())

    def _look(self, key: str, known: dict[str, Sandbox]) -> None:
        pod = self._pods.get(key)
        for entry in [e for e in self._entries.values() if e.key == key]:
            if pod is None or pod.metadata.uid != entry.worker.plan.uid:
                self._end(entry, min(entry.worker.plan.grace, 1.0))
            elif pod.metadata.deletion_timestamp:
                self._end(entry, _grace_left(pod))
        if pod is None or pod.metadata.uid in self._entries:
            return
        if pod.metadata.deletion_timestamp:
            self._spawn(self._end_unknown(pod, known.get(pod.metadata.uid)))
        elif pod.status.get("phase") not in ("Succeeded", "Failed"):
            self._begin(key, pod, known.get(pod.metadata.uid))

    def _begin(self, key: str, pod: PodObject, known: Sandbox | None) -> None:
        try:
            wanted = plan(pod, self._labtool)
        except LabError as e:
            self._spawn(self._refuse(pod, str(e)))
            return
        dirty = asyncio.Event()
        worker = PodWorker(wanted, self._host, dirty.set)
        entry = _Entry(key, worker, self._spawn(worker.run(known)), dirty)
        entry.publisher = self._spawn(self._publish(entry))
        self._entries[wanted.uid] = entry

    def _end(self, entry: _Entry, grace: float) -> None:
        if entry.ending is None:
            entry.ending = self._spawn(self._terminate(entry, grace))

    async def _terminate(self, entry: _Entry, grace: float) -> None:
        uid = entry.worker.plan.uid
        entry.run.cancel()
        await asyncio.wait([entry.run])
        await entry.worker.terminate(grace)
        if entry.publisher:
            entry.publisher.cancel()
        await self._forget(entry.worker.plan.namespace, entry.worker.plan.name, uid)
        del self._entries[uid]
        self._look(entry.key, {})  # a successor of the same name may be waiting

    async def _end_unknown(self, pod: PodObject, sandbox: Sandbox | None) -> None:
        """A pod that was deleted before this runner started."""
        if sandbox:
            await end_sandbox(self._host, sandbox, _grace_left(pod))
        await self._forget(pod.metadata.namespace, pod.metadata.name, pod.metadata.uid)

    async def _end_orphan(self, sandbox: Sandbox) -> None:
        log.warning("%s/%s (%s) is gone from the API: ending it", sandbox.namespace, sandbox.name, sandbox.uid)
        await end_sandbox(self._host, sandbox, 1.0)

    async def _collect_garbage(self, valid: list[Sandbox]) -> None:
        try:
            await self._host.runtime.collect(self._host.config(), [attachment(s) for s in valid if s.netns])
        except CniError as e:
            log.info("no garbage collection: %s", e)

    # --- towards the API -------------------------------------------------------------------------------------------

    async def _forget(self, namespace: str, name: str, uid: str) -> None:
        """The last word on a deleted pod: now it may go. Insists until the server has heard it."""
        while True:
            try:
                return await self._client.delete(PODS, name, namespace, uid=uid, grace_seconds=0, missing_ok=True)
            except Conflict:
                return  # another pod of that name
            except ApiError as e:
                log.warning("%s", e)
            await asyncio.sleep(RETRY)

    async def _refuse(self, pod: PodObject, message: str) -> None:
        log.warning("%s/%s: %s", pod.metadata.namespace, pod.metadata.name, message)
        try:
            await self._client.patch_status(
                PODS,
                pod.metadata.name,
                {"phase": "Failed", "reason": "Unsupported", "message": message},
                pod.metadata.namespace,
            )
        except ApiError as e:
            log.warning("%s", e)

    async def _publish(self, entry: _Entry) -> None:
        """Sends the status whenever it differs from what was sent last."""
        sent: dict[str, Any] = {}
        p = entry.worker.plan
        while True:
            await entry.dirty.wait()
            entry.dirty.clear()
            current = self._pods.get(entry.key)
            before = (current.status.get("conditions") or []) if current else []
            wanted = entry.worker.status(sent.get("conditions") or before)
            if wanted == sent:
                continue
            try:
                await self._client.patch_status(PODS, p.name, wanted, p.namespace)
                sent = wanted
            except NotFound:
                continue  # deleted; the informer will say so
            except ApiError as e:
                log.warning("%s", e)
                entry.dirty.set()
                await asyncio.sleep(RETRY)


def _grace_left(pod: PodObject) -> float:
    """deletionTimestamp is when the grace period ends."""
    try:
        end = datetime.fromisoformat(str(pod.metadata.deletion_timestamp).replace("Z", "+00:00"))
    except ValueError:
        return 0.0
    return max(0.0, (end - datetime.now(UTC)).total_seconds())
