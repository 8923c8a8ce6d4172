"""Finding Fimbria in a cluster: its DaemonSet, its operator, and the pod of each node's agent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import click
import msgspec

from fimbria.sources.k8s.client import ApiClient
from fimbria.sources.k8s.config import ClusterConfig, ConfigError, load
from fimbria.sources.k8s.errors import ApiError, NotFound
from fimbria.sources.k8s.exec import Container
from fimbria.sources.k8s.resources import Resource
from fimbria.sources.k8s.types.meta import ApiObject, Obj

AGENTS: Final = "app.kubernetes.io/part-of=fimbria,app.kubernetes.io/name=fimbria-agent"
OPERATORS: Final = "app.kubernetes.io/part-of=fimbria,app.kubernetes.io/name=fimbria-operator"
Json = dict[str, Any]
T = TypeVar("T")


class CantAsk(click.ClickException):
    """The cluster can't be asked; exit status 2."""

    exit_code = 2


class ContainerState(Obj, frozen=True):
    """`state` and `last_state` are one of waiting, running, terminated, each with reason and message."""

    name: str = ""
    ready: bool = False
    restart_count: int = 0
    image: str = ""
    state: Json = msgspec.field(default_factory=dict)
    last_state: Json = msgspec.field(default_factory=dict)


class ContainerSpec(Obj, frozen=True):
    name: str = ""
    image: str = ""


class AgentSpec(Obj, frozen=True):
    node_name: str = ""
    containers: tuple[ContainerSpec, ...] = ()


class AgentStatus(Obj, frozen=True):
    phase: str = ""
    reason: str = ""
    message: str = ""
    conditions: tuple[Json, ...] | None = None
    container_statuses: tuple[ContainerState, ...] | None = None
    init_container_statuses: tuple[ContainerState, ...] | None = None


class AgentPod(ApiObject, frozen=True):
    """As much of a pod as thousands of them may take."""

    spec: AgentSpec = AgentSpec()
    status: AgentStatus = AgentStatus()

    @property
    def node(self) -> str:
        return self.spec.node_name

    @property
    def ready(self) -> bool:
        return any(c.get("type") == "Ready" and c.get("status") == "True" for c in self.status.conditions or ())

    @property
    def restarts(self) -> int:
        return sum(c.restart_count for c in self.status.container_statuses or ())

    @property
    def image(self) -> str:
        return self.spec.containers[0].image if self.spec.containers else ""

    @property
    def containers(self) -> tuple[str, ...]:
        return tuple(c.name for c in self.spec.containers)

    def container(self, name: str = "") -> Container:
        """The one of that name, or else the agent's."""
        chosen = name or next((n for n in self.containers if n == "agent"), next(iter(self.containers), ""))
        return Container(self.metadata.namespace, self.metadata.name, chosen)

    def running(self, name: str) -> bool:
        """Whether a container runs, so that a command can be run in it."""
        return any(c.name == name and "running" in c.state for c in self.status.container_statuses or ())


class Workload(ApiObject, frozen=True):
    """A DaemonSet or Deployment, as it is."""

    spec: Json = msgspec.field(default_factory=dict)
    status: Json = msgspec.field(default_factory=dict)

    @property
    def image(self) -> str:
        """Of its first container."""
        containers: list[Json] = self.spec.get("template", {}).get("spec", {}).get("containers") or [{}]
        return str(containers[0].get("image", ""))

    @property
    def version(self) -> str:
        """By its label, else by its image's tag."""
        label = (self.metadata.labels or {}).get("app.kubernetes.io/version", "")
        return label or self.image.partition("@")[0].rpartition("/")[2].partition(":")[2]


class NodeRow(ApiObject, frozen=True):
    """A Node: its taints and conditions."""

    spec: Json = msgspec.field(default_factory=dict)
    status: Json = msgspec.field(default_factory=dict)


DAEMON_SETS: Final = Resource("apps", "v1", "daemonsets", "DaemonSet", Workload)
DEPLOYMENTS: Final = Resource("apps", "v1", "deployments", "Deployment", Workload)
PODS: Final = Resource("", "v1", "pods", "Pod", AgentPod)
NODES: Final = Resource("", "v1", "nodes", "Node", NodeRow, namespaced=False)


@dataclass(frozen=True, slots=True)
class Installation:
    """What there is of Fimbria. `agents` by node; `operators` are the pods of the Deployment."""

    namespace: str
    agent: Workload
    operator: Workload | None
    agents: Mapping[str, AgentPod] = field(default_factory=dict)
    operators: Sequence[AgentPod] = ()


class NotInstalled(CantAsk):
    """The cluster has no DaemonSet of ours."""


async def find(client: ApiClient, node: str = "") -> Installation:
    """Where Fimbria runs; the agents of all nodes or of one. Raises NotInstalled, ApiError."""
    agent = await _workload(client, DAEMON_SETS, AGENTS)
    if agent is None:
        raise NotInstalled(
            f"Fimbria isn't installed in the cluster at {client.config.server}: it has no DaemonSet labelled {AGENTS}."
        )
    namespace = agent.metadata.namespace
    one = f"spec.nodeName={node}" if node else ""
    pods = (await client.list(PODS, namespace, labels=AGENTS, fields=one)).items
    operator = await _workload(client, DEPLOYMENTS, OPERATORS, namespace)
    operators = () if node else (await client.list(PODS, namespace, labels=OPERATORS)).items
    return Installation(namespace, agent, operator, by_node(pods), operators)


async def _workload(
    client: ApiClient, resource: Resource[Workload], labels: str, namespace: str = ""
) -> Workload | None:
    found = (await client.list(resource, namespace, labels=labels)).items
    return found[0] if found else None


def by_node(pods: Sequence[AgentPod]) -> dict[str, AgentPod]:
    """The agent's pod of each node: during an update a node may have an old one that ends and a new one."""
    chosen: dict[str, AgentPod] = {}
    for pod in sorted(pods, key=lambda p: (p.metadata.deletion_timestamp is None, p.ready)):
        if pod.node:
            chosen[pod.node] = pod
    return chosen


async def agent_of(client: ApiClient, node: str) -> AgentPod:
    """The agent's pod of a node. Raises CantAsk saying what there is instead."""
    pods = (await find(client, node)).agents
    if node in pods:
        return pods[node]
    try:
        await client.get(NODES, node)
    except NotFound:
        raise CantAsk(f"There is no node {node!r}. `kubectl get nodes` lists them.") from None
    raise CantAsk(f"No agent runs on node {node}. `fimbria status --cluster` says more.")


async def is_lab(client: ApiClient) -> bool:
    """Whether the nodes are those of a lab on one machine, where agents are no pods. Raises ApiError."""
    nodes = (await client.list(NODES)).items
    return any((n.status.get("nodeInfo") or {}).get("kubeletVersion") == "fimbria-lab" for n in nodes)


def pod_trouble(pod: AgentPod) -> str:
    """Why a pod isn't Ready, one clause; empty if it is."""
    if pod.ready:
        return ""
    for c in (*(pod.status.init_container_statuses or ()), *(pod.status.container_statuses or ())):
        trouble = _container_trouble(c)
        if trouble:
            return f"container {c.name}: {trouble}"
    for condition in pod.status.conditions or ():
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return f"it can't be scheduled: {condition.get('message', '')}"
    unready = [c.name for c in pod.status.container_statuses or () if not c.ready]
    words = ": ".join(w for w in (pod.status.reason, pod.status.message) if w)
    return words or (f"container {', '.join(unready)} isn't ready yet" if unready else f"it is {pod.status.phase}")


def _container_trouble(c: ContainerState) -> str:
    waiting, ended = c.state.get("waiting"), c.state.get("terminated") or {}
    last = c.last_state.get("terminated") or {}
    if ended.get("exitCode") or (waiting and waiting.get("reason") == "CrashLoopBackOff"):
        code = ended.get("exitCode", last.get("exitCode", "?"))
        words = " ".join(str(ended.get("message") or last.get("message") or "").split())
        often = f", {c.restart_count} times so far" if c.restart_count else ""
        return f"it keeps ending, with exit code {code}{often}" + (f": {words[-300:]}" if words else "")
    if not waiting:
        return ""
    return ": ".join(str(waiting[k]) for k in ("reason", "message") if waiting.get(k)) or "it waits"


# --- options and errors of the commands -------------------------------------------------------------------------------


def configuration(kubeconfig: str | None, context: str) -> ClusterConfig:
    """Raises CantAsk."""
    try:
        return load(kubeconfig, context=context)
    except ConfigError as error:
        raise CantAsk(f"{str(error)[:1].upper()}{str(error)[1:]}.") from None


def run(work: Coroutine[Any, Any, T]) -> T:
    """Runs it with API errors as one sentence. Raises CantAsk."""
    try:
        return asyncio.run(work)
    except ApiError as error:
        raise CantAsk(str(error)) from None


def kubeconfig_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--kubeconfig` and `--context`."""
    command = click.option("--context", default="", metavar="NAME", help="One of the kubeconfig's contexts.")(command)
    return click.option(
        "--kubeconfig", type=click.Path(dir_okay=False), help="The cluster.  [default: as kubectl finds it]"
    )(command)
