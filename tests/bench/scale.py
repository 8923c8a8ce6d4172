"""A cluster of thousands of nodes and tens of thousands of pods on a real API server: what it costs that every node
learns of every pod, with a CiliumEndpoint a pod and with slices that the operator fills.

The size is NODESxPODS in the variable FIMBRIA_BENCH_SCALE; 5000x100000 is what Kubernetes supports at most. A few nodes
are followed for real, each by a process with an agent's informers; what thousands of them need is what these need,
multiplied: every node is sent the same."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.bench import bigserver, cluster_data
from tests.bench.agent import cpu_seconds, pss
from tests.bench.bigserver import ROOT, BigServer, big_server
from tests.bench.measure import BenchError, Settings
from tests.bench.report import Figure, Goal, figure, percentile
from tests.bench.scale_agents import Fleet
from tests.bench.scale_watcher import MARK

from fimbria.lab import components
from fimbria.model.labels import DEFAULT_FILTER, Labels, pod_labels
from fimbria.sources.k8s import resources, rows
from fimbria.sources.k8s.client import ApiClient

VARIABLE: Final = "FIMBRIA_BENCH_SCALE"
DEFAULT: Final = "1000x20000"
FULL: Final = 5000  # nodes that figures are multiplied for
WATCHERS: Final = 4
RATE: Final = 50.0  # pods a second
PATIENCE: Final = 600.0
MODES: Final = {"pods": "a CiliumEndpoint each", "slices": "slices"}
LESS: Final = Goal("ratio", "<=", 1.0)
WRITES: Final = ("POST", "PUT", "PATCH", "APPLY", "DELETE")


@dataclass(frozen=True, slots=True)
class Size:
    """Of the simulated cluster; `burst` pods are created in a storm."""

    nodes: int
    pods: int
    burst: int

    @staticmethod
    def of(settings: Settings) -> Size:
        """From the environment. Raises BenchError."""
        text = "50x1000" if settings.quick else os.environ.get(VARIABLE, DEFAULT)
        found = re.fullmatch(r"(\d+)x(\d+)", text)
        if not found or not 10 <= int(found[1]) <= FULL or int(found[2]) > 20 * FULL:
            raise BenchError(f"{VARIABLE}={text}: NODESxPODS was expected, at most {FULL}x{20 * FULL}")
        nodes, pods = int(found[1]), int(found[2])
        return Size(nodes, pods, min(1000, pods // 10))

    def __str__(self) -> str:
        return f"{self.nodes:,} nodes, {self.pods:,} pods"


@dataclass(slots=True)
class Watcher:
    """A process of scale_watcher."""

    process: asyncio.subprocess.Process
    first: dict[str, Any] = field(default_factory=dict)

    async def tell(self) -> dict[str, Any]:
        """What it has received so far."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        return await self.read()

    async def read(self) -> dict[str, Any]:
        """Its next line. Raises BenchError if it ended."""
        assert self.process.stdout is not None
        line = await self.process.stdout.readline()
        if not line:
            raise BenchError("a simulated agent ended; see its output above")
        found: dict[str, Any] = json.loads(line)
        return found


@dataclass(slots=True)
class Outcome:
    """What one mode needed; names of figures to values."""

    values: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def scale(settings: Settings) -> list[Figure]:
    """All figures, slices against a CiliumEndpoint each."""
    size = Size.of(settings)
    outcomes: dict[str, Outcome] = {}
    for mode in MODES:
        with big_server() as server:
            outcomes[mode] = asyncio.run(_Run(settings, server, size, mode).all())
    return _figures(size, outcomes["pods"], outcomes["slices"])


@dataclass(slots=True)
class _Run:
    """One mode on one server."""

    settings: Settings
    server: BigServer
    size: Size
    mode: str
    found: Outcome = field(default_factory=Outcome)
    watchers: list[Watcher] = field(default_factory=list)

    async def all(self) -> Outcome:
        async with AsyncExitStack() as stack:
            client = await stack.enter_async_context(self.server.client("agent"))
            await self._fill()
            operator = await stack.enter_async_context(_operator(self.server, slices=self.mode == "slices"))
            if self.mode == "slices":
                await self._batched(client, operator)
            await self._list_storm(stack)
            fleet = await stack.enter_async_context(Fleet(client, min(self.size.nodes, FULL)))
            await self._pod_storm(fleet, operator)
            await self._namespace_label(fleet)
            await self._removal(fleet)
            await self._deployment(fleet)
            await self._node_churn(client)
            await self._identities(fleet, client)
            self.found.values["operator PSS"] = pss(operator.pid)
        return self.found

    def say(self, text: str) -> None:
        self.settings.say(f"scale, {MODES[self.mode]}: {text}")

    async def _fill(self) -> None:
        size, began = self.size, time.monotonic()
        reports = list(cluster_data.pods(size.pods, size.nodes, cluster_data.IDENTITIES, ipv6=False))
        for part in (
            bigserver.core_nodes(size.nodes), cluster_data.nodes(size.nodes, ipv6=False),
            cluster_data.identities(cluster_data.IDENTITIES), bigserver.core_pods(reports, size.nodes), reports,
        ):  # fmt: skip
            await self.server.fill(part)
        self.say(f"{size} are in etcd after {time.monotonic() - began:.0f} s")

    async def _batched(self, client: ApiClient, operator: _Operator) -> None:
        """Until the operator says that slices hold everybody."""
        began, before = time.monotonic(), await self.server.requests()
        while True:
            found = await client.list(resources.CILIUM_ENDPOINT_SLICES)
            if any(s.metadata.name == rows.COVER for s in found.items):
                break
            if time.monotonic() - began > PATIENCE or not operator.alive():
                raise BenchError(f"the operator has filled {len(found.items)} slices and no more: {operator.tail()}")
            await asyncio.sleep(0.5)
        took = time.monotonic() - began
        asked = _writes(_less(await self.server.requests(), before))
        self.found.values["batched in"] = took
        self.found.notes["batched in"] = f"{len(found.items) - 1:,} slices, {asked:,.0f} writes, CPU of the " \
                                         f"operator {cpu_seconds(operator.pid):.0f} s"  # fmt: skip
        self.say(f"{len(found.items) - 1} slices after {took:.0f} s")

    async def _list_storm(self, stack: AsyncExitStack) -> None:
        """Some nodes start, all at once: what the server needs for each."""
        await (await stack.enter_async_context(_watcher(self.server, "far0"))).tell()  # the server's caches are full
        cpu = self.server.cpu()
        self.watchers = await asyncio.gather(
            *(stack.enter_async_context(_watcher(self.server, f"far{n + 1}")) for n in range(WATCHERS))
        )
        first = [w.first for w in self.watchers]
        if any(w["pods"] != self.size.pods or w["slices"] != (self.mode == "slices") for w in first):
            raise BenchError(f"a node that starts knows {[(w['pods'], w['slices']) for w in first]}")
        values = self.found.values
        values["start: bytes"] = _middle(w["listed"] for w in first) / 1e6
        values["start: server CPU"] = (self.server.cpu() - cpu) / WATCHERS
        values["start: agent CPU"] = _middle(w["cpu"] for w in first)
        values["start: agent PSS"] = _middle(w["pss"] for w in first)
        values["start: seconds"] = max(w["took"] for w in first)
        values["server RSS"] = self.server.rss()
        self.say(f"{WATCHERS} nodes at once know all after {values['start: seconds']:.1f} s")

    async def _pod_storm(self, fleet: Fleet, operator: _Operator) -> None:
        names = [f"{MARK}{n:05}" for n in range(self.size.burst)]
        before = await self._totals()
        used, cpu, began = cpu_seconds(operator.pid), self.server.cpu(), time.monotonic()
        created = await fleet.storm(names, RATE, {"app": "app7", "tier": "odd"})
        took = time.monotonic() - began
        seen = await self._known(lambda key: key.split()[0] in created, len(names))
        delays = [at - created[key.split()[0]] for one in seen for key, at in one.items() if key.split()[1] != "0"]
        values = self.found.values
        values["storm: median"], values["storm: p99"] = percentile(delays, 0.5) * 1000, percentile(delays, 0.99) * 1000
        after = await self._totals()
        values["storm: requests"] = sum(_less(after.requests, before.requests).values()) / took
        values["storm: writes"] = _writes(_less(after.requests, before.requests)) / took
        values["storm: bytes"] = (after.watched - before.watched) / len(names)
        values["storm: events"] = (after.events - before.events) / len(names)
        values["storm: agent CPU"] = (after.cpu - before.cpu) / took * 100
        values["storm: server CPU"] = (self.server.cpu() - cpu) / took * 100
        values["storm: operator CPU"] = (cpu_seconds(operator.pid) - used) / took * 100
        pods = f"{len(names):,} pods, {len(names) / took:.0f}/s"
        self.found.notes["storm: median"] = f"{pods}, on {len(self.watchers)} other nodes"
        self.say(f"events of one node: {(await self.watchers[0].tell())['kinds']}")
        self.say(f"{pods}: known elsewhere after {values['storm: median']:.0f} ms, p99 {values['storm: p99']:.0f} ms")

    async def _namespace_label(self, fleet: Fleet) -> None:
        """A label of a namespace changes the identity of all its pods, on many nodes at once."""
        moved = [(a, key) for a in fleet.agents for key in a.pods if key[0] == "ns0"]
        if not moved:
            raise BenchError("no pod in ns0")
        before, began = await self._totals(), time.monotonic()
        labels = {"team": "blue"}
        await asyncio.gather(*(agent.relabel(*key, labels) for agent, key in moved))
        numbers = {a.tables.endpoint_identities[a.pods[key]].number for a, key in moved}
        wanted = {f"{key[1]} {number}" for _, key in moved for number in numbers}
        seen = await self._known(wanted.__contains__, len(moved))
        values = self.found.values
        values["relabel: seconds"] = max(at for one in seen for key, at in one.items() if key in wanted) - began
        values["relabel: bytes"] = ((await self._totals()).watched - before.watched) / len(moved)
        self.found.notes["relabel: seconds"] = f"{len(moved)} pods, {len(numbers)} new identity"
        if len(numbers) != 1:
            raise BenchError(f"a label set got {len(numbers)} identities")

    async def _removal(self, fleet: Fleet) -> None:
        before, began = await self._totals(), time.monotonic()
        await fleet.gone()
        while [(await w.tell())["pods"] for w in self.watchers] != [self.size.pods] * len(self.watchers):
            if time.monotonic() - began > PATIENCE:
                raise BenchError("removed pods are still known")
            await asyncio.sleep(0.1)
        self.found.values["removal: seconds"] = time.monotonic() - began
        self.found.values["removal: bytes"] = ((await self._totals()).watched - before.watched) / self.size.burst

    async def _deployment(self, fleet: Fleet) -> None:
        """As many pods in one namespace, as fast as the server takes them."""
        names = [f"{MARK}d{n:05}" for n in range(self.size.burst)]
        before = await self._totals()
        created = await fleet.storm(names, 10_000.0, {"app": "app7", "tier": "odd"}, namespaces=1)
        await self._known(lambda key: key.split()[0] in created, len(names))
        self.found.values["deployment: bytes"] = ((await self._totals()).watched - before.watched) / len(names)
        await fleet.gone()

    async def _node_churn(self, client: ApiClient) -> None:
        """Nodes join, and leave."""
        before = await self._totals()
        names = [f"new{n}" for n in range(20)]
        for number, name in enumerate(names):
            addresses = [{"type": "InternalIP", "ip": f"172.30.0.{number + 1}"}]
            spec = {"addresses": addresses, "ipam": {"podCIDRs": [f"10.126.{number}.0/24"]}}
            await client.create(resources.NODES, {"metadata": {"name": name}})
            await client.create(resources.CILIUM_NODES, {"metadata": {"name": name}, "spec": spec})
        for name in names:
            await client.delete(resources.CILIUM_NODES, name)
            await client.delete(resources.NODES, name)
        await asyncio.sleep(1.0)
        self.found.values["node: bytes"] = ((await self._totals()).watched - before.watched) / len(names)

    async def _identities(self, fleet: Fleet, client: ApiClient) -> None:
        """Every agent asks for the same new label sets in one instant."""
        sets = [Labels(DEFAULT_FILTER.apply(pod_labels("ns1", {"app": f"{MARK}{n}"}, {}))) for n in range(3)]
        before, began = await self.server.requests(), time.monotonic()
        told = await fleet.ask_at_once(sets)
        took = time.monotonic() - began
        asked = _less(await self.server.requests(), before)
        made = [i for i in (await client.list(resources.CILIUM_IDENTITIES)).items
                if Labels(i.security_labels or {}) in sets]  # fmt: skip
        if len(told) != len(sets) or len(made) != len(sets):
            raise BenchError(f"{len(sets)} label sets: {len(told)} answers, {len(made)} identities")
        self.found.values["identities: seconds"] = took
        self.found.values["identities: requests"] = sum(asked.values()) / len(sets) / len(fleet.agents)
        self.found.notes["identities: seconds"] = f"{len(sets)} label sets, {len(fleet.agents):,} agents: " \
                                                  f"{len(made)} identities"  # fmt: skip
        self.say(f"identities of {len(sets)} label sets for {len(fleet.agents):,} agents at once in {took:.1f} s")

    async def _known(self, counts: Callable[[str], bool], wanted: int) -> list[Mapping[str, float]]:
        """When each watcher knew what `counts`; once all know `wanted` of that."""
        began = time.monotonic()
        while True:
            told = [{k: at for k, at in (await w.tell())["seen"].items() if counts(k)} for w in self.watchers]
            if all(len(one) >= wanted for one in told):
                return told
            if time.monotonic() - began > PATIENCE:
                raise BenchError(f"after {PATIENCE:.0f} s nodes know {[len(one) for one in told]} of {wanted}")
            await asyncio.sleep(0.2)

    async def _totals(self) -> _Totals:
        told = [await w.tell() for w in self.watchers]
        return _Totals(
            await self.server.requests(), _middle(t["watched"] for t in told), _middle(t["events"] for t in told),
            _middle(t["cpu"] for t in told),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Totals:
    """So far: requests that the server answered; what one watcher received and needed."""

    requests: Mapping[tuple[str, str], float]
    watched: float
    events: float
    cpu: float


@dataclass(slots=True)
class _Operator:
    """The real one, as a process."""

    pid: int
    log: Path
    process: asyncio.subprocess.Process

    def alive(self) -> bool:
        return self.process.returncode is None

    def tail(self) -> str:
        return components.tail(self.log)


@asynccontextmanager
async def _operator(server: BigServer, *, slices: bool) -> AsyncIterator[_Operator]:
    log = server.kubeconfig.parent / "operator.log"
    argv = [sys.executable, "-m", "fimbria.operator", "--kubeconfig", str(server.kubeconfig), "--no-leader-elect"]
    argv += ["--ipv4-pool", "10.64.0.0/10", "--ipv4-mask", "24"]
    argv += ["--endpoint-slices" if slices else "--no-endpoint-slices"]
    argv += ["--no-remove-taints", "--no-set-taints", "--no-set-network-status"]
    env = {**components.ENVIRONMENT, "PYTHONPATH": str(ROOT / "src")}
    die = bigserver.realserver().die_with_parent
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(*argv, stdout=output, stderr=output, env=env, preexec_fn=die)
    try:
        yield _Operator(process.pid, log, process)
        if process.returncode is not None:
            raise BenchError(f"the operator ended: {components.tail(log)}")
    finally:
        await _end(process)


@asynccontextmanager
async def _watcher(server: BigServer, node: str) -> AsyncIterator[Watcher]:
    argv = [sys.executable, "-m", "tests.bench.scale_watcher", str(server.kubeconfig), node]
    env = {**components.ENVIRONMENT, "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"}
    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env=env,
        limit=1 << 26,
        preexec_fn=bigserver.realserver().die_with_parent,
    )
    try:
        watcher = Watcher(process)
        watcher.first = await watcher.read()
        yield watcher
    finally:
        await _end(process)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()


def _middle(values: Any) -> float:
    return percentile(list(values), 0.5)


def _less(after: Mapping[Any, float], before: Mapping[Any, float]) -> dict[Any, float]:
    return {key: value - before.get(key, 0.0) for key, value in after.items() if value != before.get(key, 0.0)}


def _writes(asked: Mapping[tuple[str, str], float]) -> float:
    return sum(n for (verb, _), n in asked.items() if verb in WRITES)


def _figures(size: Size, pods: Outcome, slices: Outcome) -> list[Figure]:
    def one(key: str, name: str, unit: str, goal: Goal | None = None, factor: float = 1.0, note: str = "") -> Figure:
        words = "; ".join(filter(None, (note, slices.notes.get(key, ""))))
        return figure(f"{name} ({size})", unit, [slices.values[key] * factor], note=words,
                      baseline=[pods.values[key] * factor], against="no slices", goal=goal)  # fmt: skip

    thousands = f"measured with {WATCHERS} nodes, multiplied by {FULL:,}: each is sent the same"
    batched = figure(f"the operator has put all endpoints into slices ({size})", "s", [slices.values["batched in"]],
                     note=slices.notes["batched in"])  # fmt: skip
    return [
        one("start: bytes", "a node starts: bytes of lists", "MB", LESS),
        one("start: seconds", f"{WATCHERS} nodes start at once: until all know everything", "s"),
        one("start: server CPU", "a node starts: CPU of API server and etcd", "s", LESS),
        one("start: server CPU", f"{FULL:,} nodes start: CPU of API servers and etcd", "core-minutes", LESS,
            FULL / 60, thousands),
        one("start: agent CPU", "a node starts: CPU of the agent's API side", "s", LESS),
        one("start: agent PSS", "agent's API side: memory", "MiB", LESS),
        one("storm: median", "pod created until known at another node, median", "ms"),
        one("storm: p99", "pod created until known at another node, 99th percentile", "ms"),
        one("storm: requests", "pods are created: requests that the server answers", "/s"),
        one("storm: writes", "pods are created: writes among them", "/s"),
        one("storm: bytes", "bytes of watches a node receives for one new pod", "B", LESS),
        one("storm: bytes", f"bytes that {FULL:,} nodes receive for one new pod", "MB", LESS, FULL / 1e6, thousands),
        one("storm: events", "events a node receives for one new pod", "", LESS),
        one("deployment: bytes", "the same if all are of one namespace and made at once", "B", LESS),
        one("storm: agent CPU", f"agent's API side while {RATE:.0f} pods a second are created", "% of a core"),
        one("storm: server CPU", "API server and etcd meanwhile", "% of a core"),
        one("storm: operator CPU", "operator meanwhile", "% of a core"),
        one("relabel: seconds", "a namespace's label changes: until all identities are known elsewhere", "s"),
        one("removal: bytes", "bytes a node receives for one removed pod", "B"),
        one("node: bytes", "bytes a node receives for a node that joins and leaves", "B"),
        one("identities: seconds", "all agents ask for three new label sets at once", "s"),
        one("identities: requests", "requests of an agent for a label set that all ask for", ""),
        one("operator PSS", "operator: memory", "MiB"),
        batched,
    ]  # fmt: skip
