"""The Node object: registered once, kept Ready or not as the network plugin says, with a lease as the heartbeat."""

import asyncio
import logging
import os
import platform
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from fimbria.lab.runner.cni import CniError, NetworkList, Runtime
from fimbria.lab.runner.pods import now
from fimbria.lab.runner.spec import RUNNER_VERSION
from fimbria.sources.k8s.client import ApiClient
from fimbria.sources.k8s.errors import AlreadyExists, ApiError, NotFound
from fimbria.sources.k8s.resources import LEASES, NAMESPACES, NODES

LEASE_NAMESPACE = "kube-node-lease"
LEASE_SECONDS, RENEW = 40, 10.0
LOOK_UNREADY, LOOK_READY = 0.5, 5.0  # seconds between two looks at the network plugin
log = logging.getLogger("runner.node")


class NodeKeeper:
    """Keeps the node's object in the API."""

    def __init__(
        self,
        client: ApiClient,
        name: str,
        addresses: Sequence[str],
        runtime: Runtime,
        config: Callable[[], NetworkList],
        *,
        zone: str = "",
    ) -> None:
        self._client, self._name, self._addresses = client, name, addresses
        self._runtime, self._config, self._zone = runtime, config, zone

    async def run(self) -> None:
        await _insist(self._register)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep_ready())
            group.create_task(self._keep_lease())

    async def _register(self) -> None:
        arch = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
        labels = {"kubernetes.io/hostname": self._name, "kubernetes.io/os": "linux", "kubernetes.io/arch": arch}
        if self._zone:
            labels["topology.kubernetes.io/zone"] = self._zone
        try:
            await self._client.create(
                NODES, {"apiVersion": "v1", "kind": "Node", "metadata": {"name": self._name, "labels": labels}}
            )
        except AlreadyExists:
            await self._client.patch(NODES, self._name, {"metadata": {"labels": labels}})

    async def _network_problem(self) -> str:
        """Empty if pods can be attached now."""
        try:
            await self._runtime.status(self._config())
        except (CniError, OSError) as e:
            return str(e) or type(e).__name__
        return ""

    async def _keep_ready(self) -> None:
        told: str | None = None
        since = now()
        while True:
            problem = await self._network_problem()
            if problem != told:
                log.info("network: %s", problem or "ready")
                if told is None or bool(told) != bool(problem):
                    since = now()
                await _insist(lambda problem=problem, since=since: self._tell(problem, since))  # type: ignore[misc]
                told = problem
            await asyncio.sleep(LOOK_UNREADY if problem else LOOK_READY)

    async def _tell(self, problem: str, since: str) -> None:
        ready = {
            "type": "Ready",
            "status": "False" if problem else "True",
            "lastHeartbeatTime": now(),
            "lastTransitionTime": since,
            "reason": "NetworkPluginNotReady" if problem else "RunnerReady",
            "message": problem or "the network plugin is ready",
        }
        addresses = [{"type": "InternalIP", "address": a} for a in self._addresses] + [
            {"type": "Hostname", "address": self._name}
        ]
        memory = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') // 1024}Ki"
        resources = {"cpu": str(os.cpu_count()), "memory": memory, "pods": "110"}
        info = {
            "kernelVersion": platform.release(),
            "operatingSystem": "linux",
            "kubeletVersion": RUNNER_VERSION,
            "osImage": "the machine's own",
            "containerRuntimeVersion": "fimbria-lab://1",
        }
        facts = {
            "addresses": addresses,
            "capacity": resources,
            "allocatable": resources,
            "nodeInfo": info,
        }
        try:
            await self._send_status(facts, ready)
        except NotFound:
            await self._register()
            await self._send_status(facts, ready)

    async def _send_status(self, facts: dict[str, Any], ready: dict[str, str]) -> None:
        # A strategic patch merges addresses by type, so that of two InternalIPs one would be left; a merge patch would
        # replace the conditions of others.
        await self._client.patch_status(NODES, self._name, facts)
        await self._client.patch_status(NODES, self._name, {"conditions": [ready]}, kind="strategic")

    async def _keep_lease(self) -> None:
        while True:
            await _insist(self._renew)
            await asyncio.sleep(RENEW)

    async def _renew(self) -> None:
        spec: dict[str, Any] = {
            "holderIdentity": self._name,
            "leaseDurationSeconds": LEASE_SECONDS,
            "renewTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        }
        try:
            await self._client.patch(LEASES, self._name, {"spec": spec}, LEASE_NAMESPACE)
        except NotFound:
            await self._create_lease(spec)

    async def _create_lease(self, spec: dict[str, Any]) -> None:
        lease = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "spec": spec,
            "metadata": {"name": self._name, "namespace": LEASE_NAMESPACE},
        }
        try:
            await self._client.create(LEASES, lease, LEASE_NAMESPACE)
        except AlreadyExists:
            return
        except NotFound:
            await self._client.create(
                NAMESPACES, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": LEASE_NAMESPACE}}
            )
            await self._client.create(LEASES, lease, LEASE_NAMESPACE)


async def _insist(step: Callable[[], Awaitable[None]]) -> None:
    while True:
        try:
            return await step()
        except ApiError as e:
            log.warning("%s", e)
        await asyncio.sleep(0.5)
