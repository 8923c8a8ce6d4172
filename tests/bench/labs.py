"""Labs for the bench: the same as for tests, with pods that serve and pods that measure."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import aiohttp
from tests.bench import cluster_data
from tests.bench.cluster_data import Row
from tests.bench.measure import Place, server_command
from tests.lab.cards import far_ends

from fimbria.lab import access, cluster, state
from fimbria.lab.errors import LabError
from fimbria.lab.handle import Lab
from fimbria.lab.layout import LabSpec

PREFIX: Final = "bench"
CALM: Final = 0.5  # seconds


@dataclass(frozen=True, slots=True)
class BenchPod:
    """A pod to create: `labels` as YAML flow, on a fixed node, serving or only there to run clients. `command`: a shell
    command to run instead."""

    name: str
    node: str
    labels: str
    serves: bool
    command: str = ""

    def manifest(self) -> str:
        """YAML of one Pod."""
        script = self.command or (server_command() if self.serves else "exec labtool sleep")
        command = f"[sh, -c, {script!r}]"
        probe = ", readinessProbe: {tcpSocket: {port: 9000}}" if self.serves else ""
        return (
            f"apiVersion: v1\nkind: Pod\nmetadata: {{name: {self.name}, labels: {self.labels}}}\n"
            f"spec:\n  nodeName: {self.node}\n  terminationGracePeriodSeconds: 0\n"
            f"  containers: [{{name: main, image: fimbria/labtool, command: {command}{probe}}}]\n"
        )


@contextmanager
def bench_lab(say: Callable[[str], None], suffix: str, **settings: object) -> Iterator[Lab]:
    """A lab of our own, removed at the end. Raises LabError."""
    name = f"{PREFIX}{os.getpid()}-{suffix}"
    say(f"lab {name}")
    try:
        cluster.up(LabSpec(name=name, **settings))  # type: ignore[arg-type]
        yield Lab(name)
    finally:
        cluster.down(name)


def sweep() -> None:
    """Remove labs of runs that are dead."""
    for name in state.labs():
        owner = name.removeprefix(PREFIX).partition("-")[0]
        if name.startswith(PREFIX) and owner.isdigit() and not Path(f"/proc/{owner}").exists():
            cluster.down(name)


def start_pods(lab: Lab, pods: Sequence[BenchPod]) -> None:
    """Create pods and wait until all are ready. Raises LabError."""
    lab.apply("---\n".join(p.manifest() for p in pods))
    lab.wait_ready([p.name for p in pods], 60.0)


def place(lab: Lab, target: str) -> Place:
    """For commands inside a pod or a node. Raises LabError."""
    return Place(tuple(lab.argv(target)))


def settle(lab: Lab, patience: float = 60.0) -> None:
    """Until the lab's processes together use less than a tenth of a core for half a second, or patience ends: what
    they do after a change must not be measured with what follows."""
    deadline = time.monotonic() + patience
    before = _ticks(lab)
    while time.monotonic() < deadline:
        time.sleep(CALM)
        now = _ticks(lab)
        if (now - before) / os.sysconf("SC_CLK_TCK") < 0.1 * CALM:
            return
        before = now


def load(lab: Lab, rows: Iterable[Row]) -> float:
    """Put objects into the API server's database while it is down; returns the seconds that it needed to be up again.
    What would tidy them up because they exist nowhere is ended for good. Raises LabError."""
    for process in ("control/operator", "control/controllers", "control/apiserver"):
        known = state.recall(lab.paths, process)
        if known is not None and known.alive():
            lab.kill(process)
    cluster_data.load(lab.paths.database, rows)
    began = time.monotonic()
    lab.restart("control/apiserver")
    return time.monotonic() - began


def _ticks(lab: Lab) -> int:
    """CPU time of all processes of the lab's control plane and nodes, in clock ticks (proc(5), stat, fields 14, 15)."""
    total = 0
    for process in state.processes(lab.paths).values():
        with suppress(OSError):
            text = Path(f"/proc/{process.pid}/stat").read_text()
            fields = text[text.rindex(")") + 2 :].split()
            total += int(fields[11]) + int(fields[12])
    return total


@contextmanager
def like_wires(lab: Lab, cables: Sequence[tuple[str, str]], senders: Sequence[str]) -> Iterator[None]:
    """What XDP relies on and veth pairs don't do by themselves: the ends of `cables` (member, device) take frames that
    XDP sends from their peers, and `senders` fill in their checksums. Raises LabError."""
    for target in senders:
        done = lab.run(target, "ethtool", "-K", "eth0", "tx", "off")
        if done.returncode != 0:
            raise LabError(f"ethtool in {target}: {done.stderr.strip()}")
    with far_ends(lab, *cables):
        yield


def agent_metrics(lab: Lab, node: str) -> dict[str, float]:
    """What an agent counts, by the line's text before the value (Prometheus text format). Raises LabError."""
    body = asyncio.run(get(access.node_root(lab.paths, node) / "run/fimbria/agent.sock", "/v1/metrics")).decode()
    lines = (line.rpartition(" ") for line in body.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in lines}


def cni_socket(lab: Lab, node: str) -> Path:
    """Where a node's agent takes CNI requests, as seen from here. Raises LabError."""
    return access.node_root(lab.paths, node) / "run/fimbria/cni.sock"


async def get(socket: Path, path: str) -> bytes:
    """The body of an HTTP answer over a local socket. Raises OSError, aiohttp.ClientError."""
    async with (
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(socket))) as session,
        session.get(f"http://agent{path}") as response,
    ):
        return await response.read()
