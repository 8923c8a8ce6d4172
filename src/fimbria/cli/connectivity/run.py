"""Running the test against an API server: objects in, results out, everything removed at the end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import msgspec

from fimbria.cli.connectivity import objects
from fimbria.cli.connectivity.report import BROKEN, Outcome, Result, outcome
from fimbria.cli.connectivity.scenario import CLIENTS, SERVERS, SERVICES, External, Places, Probe, one_node, probes
from fimbria.sources.k8s.client import ApiClient
from fimbria.sources.k8s.errors import AlreadyExists, Conflict, Forbidden, NotFound
from fimbria.sources.k8s.resources import Resource
from fimbria.sources.k8s.types.meta import ApiObject

POLL: Final = 0.3
NO_ACCOUNT_YET: Final = 15.0  # seconds that a new namespace may take to get its service account
SETTLE: Final = 1.0  # seconds for policies and services to reach all nodes
REMOVAL: Final = 120.0
T = TypeVar("T")
Json = dict[str, Any]
Say = Callable[[str], None]


class CantRun(Exception):
    """The test can't be run; one sentence."""


class Whole(ApiObject, frozen=True):
    """An object whose spec and status are taken as they are."""

    spec: Json = msgspec.field(default_factory=dict)
    status: Json = msgspec.field(default_factory=dict)


class Slice(ApiObject, frozen=True):
    """An EndpointSlice."""

    endpoints: tuple[Json, ...] | None = None


NAMESPACES = Resource("", "v1", "namespaces", "Namespace", Whole, namespaced=False)
NODES = Resource("", "v1", "nodes", "Node", Whole, namespaced=False)
PODS = Resource("", "v1", "pods", "Pod", Whole)
SERVICES_ = Resource("", "v1", "services", "Service", Whole)
SLICES = Resource("discovery.k8s.io", "v1", "endpointslices", "EndpointSlice", Slice)
POLICIES = Resource("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy", Whole)


@dataclass(frozen=True, slots=True)
class Settings:
    """What the user chose; `timeout` in seconds for each wait."""

    namespace: str
    image: str
    nodes: tuple[str, ...] = ()
    external: External | None = None
    host_port: int = 38080
    policies: bool = True
    keep: bool = False
    timeout: float = 120.0


@dataclass(frozen=True, slots=True)
class Finished:
    """A test that ran."""

    nodes: tuple[str, ...]
    results: tuple[Result, ...]


async def run(client: ApiClient, settings: Settings, say: Say) -> Finished:
    """The whole test. Raises CantRun or ApiError; what was created is removed whatever happens, unless `keep`."""
    test = _Test(client, settings, say)
    nodes = await test.choose_nodes()
    await test.create_namespace()
    try:
        return Finished(nodes, tuple(await test.measure(nodes)))
    finally:
        if settings.keep:
            say(f"kept: namespace {settings.namespace}")
        else:
            await asyncio.shield(test.remove())


class _Test:
    def __init__(self, client: ApiClient, settings: Settings, say: Say) -> None:
        self._client = client
        self._s = settings
        self._say = say

    async def choose_nodes(self) -> tuple[str, ...]:
        """Two nodes that take pods; the first is the clients'."""
        known = {n.metadata.name: n for n in (await self._client.list(NODES)).items}
        for name in self._s.nodes:
            if name not in known:
                raise CantRun(f"there is no node {name}; there are {', '.join(sorted(known)) or 'none'}")
        chosen = self._s.nodes or tuple(sorted(n for n, node in known.items() if objects.usable_node(_json(node))))
        if not chosen:
            raise CantRun(f"no node is Ready for pods; there are {', '.join(sorted(known)) or 'none'}")
        if len(chosen) == 1:
            self._say(f"only one node ({chosen[0]}): connections between nodes are left out")
        return tuple(chosen[:2])

    async def create_namespace(self) -> None:
        """Fails if it is there already: what is in it isn't ours."""
        try:
            await self._client.create(NAMESPACES, objects.namespace(self._s.namespace))
        except AlreadyExists:
            raise CantRun(f"namespace {self._s.namespace} exists already; choose another, or delete it") from None

    async def remove(self) -> None:
        """The namespace with everything in it."""
        name = self._s.namespace
        self._say(f"removing namespace {name}")
        await self._client.delete(NAMESPACES, name, missing_ok=True)
        deadline = time.monotonic() + REMOVAL
        while time.monotonic() < deadline:
            try:
                await self._client.get(NAMESPACES, name)
            except NotFound:
                return
            await asyncio.sleep(POLL)
        raise CantRun(f"namespace {name} is still being removed after {REMOVAL:.0f} s; look at its status")

    async def measure(self, nodes: tuple[str, ...]) -> list[Result]:
        """Both rounds."""
        # With one node all servers are on it, but two can't have the same port of it.
        servers = [s for s in SERVERS if s.node < len(nodes) or not s.host]
        self._say(f"starting {len(servers)} servers on {' and '.join(nodes)}")
        for s in servers:
            node = nodes[min(s.node, len(nodes) - 1)]
            await self._create(PODS, objects.server(s, node, self._s.image, self._s.host_port))
        for name in SERVICES:
            await self._create(SERVICES_, objects.service(name))
        places = await self._places([s.name for s in servers])
        found = probes(places)
        wanted = one_node(found) if len(nodes) == 1 else found
        named = {f"p{i}": p for i, p in enumerate(wanted)}
        without = await self._round("without", nodes[0], named, policies=False)
        under: dict[str, Outcome] = {}
        if self._s.policies:
            for policy in objects.policies(places.pods["fenced"]):
                await self._create(POLICIES, policy)
            await asyncio.sleep(SETTLE)
            under = await self._round("with", nodes[0], named, policies=True)
        return [Result(p, without[name], under.get(name)) for name, p in named.items()]

    async def _places(self, servers: Sequence[str]) -> Places:
        pods = await self._until("servers", self._servers_ready(servers))
        services = await self._until("services", self._services_ready)
        await asyncio.sleep(SETTLE)
        addresses = {n: _by_family(s.get("clusterIPs") or [s.get("clusterIP", "")]) for n, s in services.items()}
        node_ports = {n: p.get("nodePort") or 0 for n, s in services.items() for p in (s.get("ports") or ())[:1]}
        return Places(pods, addresses, self._s.host_port, self._s.external, node_ports)

    def _servers_ready(self, servers: Sequence[str]) -> Callable[[], Awaitable[tuple[str, dict[str, dict[int, str]]]]]:
        async def look() -> tuple[str, dict[str, dict[int, str]]]:
            pods = {p.metadata.name: _json(p) for p in (await self._client.list(PODS, self._s.namespace)).items}
            for name in servers:
                if (pods.get(name, {}).get("status") or {}).get("phase") == "Failed":
                    raise CantRun(f"pod {name} can't run: {objects.why_not_ready(pods[name])}")
                if not objects.ready(pods.get(name, {})):
                    return f"pod {name}: {objects.why_not_ready(pods.get(name, {}))}", {}
            return "", {n: _by_family(e["ip"] for e in pods[n]["status"].get("podIPs") or ()) for n in servers}

        return look

    async def _services_ready(self) -> tuple[str, dict[str, Json]]:
        slices = (await self._client.list(SLICES, self._s.namespace)).items
        filled = {(s.metadata.labels or {}).get("kubernetes.io/service-name") for s in slices if s.endpoints}
        missing = [name for name in SERVICES if name not in filled]
        if missing:
            return f"no EndpointSlice for service {missing[0]}", {}
        found = (await self._client.list(SERVICES_, self._s.namespace)).items
        return "", {s.metadata.name: s.spec for s in found}

    async def _round(self, name: str, node: str, named: Mapping[str, Probe], *, policies: bool) -> dict[str, Outcome]:
        """Starts the clients and waits for every connection's end."""
        self._say(f"trying {len(named)} connections {name} policies")
        for c in CLIENTS:
            own = {n: p for n, p in named.items() if p.client == c.name}
            if own:
                await self._create(PODS, objects.client(c, name, node, self._s.image, probes=own, policies=policies))
        found: dict[str, Outcome] = {}

        async def look() -> tuple[str, dict[str, Outcome]]:
            for pod in (await self._client.list(PODS, self._s.namespace)).items:
                if pod.metadata.name.endswith(f"-{name}"):
                    for status in pod.status.get("containerStatuses") or ():
                        ended = outcome(status)
                        if ended is not None and status["name"] in named:
                            found[status["name"]] = ended
            missing = len(named) - len(found)
            return (f"{missing} of {len(named)} connections" if missing else ""), found

        try:
            return await self._until("connections", look)
        except CantRun:
            if not found:
                raise
            return {n: found.get(n) or Outcome(BROKEN, f"no end after {self._s.timeout:.0f} s") for n in named}

    async def _until(self, what: str, look: Callable[[], Awaitable[tuple[str, T]]]) -> T:
        """Polls until nothing is missing. Raises CantRun naming what is missing after `timeout`."""
        deadline = time.monotonic() + self._s.timeout
        said = ""
        while True:
            missing, value = await look()
            if not missing:
                return value
            if time.monotonic() > deadline:
                raise CantRun(f"waiting for {what} took more than {self._s.timeout:.0f} s: {missing}")
            if missing != said:
                self._say(f"waiting for {what}: {missing}")
                said = missing
            await asyncio.sleep(POLL)

    async def _create(self, resource: Resource[Whole], value: Json) -> None:
        deadline = time.monotonic() + NO_ACCOUNT_YET
        while True:
            try:
                await self._client.create(resource, value, self._s.namespace)
                return
            except (Forbidden, Conflict) as error:
                if "serviceaccount" not in str(error).lower() or time.monotonic() > deadline:
                    raise
            await asyncio.sleep(POLL)


def _json(obj: Whole) -> Json:
    return {"spec": obj.spec, "status": obj.status}


def _by_family(addresses: Any) -> dict[int, str]:
    return {6 if ":" in a else 4: a for a in addresses if a and a != "None"}
