"""LoadBalancer Services in the lab, as a cloud provides them: an address for each, which leads to the nodes.

Rules
1. Services of type LoadBalancer without `loadBalancerClass` get an address of each of their families, from
   documentation networks (RFC 5737, RFC 3849). The status is the only memory: what stands there is kept.
2. An address leads to all nodes that run; with externalTrafficPolicy Local to those whose health-check node port says
   200, as clouds find out by themselves. One good answer takes a node in, `REFUSALS` bad ones in a row or `SILENCES`
   without any take it out: an agent may be restarted meanwhile.
3. Connections stay with their node while it is in. Packets arrive with the load balancer's address as destination:
   nothing is translated on the way, and any node may answer from it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address
from typing import Any, Final

import msgspec

from fimbria.lab import fabric, kernel, state
from fimbria.lab.errors import LabError
from fimbria.lab.forward import connect
from fimbria.lab.layout import BALANCER4, BALANCER6, LabSpec, Paths
from fimbria.sources.k8s.client import ApiClient
from fimbria.sources.k8s.errors import ApiError
from fimbria.sources.k8s.informer import Informer, object_key
from fimbria.sources.k8s.resources import Resource
from fimbria.sources.k8s.types.meta import ApiObject
from fimbria.tables.table import Table

POOLS: Final[dict[str, IPv4Network | IPv6Network]] = {"IPv4": BALANCER4, "IPv6": BALANCER6}
CHECK_EVERY, CHECK_PATIENCE = 0.5, 1.0  # seconds
# In a row. An agent that restarts on a busy machine is silent for many seconds, and forwards all the while.
REFUSALS, SILENCES = 2, 50
log = logging.getLogger("cloud.balancers")


class ServiceObject(ApiObject, frozen=True):
    """A Service with its fields as they are."""

    spec: dict[str, Any] = msgspec.field(default_factory=dict)
    status: dict[str, Any] = msgspec.field(default_factory=dict)


SERVICES: Resource[ServiceObject] = Resource("", "v1", "services", "Service", ServiceObject)


@dataclass(frozen=True, slots=True)
class Balancer:
    """What a Service asks for and has. `health_port` is 0 if every node will do; `requested` is loadBalancerIP."""

    name: str
    namespace: str
    families: tuple[str, ...]
    health_port: int = 0
    requested: str = ""
    addresses: tuple[str, ...] = ()


def balancer(service: ServiceObject) -> Balancer | None:
    """None for a Service that isn't the lab's to serve."""
    spec = service.spec
    if spec.get("type") != "LoadBalancer" or spec.get("loadBalancerClass") or service.metadata.deletion_timestamp:
        return None
    ingress = (service.status.get("loadBalancer") or {}).get("ingress") or ()
    return Balancer(
        service.metadata.name,
        service.metadata.namespace,
        tuple(spec.get("ipFamilies") or ("IPv4",)),
        int(spec.get("healthCheckNodePort") or 0) if spec.get("externalTrafficPolicy") == "Local" else 0,
        spec.get("loadBalancerIP") or "",
        tuple(str(ip_address(one["ip"])) for one in ingress if one.get("ip")),
    )


def assign(balancers: Mapping[str, Balancer]) -> dict[str, tuple[str, ...]]:
    """Addresses for every Service, one a family: those that it has, else the requested one, else the lowest free."""
    taken: set[str] = set()
    found: dict[str, list[str]] = {key: [] for key in balancers}
    for key, b in sorted(balancers.items()):
        for family in b.families:
            kept = next((a for a in b.addresses if a not in taken and _fits(a, family)), "")
            found[key] += [kept] if kept else []
            taken |= {kept}
    for key, b in sorted(balancers.items()):
        for family in b.families:
            if not any(_fits(a, family) for a in found[key]):
                address = _choose(b, family, taken)
                found[key].append(address)
                taken.add(address)
    return {key: tuple(sorted(addresses, key=lambda a: ":" in a)) for key, addresses in found.items()}


def _fits(address: str, family: str) -> bool:
    return ip_address(address) in POOLS[family]


def _choose(b: Balancer, family: str, taken: set[str]) -> str:
    """Raises LabError if the pool is used up."""
    if b.requested and b.requested not in taken and _fits(b.requested, family):
        return b.requested
    pool = POOLS[family]
    for number in range(1, pool.num_addresses - 1):
        if (address := str(pool[number])) not in taken:
            return address
    raise LabError(f"no address left for {b.namespace}/{b.name} in {pool}")


class Health:
    """Which nodes answer well at which port: rule 2."""

    def __init__(self) -> None:
        self._bad: dict[tuple[str, int], tuple[int, int]] = {}  # refusals and silences since the last good answer

    def heard(self, node: str, port: int, good: bool | None) -> None:
        """The outcome of one check; None if there was no answer."""
        refusals, silences = self._bad.get((node, port), (REFUSALS, 0))
        self._bad[node, port] = (0, 0) if good else (refusals + (good is False), silences + (good is None))

    def good(self, node: str, port: int) -> bool:
        """A node that was never asked isn't."""
        refusals, silences = self._bad.get((node, port), (REFUSALS, 0))
        return refusals < REFUSALS and silences < SILENCES

    def keep(self, ports: Iterable[int]) -> None:
        """Forgets all other ports."""
        kept = set(ports)
        self._bad = {key: n for key, n in self._bad.items() if key[1] in kept}


class Balancers:
    """The loop. I/O begins in `run()`."""

    def __init__(self, spec: LabSpec, paths: Paths, client: ApiClient) -> None:
        self._spec, self._paths, self._client = spec, paths, client
        self._table: Table[str, Balancer] = Table("balancers")
        self._health = Health()
        self._routed: fabric.Balancing = {}
        # One thread lives in the router's namespace and makes the sockets that ask for nodes' health.
        self._threads = ThreadPoolExecutor(1, initializer=_enter, initargs=(paths,))

    def forget(self) -> None:
        """The router has lost some of what it was told: tell it all of it again."""
        self._routed = {}

    async def run(self) -> None:
        """For ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(Informer(self._client, SERVICES, self._table, balancer, key=object_key).run())
            await self._table.wait_synced()
            await self._change(fabric.forget_balancers())
            subscription = self._table.subscribe()
            while True:
                subscription.drain()
                try:
                    await self._once()
                except (ApiError, LabError) as e:
                    log.error("%s", e)
                try:
                    async with asyncio.timeout(CHECK_EVERY):
                        await subscription.wait()
                except TimeoutError:
                    continue

    async def _once(self) -> None:
        wanted = dict(self._table.items())
        addresses = assign(wanted)
        for key, b in wanted.items():
            if addresses[key] != b.addresses:
                await self._tell(b, addresses[key])
        running = [n for n in self._spec.node_names if self._runs(n)]
        await self._check(running, {b.health_port for b in wanted.values()} - {0})
        after: dict[str, frozenset[str]] = {}
        for key, b in wanted.items():
            nodes = frozenset(n for n in running if not b.health_port or self._health.good(n, b.health_port))
            after |= dict.fromkeys(addresses[key], nodes)
        await self._change(fabric.balancer_changes(self._spec, self._routed, after))
        self._routed = after

    def _runs(self, node: str) -> bool:
        init = state.recall(self._paths, f"{node}/{state.INIT}")
        return init is not None and init.alive()

    async def _tell(self, b: Balancer, addresses: tuple[str, ...]) -> None:
        ingress = [{"ip": a, "ipMode": "VIP"} for a in addresses]
        log.info("%s/%s: %s", b.namespace, b.name, ", ".join(addresses))
        await self._client.patch_status(SERVICES, b.name, {"loadBalancer": {"ingress": ingress}}, b.namespace)

    async def _check(self, nodes: list[str], ports: set[int]) -> None:
        self._health.keep(ports)
        asked = [(n, p) for n in nodes for p in sorted(ports)]
        for (node, port), good in zip(asked, await asyncio.gather(*(self._ask(*a) for a in asked)), strict=True):
            self._health.heard(node, port, good)

    async def _ask(self, node: str, port: int) -> bool | None:
        """Whether the node says 200 at that port; None if it says nothing."""
        try:
            async with asyncio.timeout(CHECK_PATIENCE):
                reader, writer = await connect(self._threads, self._spec.node(node).ipv4, port)
                try:
                    writer.write(f"GET /healthz HTTP/1.0\r\nHost: {node}\r\n\r\n".encode())
                    line = await reader.readline()
                    return b" 200 " in line if line else None
                finally:
                    writer.close()
        except (OSError, TimeoutError):
            return None

    async def _change(self, lines: list[str]) -> None:
        if lines:
            log.info("%s", "; ".join(lines))
            await asyncio.to_thread(kernel.ip_lines, self._paths.netns_name(fabric.ROUTER), lines)


def _enter(paths: Paths) -> None:
    kernel.setns(paths.netns(fabric.ROUTER), kernel.CLONE_NEWNET)
