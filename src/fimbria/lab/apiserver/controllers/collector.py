"""The garbage collector and namespace emptier at work: watches the metadata of everything, carries out garbage.plan."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

import aiohttp

from fimbria.lab.apiserver.controllers import garbage
from fimbria.lab.apiserver.controllers.actions import Obj
from fimbria.lab.apiserver.controllers.client import ApiProblem, Cache, Client
from fimbria.lab.apiserver.controllers.garbage import Collect, Decision, DropFinalizer, Item, SetOwners

log = logging.getLogger(__name__)
SETTLE, RETRY, REDISCOVER = 0.05, 0.5, 10.0
IGNORED = ("events", "endpoints", "componentstatuses")
"""Of no use to the collector: nothing owns them that matters here, or they mirror others."""


@dataclass(frozen=True)
class Kind:
    """A collection that can be listed, watched and deleted from."""

    prefix: str
    plural: str
    namespaced: bool

    @property
    def path(self) -> str:
        return f"{self.prefix}/{self.plural}"

    def item_path(self, namespace: str, name: str) -> str:
        inner = f"/namespaces/{namespace}" if self.namespaced else ""
        return f"{self.prefix}{inner}/{self.plural}/{name}"


class Collector:
    """Run with ``run()``; ``rediscover()`` tells it that definitions changed."""

    def __init__(self, client: Client):
        self._client = client
        self._kinds: dict[tuple[str, str], Kind] = {}
        self._caches: dict[Kind, Cache] = {}
        self._tasks: dict[Kind, asyncio.Task[None]] = {}
        self._known: dict[str, Item] = {}
        self._relevant: dict[str, Item] = {}
        self._terminating: set[str] = set()
        self._wake, self._discover, self._emptying = asyncio.Event(), asyncio.Event(), asyncio.Event()

    def rediscover(self) -> None:
        self._discover.set()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep_discovering(group))
            group.create_task(self._collect())
            group.create_task(self._empty_namespaces())

    # ---- what there is

    async def _keep_discovering(self, group: asyncio.TaskGroup) -> None:
        while True:
            self._discover.clear()
            try:
                await self._discover_once(group)
            except (ApiProblem, aiohttp.ClientError, TimeoutError, OSError) as error:
                log.warning("discovery: %s", error or type(error).__name__)
            try:
                await asyncio.wait_for(self._discover.wait(), REDISCOVER)
                await asyncio.sleep(SETTLE)
            except TimeoutError:
                continue

    async def _discover_once(self, group: asyncio.TaskGroup) -> None:
        prefixes = ["/api/v1"]
        for one in (await self._client.request("GET", "/apis"))["groups"]:
            prefixes.append(f"/apis/{one['preferredVersion']['groupVersion']}")
        for prefix in prefixes:
            for entry in (await self._client.request("GET", prefix))["resources"]:
                if {"list", "watch", "delete"} <= set(entry["verbs"]) and entry["name"] not in IGNORED:
                    kind = Kind(prefix, entry["name"], entry["namespaced"])
                    self._kinds[prefix.removeprefix("/apis/").removeprefix("/api/"), entry["kind"]] = kind
                    self._start(kind, group)

    def _start(self, kind: Kind, group: asyncio.TaskGroup) -> None:
        task = self._tasks.get(kind)
        if task and not task.done():
            return

        def changed(old: Obj | None, new: Obj | None) -> None:
            self._changed(kind, old, new)

        self._caches[kind] = Cache(self._client, kind.path, changed, metadata_only=True)
        self._tasks[kind] = group.create_task(self._caches[kind].run())

    def _changed(self, kind: Kind, old: Obj | None, new: Obj | None) -> None:
        if old is not None:
            self._known.pop(old["metadata"]["uid"], None)
            self._relevant.pop(old["metadata"]["uid"], None)
        if new is not None:
            item = Item(kind.path, new["metadata"])
            self._known[item.uid] = item
            if garbage.is_relevant(item.meta):
                self._relevant[item.uid] = item
        if kind.path == "/api/v1/namespaces" and new and new["metadata"].get("deletionTimestamp"):
            self._terminating.add(new["metadata"]["name"])
            self._emptying.set()
        if garbage.matters(old["metadata"] if old else None, new["metadata"] if new else None):
            self._wake.set()

    # ---- owners

    async def _collect(self) -> None:
        while True:
            await self._wake.wait()
            await asyncio.sleep(SETTLE)
            self._wake.clear()
            if not self._caches or not all(cache.synced.is_set() for cache in self._caches.values()):
                self._retry_later()
                continue
            for decision in garbage.plan(self._relevant.values(), self._known):
                try:
                    await self._carry_out(decision)
                except (ApiProblem, aiohttp.ClientError, TimeoutError, OSError) as error:
                    if not (isinstance(error, ApiProblem) and error.code in (404, 409)):
                        log.warning("garbage collection: %s", error or type(error).__name__)
                    self._retry_later()

    def _retry_later(self) -> None:
        asyncio.get_running_loop().call_later(RETRY, self._wake.set)

    async def _carry_out(self, decision: Decision) -> None:
        item = decision.item
        kind = next(one for one in self._caches if one.path == item.resource)
        path = kind.item_path(item.meta.get("namespace", ""), item.meta["name"])
        conditions = {"uid": item.uid}
        match decision:
            case Collect(policy=policy, absent=absent):
                if not await self._confirmed_absent(item, absent):
                    return
                body = {"preconditions": conditions, "propagationPolicy": policy}
                await self._client.request("DELETE", path, body)
            case SetOwners(owners=owners, absent=absent):
                if await self._confirmed_absent(item, absent):
                    await self._patch(path, item, {"ownerReferences": owners or None})
            case DropFinalizer(finalizer=finalizer):
                kept = [one for one in item.meta["finalizers"] if one != finalizer]
                await self._patch(path, item, {"finalizers": kept or None})

    async def _patch(self, path: str, item: Item, meta: Obj) -> None:
        body = {"metadata": meta | {"uid": item.uid, "resourceVersion": item.meta["resourceVersion"]}}
        await self._client.request("PATCH", path, body, "application/merge-patch+json")

    async def _confirmed_absent(self, item: Item, absent: tuple[tuple[str, str, str, str], ...]) -> bool:
        """Asks the server itself: the caches of two kinds may lag each other."""
        for api_version, kind_name, name, uid in absent:
            kind = self._kinds.get((api_version, kind_name))
            if kind is None:
                return False  # an owner of a kind that isn't served can't be judged
            try:
                found = await self._client.request("GET", kind.item_path(item.meta.get("namespace", ""), name))
            except ApiProblem as problem:
                if problem.code != 404:
                    raise
                continue
            if found["metadata"]["uid"] == uid:
                self._retry_later()
                return False
        return True

    # ---- namespaces

    async def _empty_namespaces(self) -> None:
        while True:
            if not self._terminating:
                self._emptying.clear()
                await self._emptying.wait()
            await asyncio.sleep(SETTLE * 2)
            for name in sorted(self._terminating):
                try:
                    if await self._empty(name):
                        self._terminating.discard(name)
                except (ApiProblem, aiohttp.ClientError, TimeoutError, OSError) as error:
                    log.warning("namespace %s: %s", name, error or type(error).__name__)
                    await asyncio.sleep(RETRY)

    async def _empty(self, name: str) -> bool:
        """Deletes what is in a namespace; finalizes it when nothing is left. True when there is nothing more to do."""
        left = False
        for kind in [one for one in self._caches if one.namespaced]:
            path = f"{kind.prefix}/namespaces/{name}/{kind.plural}"
            present = self._caches[kind].namespaces.get(name)
            if present and any(not obj["metadata"].get("deletionTimestamp") for obj in present.values()):
                await self._client.request("DELETE", path, {"propagationPolicy": "Background"})
            left = left or bool(present)
        if left or not await self._is_empty(name):
            return False
        path = f"/api/v1/namespaces/{name}"
        try:
            namespace = await self._client.request("GET", path)
        except ApiProblem as problem:
            if problem.code == 404:
                return True
            raise
        if not namespace["metadata"].get("deletionTimestamp"):
            return True
        kept = [one for one in namespace["spec"].get("finalizers") or [] if one != "kubernetes"]
        namespace["spec"]["finalizers"] = kept
        await self._client.request("PUT", f"{path}/finalize", namespace)
        return True

    async def _is_empty(self, name: str) -> bool:
        """The server's word, for the caches may lag what was created just before the namespace began to go."""
        for kind in [one for one in self._caches if one.namespaced]:
            path = f"{kind.prefix}/namespaces/{name}/{kind.plural}?limit=1"
            try:
                if (await self._client.request("GET", path))["items"]:
                    return False
            except ApiProblem as problem:
                if problem.code != 404:
                    raise
        return True
