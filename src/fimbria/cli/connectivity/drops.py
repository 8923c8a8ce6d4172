"""Why a connection failed: drops that the observers remember, matched with what was tried. Pure but `ask`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from fimbria.cli.cluster import AgentPod
from fimbria.cli.connectivity.scenario import Places, Probe
from fimbria.observe.flow import end, reason
from fimbria.sources.k8s.errors import ApiError
from fimbria.sources.k8s.exec import ExecError, PodAccess

Json = dict[str, Any]
REMEMBERED: Final = "4095"
PATIENCE: Final = 60.0
PARTS: Final = ("-with", "-without")


async def ask(pods: PodAccess, agents: Mapping[str, AgentPod], namespace: str) -> tuple[list[Json], dict[str, str]]:
    """Drops from or to pods of a namespace, oldest first, and why nodes that couldn't be asked could not."""
    command = ["fimbria", "monitor", "--no-follow", "--last", REMEMBERED, "--verdict", "dropped"]
    command += ["--namespace", namespace, "-o", "json"]
    failed: dict[str, str] = {}

    async def one(node: str, pod: AgentPod) -> list[Json]:
        try:
            done = await pods.capture(pod.container(), command, patience=PATIENCE)
        except (ApiError, ExecError) as error:
            failed[node] = str(error)
            return []
        if done.code:
            failed[node] = done.said
            return []
        return [json.loads(line) | {"asked": node} for line in done.stdout.splitlines()]

    answers = await asyncio.gather(*(one(node, pod) for node, pod in sorted(agents.items())))
    return sorted((f for flows in answers for f in flows), key=lambda f: str(f["time"])), failed


def hint(probe: Probe, places: Places, flows: Sequence[Json], asked: Iterable[str]) -> str:
    """The latest drop of a connection, with its reason and rule; or that there was none."""
    what = f"{probe.client} -> {probe.target} ({probe.proto.upper()} IPv{probe.family})"
    found = [f for f in flows if _belongs(f, probe, _ends(probe, places))]
    if not found:
        nodes = " and ".join(sorted(asked)) or "no node (no agent could be asked)"
        return f"{what}: no drop was seen on {nodes}: it was lost elsewhere, or nobody answers"
    last = found[-1]
    more = f", {len(found)} times" if len(found) > 1 else ""
    return (
        f"{what}: dropped on {last['asked']}{more}: {end(last, 'source')} -> {end(last, 'destination')}  {reason(last)}"
    )


def _ends(probe: Probe, places: Places) -> set[str]:
    """Addresses that the connection may have gone to: the one that was asked for, and those behind it."""
    found = {places.pods[name][probe.family] for name in probe.want if probe.family in places.pods.get(name, {})}
    return found | {probe.address}


def _belongs(flow: Json, probe: Probe, ends: set[str]) -> bool:
    """Whether it is this connection, in either direction; a policy's round is told by the client's name."""
    ip = flow.get("IP", {})
    for mine, other in (("source", "destination"), ("destination", "source")):
        name = str(flow.get(mine, {}).get("pod_name", ""))
        client = (probe.client == "host" and not name) or any(name == probe.client + part for part in PARTS)
        if client and ip.get(other) in ends:
            return True
    return False
