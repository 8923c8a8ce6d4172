"""The loop: caches mark what changed, plans say what to do about it, requests do it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime

import aiohttp

from fimbria.lab.apiserver.columns import timestamp
from fimbria.lab.apiserver.controllers import daemons, deployments, replicas, schedule, slices
from fimbria.lab.apiserver.controllers.actions import (
    Action,
    Bind,
    Create,
    Delete,
    Obj,
    Patch,
    Put,
    meta,
    owned_by,
    owner,
)
from fimbria.lab.apiserver.controllers.client import ApiProblem, Cache, Client
from fimbria.lab.apiserver.controllers.collector import Collector

log = logging.getLogger(__name__)
PATHS = {
    "pods": "/api/v1",
    "services": "/api/v1",
    "nodes": "/api/v1",
    "replicasets": "/apis/apps/v1",
    "deployments": "/apis/apps/v1",
    "daemonsets": "/apis/apps/v1",
    "endpointslices": "/apis/discovery.k8s.io/v1",
    "customresourcedefinitions": "/apis/apiextensions.k8s.io/v1",
}
OWNERS = {"ReplicaSet": "replicasets", "DaemonSet": "daemonsets", "Deployment": "deployments"}
Key = tuple[str, str, str]
SCHEDULER: Key = ("scheduler", "", "")
SETTLE, RETRY, CONCURRENCY = 0.005, 0.5, 32
READY_CHECK = 1.0


class Loop:
    """All controllers but the collector, which runs beside it. I/O begins in ``run()``."""

    def __init__(self, client: Client):
        self._client = client
        self._caches = {name: Cache(client, f"{prefix}/{name}", self._handler(name)) for name, prefix in PATHS.items()}
        self._dirty: set[Key] = set()
        self._wake = asyncio.Event()
        self._collector = Collector(client)
        self._limit = asyncio.Semaphore(CONCURRENCY)

    async def run(self, ready: Callable[[], None]) -> None:
        """Runs for ever; calls ``ready`` once the first lists are in."""
        async with asyncio.TaskGroup() as group:
            for cache in self._caches.values():
                group.create_task(cache.run())
            group.create_task(self._collector.run())
            for cache in self._caches.values():
                await cache.synced.wait()
            ready()
            group.create_task(self._watch_minimum_ready())
            while True:
                await self._wake.wait()
                await asyncio.sleep(SETTLE)
                self._wake.clear()
                dirty, self._dirty = self._dirty, set()
                await self._reconcile(dirty)

    # ---- what changed

    def _handler(self, name: str) -> Callable[[Obj | None, Obj | None], None]:
        return lambda old, new: self._changed(name, old, new)

    def _changed(self, name: str, old: Obj | None, new: Obj | None) -> None:
        obj = new or old
        assert obj is not None
        namespace = meta(obj).get("namespace", "")
        match name:
            case "pods":
                self._pod_changed(namespace, old, new)
            case "nodes":
                self._mark(SCHEDULER, *(("daemonsets", meta(one)["namespace"], meta(one)["name"])
                                        for one in self._caches["daemonsets"].all()))  # fmt: skip
                if _zone(old) != _zone(new):
                    self._mark(*(("services", meta(one)["namespace"], meta(one)["name"])
                                 for one in self._caches["services"].all()))  # fmt: skip
            case "endpointslices":
                service = (meta(obj).get("labels") or {}).get(slices.SERVICE)
                if service and self._caches["services"].get(namespace, service):
                    self._mark(("services", namespace, service))
            case "customresourcedefinitions":
                self._collector.rediscover()
            case _:
                self._mark((name, namespace, meta(obj)["name"]))
                self._mark_owner(obj)

    def _pod_changed(self, namespace: str, old: Obj | None, new: Obj | None) -> None:
        for pod in (old, new):
            if pod is None:
                continue
            self._mark_owner(pod)
            labels = meta(pod).get("labels") or {}
            for name, service in self._caches["services"].namespaces.get(namespace, {}).items():
                if slices.selects(service, labels):
                    self._mark(("services", namespace, name))
        if new is None or not new["spec"].get("nodeName"):
            self._mark(SCHEDULER)

    def _mark_owner(self, obj: Obj) -> None:
        found = owner(obj)
        if found and found["kind"] in OWNERS:
            self._mark((OWNERS[found["kind"]], meta(obj)["namespace"], found["name"]))

    def _mark(self, *keys: Key) -> None:
        self._dirty.update(keys)
        self._wake.set()

    async def _watch_minimum_ready(self) -> None:
        """Being ready long enough is no event: looked at once a second where it matters."""
        while True:
            await asyncio.sleep(READY_CHECK)
            for name in ("replicasets", "daemonsets"):
                for one in self._caches[name].all():
                    if one["spec"].get("minReadySeconds"):
                        self._mark((name, meta(one)["namespace"], meta(one)["name"]))

    # ---- what to do

    async def _reconcile(self, dirty: set[Key]) -> None:
        work = [(key, action) for key in sorted(dirty) for action in self._plan(key)]
        results = await asyncio.gather(*(self._carry_out(action) for _, action in work))
        failed = {key for (key, _), done in zip(work, results, strict=True) if not done}
        if failed:
            asyncio.get_running_loop().call_later(RETRY, self._mark, *failed)

    def _plan(self, key: Key) -> list[Action]:
        kind, namespace, name = key
        now = datetime.now(UTC)
        pods = self._caches["pods"]
        nodes = self._caches["nodes"].all()
        if key == SCHEDULER:
            return schedule.plan(pods.all(), nodes, timestamp(now))
        obj = self._caches[kind].get(namespace, name)
        if obj is None:
            return []
        local = list(pods.namespaces.get(namespace, {}).values())
        match kind:
            case "deployments":
                sets = list(self._caches["replicasets"].namespaces.get(namespace, {}).values())
                return deployments.plan(obj, owned_by(sets, meta(obj)["uid"]), timestamp(now))
            case "replicasets":
                return replicas.plan(obj, owned_by(local, meta(obj)["uid"]), now)
            case "daemonsets":
                return daemons.plan(obj, owned_by(local, meta(obj)["uid"]), nodes, now)
            case "services" if slices.wants_slices(obj):
                return self._plan_slices(obj, local, nodes)
        return []

    def _plan_slices(self, service: Obj, local: list[Obj], nodes: list[Obj]) -> list[Action]:
        namespace, name = meta(service)["namespace"], meta(service)["name"]
        mine = [
            one
            for one in self._caches["endpointslices"].namespaces.get(namespace, {}).values()
            if (labels := meta(one).get("labels") or {}).get(slices.SERVICE) == name
            and labels.get(slices.MANAGED_BY) == slices.MANAGER
        ]
        chosen = [pod for pod in local if slices.selects(service, meta(pod).get("labels") or {})]
        return slices.plan(service, chosen, mine, {meta(node)["name"]: _zone(node) for node in nodes})

    # ---- doing it

    async def _carry_out(self, action: Action) -> bool:
        """True when done, or when there is nothing left to do it to."""
        async with self._limit:
            try:
                await self._request(action)
            except ApiProblem as problem:
                if problem.code in (404, 409):
                    return problem.code == 404 and isinstance(action, Delete)
                if problem.code == 403 and "NamespaceTerminating" in str(problem):
                    return True
                log.warning("%s: %s", _describe(action), problem)
                return False
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                log.warning("%s: %s", _describe(action), error or type(error).__name__)
                return False
            return True

    async def _request(self, action: Action) -> None:
        match action:
            case Create(resource, body):
                path = f"{PATHS[resource]}/namespaces/{meta(body)['namespace']}/{resource}"
                self._caches[resource].apply(await self._client.request("POST", path, body))
            case Put(resource, body):
                path = _path(resource, meta(body)["namespace"], meta(body)["name"])
                self._caches[resource].apply(await self._client.request("PUT", path, body))
            case Patch(resource, namespace, name, body, sub):
                path = _path(resource, namespace, name) + (f"/{sub}" if sub else "")
                found = await self._client.request("PATCH", path, body, "application/merge-patch+json")
                self._caches[resource].apply(found)
            case Delete(resource, namespace, name, uid, policy):
                options = {"preconditions": {"uid": uid}, "propagationPolicy": policy}
                found = await self._client.request("DELETE", _path(resource, namespace, name), options)
                self._forget(resource, namespace, name, uid, found)
            case Bind(namespace, name, node, uid):
                target = {"apiVersion": "v1", "kind": "Node", "name": node}
                where = {"name": name, "namespace": namespace} | ({"uid": uid} if uid else {})
                body = {"apiVersion": "v1", "kind": "Binding", "metadata": where, "target": target}
                await self._client.request("POST", _path("pods", namespace, name) + "/binding", body)

    def _forget(self, resource: str, namespace: str, name: str, uid: str, answer: Obj) -> None:
        """A deletion's answer shows what stays for now; whatever doesn't stay is gone from the cache at once."""
        found = answer.get("metadata") or {}
        if found.get("uid") == uid and (found.get("deletionGracePeriodSeconds") or found.get("finalizers")):
            self._caches[resource].apply(answer)
        else:
            gone = {"metadata": {"namespace": namespace, "name": name, "uid": uid}}
            self._caches[resource].remove(gone, final=False)


def _zone(node: Obj | None) -> str:
    labels = meta(node).get("labels") or {} if node else {}
    return str(labels.get("topology.kubernetes.io/zone", ""))


def _path(resource: str, namespace: str, name: str) -> str:
    return f"{PATHS[resource]}/namespaces/{namespace}/{resource}/{name}"


def _describe(action: Action) -> str:
    match action:
        case Create(resource, body) | Put(resource, body):
            return f"{type(action).__name__.lower()} {resource} {meta(body).get('name') or meta(body)['generateName']}"
        case Patch(resource, _, name) | Delete(resource, _, name):
            return f"{type(action).__name__.lower()} {resource} {name}"
        case Bind(_, name, node):
            return f"bind {name} to {node}"
