"""Running the test against an API server: objects in, results out, everything removed at the end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import msgspec

from fimbria.cli.connectivity import objects
from fimbria.cli.connectivity.report import BROKEN, Outcome, Result, outcomes
from fimbria.cli.connectivity.scenario import (
    BALANCED,
    CLIENTS,
    HEADLESS,
    SERVERS,
    SERVICES,
    SPREAD,
    STICKY,
    Client,
    External,
    Places,
    Probe,
    one_node,
    probes,
)
from fimbria.sources.k8s.client import ApiClient
from fimbria.sources.k8s.errors import AlreadyExists, ApiError, Conflict, Forbidden, NotFound
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

    def serving(self) -> bool:
        """Whether all of it can be reached."""
        found = self.endpoints or ()
        return bool(found) and all((e.get("conditions") or {}).get("ready", True) for e in found)


NAMESPACES = Resource("", "v1", "namespaces", "Namespace", Whole, namespaced=False)
NODES = Resource("", "v1", "nodes", "Node", Whole, namespaced=False)
PODS = Resource("", "v1", "pods", "Pod", Whole)
SERVICES_ = Resource("", "v1", "services", "Service", Whole)
SLICES = Resource("discovery.k8s.io", "v1", "endpointslices", "EndpointSlice", Slice)
CILIUM_POLICIES = Resource("cilium.io", "v2", "ciliumnetworkpolicies", "CiliumNetworkPolicy", Whole)
POLICIES = Resource("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy", Whole)


@dataclass(frozen=True, slots=True)
class Settings:
    """What the user chose; `timeout` in seconds for each wait."""

    namespace: str
    image: str
    nodes: tuple[str, ...] = ()
    external: External | None = None
    host_port: int = 38080
    host: bool = True
    load_balancer: bool = False
    policies: bool = True
    keep: bool = False
    timeout: float = 120.0


@dataclass(frozen=True, slots=True)
class Finished:
    """A test that ran."""

    nodes: tuple[str, ...]
    results: tuple[Result, ...]


Explain = Callable[[Sequence[Result], Places], Awaitable[Sequence[Result]]]


async def run(client: ApiClient, settings: Settings, say: Say, explain: Explain | None = None) -> Finished:
    """The whole test. Raises CantRun or ApiError; what was created is removed whatever happens, unless `keep`.

    `explain` is asked about the results while everything is still there, if one isn't as expected.
    """
    test = _Test(client, settings, say)
    nodes = await test.choose_nodes()
    # Not to be cancelled between the server's yes and our hearing of it: who would remove it then?
    created = asyncio.ensure_future(test.create_namespace())
    try:
        await asyncio.shield(created)
        results: Sequence[Result] = await test.measure(nodes)
        if explain is not None and test.places is not None and not all(r.passed for r in results):
            say("asking the agents why")
            results = await explain(results, test.places)
        return Finished(nodes, tuple(results))
    finally:
        await asyncio.wait([created])
        ours = not created.cancelled() and created.exception() is None
        if ours and settings.keep:
            say(f"kept: namespace {settings.namespace}")
        elif ours:
            await asyncio.shield(test.remove())


class _Test:
    def __init__(self, client: ApiClient, settings: Settings, say: Say) -> None:
        self._client = client
        self._s = settings
        self._say = say
        self._cilium = False
        self.places: Places | None = None

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
            await self._client.create(NAMESPACES, objects.namespace(self._s.namespace, restricted=not self._s.host))
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
        servers = [s for s in SERVERS if not s.host or (self._s.host and s.node < len(nodes))]
        self._say(f"starting {len(servers)} servers on {' and '.join(nodes)}")
        mapped = self._s.host_port + 1 if self._s.host else 0
        await asyncio.gather(
            *(
                self._create(PODS, objects.server(s, nodes[min(s.node, len(nodes) - 1)], self._s.image,
                                                  self._s.host_port, mapped))
                for s in servers
            ),
            *(self._create(SERVICES_, objects.service(name)) for name in self._services()),
        )  # fmt: skip
        self.places = places = await self._places([s.name for s in servers], mapped)
        found = [p for p in probes(places) if self._s.host or p.client != "host"]
        wanted = one_node(found) if len(nodes) == 1 else found
        without = await self._round("without", nodes[0], wanted, policies=False)
        under: list[Outcome] = []
        if self._s.policies:
            made = [(POLICIES, p) for p in objects.policies(places.pods["fenced"])]
            made += [(CILIUM_POLICIES, p) for p in objects.cilium_policies()] if places.cilium else []
            await asyncio.gather(*(self._create(resource, policy) for resource, policy in made))
            await asyncio.sleep(SETTLE)
            under = await self._round("with", nodes[0], wanted, policies=True)
        return [Result(p, without[i], under[i] if under else None) for i, p in enumerate(wanted)]

    def _services(self) -> tuple[str, ...]:
        return (*SERVICES, SPREAD, STICKY, HEADLESS, *((BALANCED,) if self._s.load_balancer else ()))

    async def _places(self, servers: Sequence[str], mapped: int) -> Places:
        pods = await self._until("servers", self._servers_ready(servers))
        services = await self._until("services", self._services_ready)
        names, cilium = await self._has_dns(), await self._has_cilium_policies()
        if not names:
            self._say("there is no cluster DNS: names aren't tested")
        await asyncio.sleep(SETTLE)
        addresses = {n: _by_family(s.get("clusterIPs") or [s.get("clusterIP", "")]) for n, s in services.items()}
        if self._s.load_balancer:
            addresses[BALANCED] = await self._until("the load balancer", self._balanced)
        with suppress(ApiError):  # an API server that isn't the cluster's own may have no such Service
            own = await self._client.get(SERVICES_, "kubernetes", "default")
            addresses["kubernetes"] = _by_family(own.spec.get("clusterIPs") or [own.spec.get("clusterIP", "")])
        node_ports = {n: p["nodePort"] for n, s in services.items() for p in (s.get("ports") or ())[:1]
                      if p.get("nodePort") and n in SERVICES}  # fmt: skip
        return Places(
            pods, addresses, self._s.host_port, self._s.external, node_ports,
            namespace=self._s.namespace, mapped_port=mapped, names=names, cilium=cilium,
        )  # fmt: skip

    async def _balanced(self) -> tuple[str, dict[int, str]]:
        service = await self._client.get(SERVICES_, BALANCED, self._s.namespace)
        ingress = (service.status.get("loadBalancer") or {}).get("ingress") or ()
        found = _by_family(i["ip"] for i in ingress if i.get("ip"))
        return ("" if found else "nobody has given the Service of type LoadBalancer an address yet"), found

    async def _has_dns(self) -> bool:
        """By the label that all of Kubernetes' own DNS have."""
        found = (await self._client.list(PODS, "kube-system", labels="k8s-app=kube-dns")).items
        return any(objects.ready(_json(p)) for p in found)

    async def _has_cilium_policies(self) -> bool:
        try:
            await self._client.list(CILIUM_POLICIES, self._s.namespace)
        except ApiError:
            return False
        return True

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
        ready = {(s.metadata.labels or {}).get("kubernetes.io/service-name") for s in slices if s.serving()}
        missing = [name for name in self._services() if name not in ready]
        if missing:
            return f"no endpoint of service {missing[0]} is ready", {}
        found = (await self._client.list(SERVICES_, self._s.namespace)).items
        return "", {s.metadata.name: s.spec for s in found}

    async def _round(self, name: str, node: str, wanted: Sequence[Probe], *, policies: bool) -> list[Outcome]:
        """Starts the clients and waits for every connection's end."""
        self._say(f"trying {len(wanted)} connections {name} policies")
        mine = {c.name: [i for i, p in enumerate(wanted) if p.client == c.name] for c in CLIENTS}
        clients = [c for c in CLIENTS if mine[c.name]]
        await asyncio.gather(*(self._client_pod(c, name, node, [wanted[i] for i in mine[c.name]], policies)
                               for c in clients))  # fmt: skip
        found: dict[str, list[Outcome]] = {}

        async def look() -> tuple[str, dict[str, list[Outcome]]]:
            for pod in (await self._client.list(PODS, self._s.namespace)).items:
                who, _, round_ = pod.metadata.name.rpartition("-")
                statuses = pod.status.get("containerStatuses") or ()
                ended = outcomes(statuses[0], len(mine[who])) if round_ == name and who in mine and statuses else None
                if ended is not None:
                    found[who] = ended
            missing = [c.name for c in clients if c.name not in found]
            return (f"client {', '.join(missing)}" if missing else ""), found

        try:
            await self._until("connections", look)
        except CantRun:
            if not found:
                raise
        results = [Outcome(BROKEN, f"no end after {self._s.timeout:.0f} s")] * len(wanted)
        for who, ended in found.items():
            for i, outcome in zip(mine[who], ended, strict=True):
                results[i] = outcome
        return results

    async def _client_pod(self, c: Client, round_: str, node: str, tries: Sequence[Probe], policies: bool) -> None:
        pod = objects.client(c, round_, node, self._s.image, probes=tries, policies=policies)
        await self._create(PODS, pod)

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
