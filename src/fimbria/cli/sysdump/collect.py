"""A whole cluster: objects of the API, and every chosen node by a command in its agent's container.

Everything goes to disk as it comes. What fails is noted and the rest goes on; only a full archive and Ctrl-C end it.
"""

from __future__ import annotations

import asyncio
import json
import tarfile
import tempfile
import time
import zlib
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final, Protocol

from fimbria.cli import cluster, cluster_status
from fimbria.cli.cluster import AgentPod, CantAsk, Installation
from fimbria.cli.sysdump import objects, redact
from fimbria.cli.sysdump.archive import Full, Package, bounded, safe, unpack
from fimbria.cli.sysdump.findings import Facts, NodeFacts, page
from fimbria.cli.sysdump.local import LAST, QUICK
from fimbria.cli.sysdump.objects import CRDS, KINDS, Kind
from fimbria.sources.k8s.client import ApiClient
from fimbria.sources.k8s.errors import ApiError
from fimbria.sources.k8s.exec import Container, ExecError, Limited, PodAccess, TooMuch

MOST_NODE: Final = 128 << 20  # bytes that a node may send, compressed
MOST_LOG: Final = 32 << 20
LOG_LINES: Final = 20_000
PARALLEL: Final = 10
REFUSED: Final = 2  # exit status of a command line that is not understood
Json = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Options:
    """What the user chose. `since` and `node_seconds` in seconds; `most_objects` of a kind."""

    detail: str
    nodes: tuple[str, ...] = ()
    most_nodes: int = 50
    most_objects: int = 5000
    since: int | None = None
    node_seconds: float = 60.0
    folder: Path = field(default_factory=Path)


class Reach(Protocol):
    """How a node is asked: by exec, or in a lab directly."""

    async def dump(self, node: str, arguments: Sequence[str], sink: IO[bytes]) -> str:
        """Runs `fimbria sysdump ARGUMENTS` there; what went wrong, or "". Raises ApiError, ExecError, OSError."""
        ...

    async def logs(self, node: str, add: Callable[[str, IO[bytes]], Awaitable[None]]) -> dict[str, str]:
        """Hands over each log by its name; why others can't be had."""
        ...


class ByExec:
    """Agents as pods."""

    def __init__(self, pods: PodAccess, agents: dict[str, AgentPod], options: Options) -> None:
        self._pods = pods
        self._agents = agents
        self._options = options

    async def dump(self, node: str, arguments: Sequence[str], sink: IO[bytes]) -> str:
        """In the agent's container, or, while that doesn't run, in the observer's: the sockets are in both."""
        pod = self._agents.get(node)
        if pod is None:
            return "no agent runs there"
        names = [n for n in ("agent", "observer", *pod.containers) if n in pod.containers and pod.running(n)]
        if not names:
            return f"the agent doesn't run: {cluster.pod_trouble(pod)}"
        errors = Limited(1 << 16, cut=True)
        command = ["fimbria", "sysdump", *arguments]
        code = await self._pods.run(pod.container(names[0]), command, sink.write, errors.write)
        return _said(code, errors.data.decode(errors="replace"))

    async def logs(self, node: str, add: Callable[[str, IO[bytes]], Awaitable[None]]) -> dict[str, str]:
        """Of all containers, and of those that were restarted also what they said before."""
        pod = self._agents.get(node)
        if pod is None:
            return {}
        return await pod_logs(self._pods, pod, self._options, add)


def _said(code: int, errors: str) -> str:
    lines = errors.strip().splitlines()
    if code == REFUSED and any("sysdump" in line or "No such option" in line for line in lines):
        return "the agent there is of a version without this command"
    return "" if code == 0 else (lines[-1] if lines else f"exit status {code}")


async def pod_logs(
    pods: PodAccess, pod: AgentPod, options: Options, add: Callable[[str, IO[bytes]], Awaitable[None]]
) -> dict[str, str]:
    """Hands over a pod's logs. Returns why some can't be had, by name."""
    missing: dict[str, str] = {}
    states = {c.name: c for c in (*(pod.status.init_container_statuses or ()), *(pod.status.container_statuses or ()))}
    for name in states or pod.containers:
        state = states.get(name)
        restarted = bool(state and (state.restart_count or "terminated" in state.last_state))
        for previous in (False, True) if restarted and options.detail != QUICK else (False,):
            file = f"{safe(name)}{'.previous' if previous else ''}.log"
            with tempfile.TemporaryFile(dir=options.folder) as raw:
                limit = Sized(raw, MOST_LOG)
                where = Container(pod.metadata.namespace, pod.metadata.name, name)
                since = None if previous else options.since
                try:
                    await pods.logs(where, limit.write, previous=previous, since_seconds=since, tail_lines=LOG_LINES)
                except TooMuch:
                    missing[f"{file} (part)"] = f"cut after {MOST_LOG >> 20} MiB"
                except ApiError as error:
                    missing[file] = str(error)
                    continue
                await add(file, raw)
    return missing


class Sized:
    """Writes to a file up to `most` bytes; then raises TooMuch."""

    def __init__(self, file: IO[bytes], most: int) -> None:
        self._file = file
        self._left = most

    def write(self, piece: bytes) -> int:
        """Raises TooMuch."""
        if len(piece) > self._left:
            raise TooMuch
        self._left -= len(piece)
        return self._file.write(piece)


class Collector:
    """One run. `reach` None: nodes are asked by exec."""

    def __init__(
        self,
        package: Package,
        client: ApiClient,
        pods: PodAccess | None,
        *,
        options: Options,
        facts: Facts,
        say: Say,
        reach: Reach | None = None,
    ) -> None:
        self._package = package
        self._client = client
        self._pods = pods
        self._o = options
        self._facts = facts
        self._say = say
        self._reach = reach
        self._done = 0

    async def run(self) -> None:
        """Everything, and README.md at the end. Raises ApiError if not even the nodes can be listed."""
        await self._everything()
        errors = self._facts.missing | {
            f"nodes/{n.name}/{name}": why for n in self._facts.nodes.values() for name, why in n.errors.items()
        }
        self._package.allow_more(16 << 20)
        self._package.json("errors.json", errors)
        self._package.text("README.md", page(self._facts, self._package.names))

    async def _everything(self) -> None:
        installation = await self._installation()
        agents = dict(installation.agents) if installation else {}
        nodes = [n.metadata.name for n in (await self._client.list(cluster.NODES)).items]
        chosen = self._choose(nodes, agents)
        reach = self._reach or ByExec(self._access(), agents, self._o)
        self._say(f"collecting from {len(chosen)} of {len(nodes)} nodes")
        slots = asyncio.Semaphore(PARALLEL)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._kubernetes(installation))
            for node in chosen:
                facts = self._facts.nodes.setdefault(node, NodeFacts(node))
                if node in agents:
                    facts.pod, facts.restarts = cluster.pod_trouble(agents[node]), agents[node].restarts
                group.create_task(self._node(reach, facts, slots, len(chosen)))

    def _access(self) -> PodAccess:
        assert self._pods is not None
        return self._pods

    async def _installation(self) -> Installation | None:
        if self._reach is not None:
            return None
        try:
            view = await cluster_status.look(self._client)
        except (CantAsk, ApiError) as error:
            self._facts.missing["Fimbria's own pods"] = str(error)
            return None
        agent = view.installation.agent
        ready = sum(p.ready for p in view.installation.agents.values())
        desired = agent.status.get("desiredNumberScheduled", 0)
        self._facts.desired = f"{ready} of {desired} ready, image {agent.image}"
        self._facts.helm = cluster_status.helm_release(agent)
        # What is said of agents' pods is in the table of nodes already.
        self._facts.kubernetes = [p for p in cluster_status.problems(view) if ": the agent isn't ready" not in p]
        return view.installation

    def _choose(self, nodes: list[str], agents: dict[str, AgentPod]) -> list[str]:
        unknown = sorted(set(self._o.nodes) - set(nodes))
        if unknown:
            raise CantAsk(f"There is no node {unknown[0]!r}. `kubectl get nodes` lists them.")
        if self._o.nodes:
            return list(self._o.nodes)
        # Those that are unwell first: if not all can be taken, they are the ones to look at.
        order = sorted(nodes, key=lambda n: (n in agents and agents[n].ready and not agents[n].restarts, n))
        chosen = order[: self._o.most_nodes]
        self._facts.left_out = len(order) - len(chosen)
        if self._facts.left_out:
            self._say(
                f"{len(nodes)} nodes: {self._facts.left_out} are left out, those that look unwell are not; "
                "--max-nodes takes more, --nodes others"
            )
        return chosen

    # --- nodes -------------------------------------------------------------------------------------------------

    async def _node(self, reach: Reach, facts: NodeFacts, slots: asyncio.Semaphore, of: int) -> None:
        async with slots:
            prefix = f"nodes/{safe(facts.name)}"
            await self._guard(facts.errors, "logs", self._logs(reach, facts, prefix))
            await self._guard(facts.errors, "the agent", self._ask(reach, facts, prefix))
        self._done += 1
        self._say(f"{self._done} of {of} nodes, {self._package.size >> 20} MiB: {facts.name}")

    async def _guard(self, notes: dict[str, str], name: str, work: Awaitable[None]) -> None:
        try:
            async with asyncio.timeout(self._o.node_seconds):
                await work
        except TimeoutError:
            notes[name] = f"took longer than {self._o.node_seconds:.0f} s"
        except TooMuch:
            notes[name] = "sent more than it may"
        except (ApiError, ExecError, Full, OSError, EOFError, ValueError, tarfile.TarError, zlib.error) as error:
            notes[name] = str(error) or type(error).__name__

    async def _ask(self, reach: Reach, facts: NodeFacts, prefix: str) -> None:
        """What a node sent before it broke off is kept."""
        arguments = ["--local", "--output", "-", "--detail", self._o.detail]
        arguments += ["--seconds", f"{self._o.node_seconds * 0.75:.0f}"]
        with tempfile.TemporaryFile(dir=self._o.folder) as file:
            try:
                wrong = await reach.dump(facts.name, arguments, Sized(file, MOST_NODE))  # type: ignore[arg-type]
            except BaseException:
                # Whatever ended it (its time, usually) stays the reason, also if what came until then can't be read.
                with suppress(Exception):
                    await asyncio.shield(asyncio.to_thread(self._take_over, file, facts, prefix))
                raise
            if wrong:
                facts.errors["the agent"] = wrong
            if not wrong or file.tell():
                await asyncio.to_thread(self._take_over, file, facts, prefix)

    def _take_over(self, file: IO[bytes], facts: NodeFacts, prefix: str) -> None:
        name = ""
        file.seek(0)
        for name, data in unpack(file):
            if name.endswith(".json"):
                value = json.loads(data)
                facts.learn(name, value)
                if name != LAST:
                    self._package.json(f"{prefix}/{name}", value)
            else:
                self._package.lines(f"{prefix}/{name}", data.decode(errors="replace").splitlines(keepends=True))
        if name != LAST:
            raise EOFError(f"what the node sent broke off after {name or 'nothing'}")

    async def _logs(self, reach: Reach, facts: NodeFacts, prefix: str) -> None:
        async def add(name: str, raw: IO[bytes]) -> None:
            await asyncio.to_thread(self._log, f"{prefix}/logs/{name}", raw)

        facts.errors |= {f"logs/{n}": why for n, why in (await reach.logs(facts.name, add)).items()}

    def _log(self, name: str, raw: IO[bytes]) -> None:
        raw.seek(0)
        with tempfile.TemporaryFile(dir=self._o.folder) as clean:
            lines = (line.decode(errors="replace") for line in raw)
            clean.writelines(bounded(redact.lines(lines), MOST_LOG * 2))
            self._package.spooled(name, clean)

    # --- objects -----------------------------------------------------------------------------------------------

    async def _kubernetes(self, installation: Installation | None) -> None:
        if self._pods is not None:
            version = Limited(1 << 16, cut=True)
            await self._note("kubernetes/version.json", self._pods.fetch("version", "/version", version.write))
            await self._note("kubernetes/version.json", self._version(bytes(version.data)))
        namespace = installation.namespace if installation else ""
        for kind in KINDS:
            if kind.place != "own" or namespace:
                await self._note(kind.file, self._list(kind, namespace))
        definitions: list[Kind] = []
        await self._note(CRDS.file, self._list(CRDS, "", definitions))
        for kind in definitions:
            await self._note(kind.file, self._list(kind, ""))
        for pod in installation.operators if installation else ():
            await self._note(f"operator/{pod.metadata.name}", self._operator(pod))

    async def _version(self, data: bytes) -> None:
        found = json.loads(data)
        self._facts.server_version = str(found.get("gitVersion", ""))
        self._package.json("kubernetes/version.json", found)

    async def _operator(self, pod: AgentPod) -> None:
        async def add(name: str, raw: IO[bytes]) -> None:
            await asyncio.to_thread(self._log, f"operator/{safe(pod.metadata.name)}/{name}", raw)

        missing = await pod_logs(self._access(), pod, self._o, add)
        self._facts.missing |= {f"operator/{pod.metadata.name}/{n}": why for n, why in missing.items()}

    async def _note(self, name: str, work: Awaitable[None]) -> None:
        await self._guard(self._facts.missing, name, work)

    async def _list(self, kind: Kind, namespace: str, definitions: list[Kind] | None = None) -> None:
        """Page by page to disk. With `definitions`, the kinds that are defined are put there, and others left out."""
        count = 0
        labels = objects.OURS if kind.ours else ""
        place = namespace if kind.place == "own" else ""
        with tempfile.TemporaryFile(dir=self._o.folder) as file:
            file.write(objects.OPENING)
            token = ""
            while True:
                raw = await self._client.list_page(kind.resource, place, labels=labels, token=token)
                listed = json.loads(raw)
                for obj in listed.get("items") or ():
                    made = objects.custom(obj) if definitions is not None else None
                    if definitions is not None and made is None:
                        continue
                    if made is not None and definitions is not None:
                        definitions.append(made)
                    file.write((b",\n" if count else b"") + json.dumps(objects.cut(obj, kind)).encode())
                    count += 1
                token = (listed.get("metadata") or {}).get("continue", "")
                if token and count >= self._o.most_objects:
                    more = (listed.get("metadata") or {}).get("remainingItemCount")
                    self._facts.missing[f"{kind.file} (part)"] = (
                        f"cut after {count}, {more or 'some'} more were left out"
                    )
                    break
                if not token:
                    break
            file.write(objects.CLOSING)
            await asyncio.to_thread(self._package.spooled, kind.file, file)


def cluster_name(origin: str, server: str) -> str:
    """For the archive's name: the kubeconfig's context, or the server's host."""
    _, found, context = origin.rpartition(", context ")
    return safe(context if found else server.partition("://")[2].strip("[]").replace(":", "-"))[:60]


def stamp(now: float) -> str:
    """UTC, as in a file's name."""
    return time.strftime("%Y%m%d-%H%M%SZ", time.gmtime(now))
