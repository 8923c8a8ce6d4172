"""The demo: a small application from ordinary YAML on a lab of three nodes, and what can be measured on it."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, Final

import aiohttp

from fimbria.lab import access, cluster, components, kernel, state
from fimbria.lab.errors import LabError
from fimbria.lab.layout import LabSpec, Paths
from fimbria.lab.manifests import Manifest, parse
from fimbria.lab.objects import apply_all
from fimbria.lab.slowness import factor

Json = dict[str, Any]
APP, POLICIES = "app.yaml", "policies.yaml"
NAMESPACES: Final = ("shop", "monitoring", "guest")
SOURCES: Final = ("shop/frontend", "shop/api", "shop/db", "monitoring/prometheus", "guest/visitor")
TARGETS: Final = ("shop/frontend", "shop/api", "shop/db", "monitoring/prometheus")
WORLD: Final = "outside world"
WORLD_PORT: Final = 8080
SELF: Final = "itself"
READY_WITHIN: Final = 60.0 * factor()
TIMEOUT_MS: Final = int(500 * factor())


def manifests(name: str) -> list[Manifest]:
    """Objects of one of the demo's files."""
    return parse(files(__package__).joinpath(name).read_text(), name)


@dataclass(frozen=True, slots=True)
class DemoPod:
    """A pod as the demo shows it."""

    namespace: str
    name: str
    app: str
    node: str
    ips: tuple[str, ...]
    ready: bool
    raw: Json = field(repr=False, hash=False, compare=False)

    @property
    def workload(self) -> str:
        """Namespace and app."""
        return f"{self.namespace}/{self.app}"


@dataclass(frozen=True, slots=True)
class Outside:
    """A Service as the outside world sees it: the load balancer's address and port, and how many connections each
    backend answered by each way in."""

    balancer: tuple[str, int]
    answers: dict[str, Counter[str]]


class Demo:
    """The steps of the demo on a lab that is up."""

    def __init__(self, spec: LabSpec) -> None:
        self.spec = spec
        self.paths = Paths(spec.name)
        self.labtool = kernel.binary("labtool")

    # --- the application ---------------------------------------------------------------------------------------------

    async def apply(self, name: str, report: Callable[[Manifest, str], None]) -> None:
        """Create the objects of a file. Raises LabError, ApiError."""
        async with cluster.api(self.paths) as objects:
            await apply_all(objects, manifests(name), report)

    async def pods(self) -> list[DemoPod]:
        """The demo's pods, in a stable order."""
        async with cluster.api(self.paths) as objects:
            found = [p for n in NAMESPACES for p in await _items(objects, f"/api/v1/namespaces/{n}/pods")]
        return sorted(map(_pod, found), key=lambda p: (NAMESPACES.index(p.namespace), p.app, p.name))

    async def wait_ready(self, count: int, show: Callable[[list[DemoPod]], None]) -> list[DemoPod]:
        """Until that many pods are ready. Raises LabError naming those that aren't."""
        deadline = asyncio.get_running_loop().time() + READY_WITHIN
        while True:
            pods = await self.pods()
            show(pods)
            if len(pods) >= count and all(p.ready for p in pods):
                return pods
            if asyncio.get_running_loop().time() > deadline:
                late = ", ".join(f"{p.namespace}/{p.name}" for p in pods if not p.ready) or "(not created)"
                raise LabError(f"these pods are not ready after {READY_WITHIN:.0f} s: {late}")
            await asyncio.sleep(0.25)

    async def services(self) -> dict[str, list[tuple[str, int]]]:
        """`namespace/name` -> its addresses with the port, IPv4 first."""
        found: dict[str, list[tuple[str, int]]] = {}
        async with cluster.api(self.paths) as objects:
            for n in NAMESPACES:
                for s in await _items(objects, f"/api/v1/namespaces/{n}/services"):
                    ips = sorted(s["spec"].get("clusterIPs", ()), key=lambda ip: ":" in ip)
                    port = s["spec"]["ports"][0]["port"]
                    found[f"{n}/{s['metadata']['name']}"] = [(ip, port) for ip in ips]
        return found

    async def identities(self) -> dict[str, int]:
        """`namespace/pod` -> identity number."""
        async with cluster.api(self.paths) as objects:
            found = await _items(objects, "/apis/cilium.io/v2/ciliumendpoints")
        return {f"{e['metadata']['namespace']}/{e['metadata']['name']}": e["status"]["identity"]["id"] for e in found}

    # --- measuring ---------------------------------------------------------------------------------------------------

    async def start_world(self) -> None:
        """A web server in the outside world, to be reached by masquerading."""
        argv = [str(self.labtool), "serve", "--http", str(WORLD_PORT)]
        name = "world/demo-server"
        known = state.recall(self.paths, name)
        if known is None or not known.alive():
            await asyncio.to_thread(components.start, self.paths, name, argv)

    async def matrix(self, pods: list[DemoPod]) -> dict[tuple[str, str], str]:
        """(source workload, target) -> result of a real connection from the first pod of the source."""
        services = await self.services()
        targets = [(t, *services[t][0]) for t in TARGETS] + [(WORLD, self.spec.world.ipv4, WORLD_PORT)]
        first = {w: next(p for p in pods if p.workload == w) for w in SOURCES}

        async def row(source: str) -> list[tuple[tuple[str, str], str]]:
            async def cell(name: str, host: str, port: int) -> tuple[tuple[str, str], str]:
                if name == source:
                    return (source, name), SELF  # its Service may lead a pod to itself, which no policy can forbid
                found = await self.probe(first[source], host, port)
                return (source, name), found[0]["result"] if found else "?"

            return await asyncio.gather(*(cell(*t) for t in targets))

        return dict(c for cells in await asyncio.gather(*map(row, SOURCES)) for c in cells)

    async def spread(self, pod: DemoPod, service: str, count: int) -> dict[str, Counter[str]]:
        """Address of a service -> how many of `count` connections each backend answered."""
        found: dict[str, Counter[str]] = {}
        for host, port in (await self.services())[service]:
            results = await self.probe(pod, host, port, count)
            found[f"{host}"] = Counter(r["answer"]["name"] for r in results if r["result"] == "ok")
        return found

    async def from_outside(self, service: str, count: int) -> Outside:
        """`count` connections from the outside world through its load balancer's address, and as many through a node
        port. Raises LabError."""
        namespace, name = service.split("/")
        async with cluster.api(self.paths) as objects:
            path = f"/api/v1/namespaces/{namespace}/services/{name}"
            found = await _given(objects, path)
        port, balancer = found["spec"]["ports"][0], found["status"]["loadBalancer"]["ingress"][0]["ip"]
        node = self.spec.node(self.spec.node_names[-1])
        ways = {
            f"load balancer {balancer}:{port['port']}": (balancer, port["port"]),
            f"node port {node.ipv4}:{port['nodePort']}": (node.ipv4, port["nodePort"]),
        }
        inside = components.enter(self.paths, "world")
        results = await asyncio.gather(*(self._run([*inside, "--"], *where, count) for where in ways.values()))
        answers = {
            way: Counter(r["answer"]["name"] for r in rows if r["result"] == "ok")
            for way, rows in zip(ways, results, strict=True)
        }
        return Outside((balancer, port["port"]), answers)

    async def probe(
        self, pod: DemoPod, host: str, port: int, count: int = 1, *, timeout_ms: int = TIMEOUT_MS
    ) -> list[Json]:
        """Real HTTP connections from inside a pod; one result each."""
        inside = access.pod_argv(self.paths, access.PodPlace.of(pod.raw), "", [])
        return await self._run(inside, host, port, count, timeout_ms)

    async def _run(
        self, inside: list[str], host: str, port: int, count: int, timeout_ms: int = TIMEOUT_MS
    ) -> list[Json]:
        options = ("--timeout", str(timeout_ms), "--count", str(count))
        process = await asyncio.create_subprocess_exec(
            *inside, self.labtool, "probe", "http", host, str(port), *options,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=components.ENVIRONMENT,
        )  # fmt: skip
        out, err = await process.communicate()
        lines = [json.loads(line) for line in out.splitlines() if line.startswith(b"{")]
        if not lines:
            raise LabError(f"probe of {host} port {port}: {err.decode(errors='replace').strip()}")
        return lines

    async def flows(self, last: int, query: str = "") -> list[Json]:
        """The last flows of all nodes by time, from their observers."""
        found: list[Json] = []
        for node in self.spec.node_names:
            path = access.node_root(self.paths, node) / "run/fimbria/observer.sock"
            connector = aiohttp.UnixConnector(str(path))
            async with (
                aiohttp.ClientSession(connector=connector) as session,
                session.get(f"http://observer/v1/flows?last={last}{query}") as response,
            ):
                found += [json.loads(line) for line in (await response.text()).splitlines()]
        return sorted(found, key=lambda f: f["time"])[-last:]


async def _given(objects: Any, path: str) -> Json:
    """A Service, once the lab's cloud has given it an address. Raises LabError."""
    deadline = asyncio.get_running_loop().time() + READY_WITHIN
    while True:
        found: Json = await objects.request("GET", path)
        if found["status"]["loadBalancer"].get("ingress"):
            return found
        if asyncio.get_running_loop().time() > deadline:
            raise LabError(f"{path} has no load balancer's address after {READY_WITHIN:.0f} s")
        await asyncio.sleep(0.1)


async def _items(objects: Any, path: str) -> Iterable[Json]:
    found: list[Json] = (await objects.request("GET", path)).get("items") or []
    return found


def _pod(raw: Json) -> DemoPod:
    meta, status = raw["metadata"], raw.get("status") or {}
    ready = any(c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions") or ())
    return DemoPod(
        meta["namespace"], meta["name"], (meta.get("labels") or {}).get("app", "?"), raw["spec"].get("nodeName", ""),
        tuple(i["ip"] for i in status.get("podIPs") or ()), ready, raw,
    )  # fmt: skip
