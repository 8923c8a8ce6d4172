"""`fimbria status` of a whole cluster: are all agents and the operator ready, and if not, why?"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import click
import msgspec

from fimbria.cli import cluster
from fimbria.cli.cluster import AgentPod, Installation, NodeRow, Workload
from fimbria.cli.show import bad, count, dim, fields, good, table, warn
from fimbria.sources.k8s.client import ApiClient
from fimbria.sources.k8s.config import ClusterConfig
from fimbria.sources.k8s.errors import ApiError
from fimbria.sources.k8s.exec import ExecError, Limited, PodAccess
from fimbria.sources.k8s.resources import LEASES

POLL: Final = 1.0
MOST_ASKED: Final = 20  # agents that aren't ready and are asked why, at a time
MOST_SHOWN: Final = 20
PATIENCE: Final = 10.0
LEASE: Final = "fimbria-operator"
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class View:
    """A cluster at a time. `said` is what agents that aren't ready answered, by node."""

    server: str
    installation: Installation
    nodes: Sequence[NodeRow]
    leader: str = ""
    said: Mapping[str, list[str]] = field(default_factory=dict)


async def look(client: ApiClient, pods: PodAccess | None = None) -> View:
    """Reads it; agents that run but aren't ready are asked why, if `pods` says how. Raises NotInstalled, ApiError."""
    found, nodes = await asyncio.gather(cluster.find(client), client.list(cluster.NODES))
    unready = [p for p in found.agents.values() if not p.ready]
    asked = await asyncio.gather(*(_ask(pods, p) for p in unready[:MOST_ASKED])) if pods is not None else ()
    said = {node: words for node, words in asked if words}
    return View(client.config.server, found, nodes.items, await _leader(client, found.namespace), said)


async def _ask(pods: PodAccess, pod: AgentPod) -> tuple[str, list[str]]:
    """What an agent says keeps it from being ready; of one that doesn't run, its last words."""
    try:
        if not pod.running(pod.container().name):
            said = Limited(1 << 16, cut=True)
            await pods.logs(pod.container(), said.write, tail_lines=1)
            _, _, words = said.data.decode(errors="replace").strip().partition(" ")
            return pod.node, [f"{cluster.pod_trouble(pod)}; its last words: {words[:300]}"] if words else []
        done = await pods.capture(pod.container(), ["fimbria", "status", "-o", "json"], patience=PATIENCE)
        return pod.node, [str(p) for p in json.loads(done.stdout)["problems"]]
    except (ApiError, ExecError, ValueError, KeyError, TypeError):
        return pod.node, []


async def _leader(client: ApiClient, namespace: str) -> str:
    try:
        lease = await client.get(LEASES, LEASE, namespace)
    except ApiError:
        return ""
    return msgspec.to_builtins(lease.spec).get("holderIdentity") or ""


def problems(v: View) -> list[str]:
    """What keeps a cluster from being well, one sentence each, worst first."""
    return [*_agents(v), *_nodes(v), *_operator(v), *_rollout(v)]


def _agents(v: View) -> list[str]:
    found = []
    desired = int(v.installation.agent.status.get("desiredNumberScheduled") or 0)
    if not desired:
        found.append("no node is to have an agent: the DaemonSet selects none, or hasn't been looked at yet")
    for node, pod in sorted(v.installation.agents.items()):
        if not pod.ready:
            why = "; ".join(v.said.get(node, ())) or cluster.pod_trouble(pod)
            found.append(f"node {node}: the agent isn't ready: {why}")
    missing = desired - len(v.installation.agents)
    if missing > 0:
        found.append(f"{count(missing, 'node')} of {desired} {'has' if missing == 1 else 'have'} no agent yet")
    return found


def _nodes(v: View) -> list[str]:
    found = []
    for node in sorted(v.nodes, key=lambda n: n.metadata.name):
        name = node.metadata.name
        for c in node.status.get("conditions") or ():
            if c.get("type") == "Ready" and c.get("status") != "True":
                found.append(f"node {name} isn't Ready: {c.get('message') or c.get('reason') or c.get('status')}")
            if c.get("type") == "NetworkUnavailable" and c.get("status") == "True":
                found.append(f"node {name}: its network is unavailable: {c.get('message') or c.get('reason')}")
        for taint in node.spec.get("taints") or ():
            if str(taint.get("key", "")).endswith("/agent-not-ready"):
                found.append(f"node {name} takes no pods: it still has the taint {taint['key']}")
    return found


def _operator(v: View) -> list[str]:
    operator = v.installation.operator
    if operator is None:
        return ["there is no operator: nodes get no pod addresses"]
    replicas = int(operator.spec.get("replicas", 1))
    ready = int(operator.status.get("readyReplicas") or 0)
    if ready >= min(replicas, 1) and replicas:
        return []
    why = next((t for t in map(cluster.pod_trouble, v.installation.operators) if t), "it has no pods yet")
    return [f"no operator is ready, nodes get no pod addresses: {why}"]


def _rollout(v: View) -> list[str]:
    """Agents of another image than the DaemonSet's now."""
    image = v.installation.agent.image
    old = [n for n, p in v.installation.agents.items() if image and all(c.image != image for c in p.spec.containers)]
    if not old:
        return []
    return [f"{count(len(old), 'agent')} still {'runs' if len(old) == 1 else 'run'} another image ({_some(old)})"]


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")


def as_json(v: View) -> Json:
    """For programs."""
    agent, operator = v.installation.agent, v.installation.operator
    return {
        "server": v.server,
        "namespace": v.installation.namespace,
        "ready": not problems(v),
        "problems": problems(v),
        "agents": {
            "desired": int(agent.status.get("desiredNumberScheduled") or 0),
            "ready": sum(p.ready for p in v.installation.agents.values()),
            "updated": int(agent.status.get("updatedNumberScheduled") or 0),
            "version": agent.version,
            "image": agent.image,
        },
        "operator": {
            "desired": int(operator.spec.get("replicas", 1)) if operator else 0,
            "ready": int(operator.status.get("readyReplicas") or 0) if operator else 0,
            "leader": v.leader,
            "image": operator.image if operator else "",
        },
        "nodes": [
            {"name": n, "ready": p.ready, "pod": p.metadata.name, "restarts": p.restarts, "image": p.image}
            for n, p in sorted(v.installation.agents.items())
        ],
    }  # fmt: skip


def show(v: View, verbose: bool) -> None:
    """For people."""
    found = problems(v)
    helm = helm_release(v.installation.agent)
    fields(
        [
            ("Cluster", f"{v.server}  {dim(count(len(v.nodes), 'node'))}"),
            ("Fimbria", f"{good('ready') if not found else bad('not well')}  {dim(helm)}".rstrip()),
            ("Agents", _agents_line(v)),
            ("Operator", _operator_line(v)),
            ("Images", ", ".join(f"{i} ({n})" for i, n in _images(v).most_common())),
            ("Problems", "\n".join(bad(p) for p in found[:MOST_SHOWN])),
            ("", dim(f"and {len(found) - MOST_SHOWN} more") if len(found) > MOST_SHOWN else ""),
        ]
    )
    if verbose:
        click.echo()
        rows = [
            [n, good("ready") if p.ready else bad("not ready"), p.metadata.name, str(p.restarts), p.image]
            for n, p in sorted(v.installation.agents.items())
        ]
        table(["NODE", "AGENT", "POD", "RESTARTS", "IMAGE"], rows)


def _agents_line(v: View) -> str:
    status_ = v.installation.agent.status
    desired = int(status_.get("desiredNumberScheduled") or 0)
    ready = sum(p.ready for p in v.installation.agents.values())
    shown = (good if ready == desired and desired else bad)(f"{ready} of {desired} ready")
    where = f"DaemonSet {v.installation.namespace}/{v.installation.agent.metadata.name}"
    return f"{shown}  {dim(where)}"


def _operator_line(v: View) -> str:
    operator = v.installation.operator
    if operator is None:
        return bad("none")
    ready, replicas = int(operator.status.get("readyReplicas") or 0), int(operator.spec.get("replicas", 1))
    shown = good if ready == replicas else warn if ready else bad
    leader = f"  {dim('leader ' + v.leader)}" if v.leader else ""
    return shown(f"{ready} of {replicas} ready") + leader


def _images(v: View) -> Counter[str]:
    return Counter(p.image for p in v.installation.agents.values())


def helm_release(workload: Workload) -> str:
    """`release NAME, chart NAME-VERSION`, as Helm labels what it makes; empty without Helm."""
    labels = workload.metadata.labels or {}
    name = (workload.metadata.annotations or {}).get("meta.helm.sh/release-name", "")
    chart = labels.get("helm.sh/chart", "")
    return ", ".join(w for w in (f"release {name}" if name else "", f"chart {chart}" if chart else "") if w)


async def watch(config: ClusterConfig, patience: float | None) -> View:
    """The cluster now; with `patience` (seconds) the first view without problems, or the last one in time."""
    deadline = time.monotonic() + (patience or 0.0)
    said = ""
    async with ApiClient(config, component="status") as client, PodAccess(config, component="status") as pods:
        while True:
            late = time.monotonic() >= deadline
            try:
                view = await look(client, pods)
                found = problems(view)
                if late or not found:
                    return view
                missing = found[0] + (f" (and {len(found) - 1} more)" if len(found) > 1 else "")
            except (ApiError, cluster.NotInstalled) as error:
                if late:
                    raise
                missing = str(error)
            if missing != said:
                click.echo(f"waiting: {missing}", err=True)
                said = missing
            await asyncio.sleep(POLL)
