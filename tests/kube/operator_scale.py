"""What the operator needs for a large cluster, and how a second replica takes over: on a real API server whose etcd
holds the objects of NODES nodes and PODS pods.

    .venv/bin/python tests/kube/operator_scale.py --nodes 5000 --pods 100000
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final
from urllib.request import urlopen

ROOT: Final = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.bench import bigserver, cluster_data  # noqa: E402
from tests.bench.agent import cpu_seconds, pss  # noqa: E402
from tests.bench.bigserver import BigServer, big_server, realserver  # noqa: E402

from fimbria.sources.k8s import resources, rows  # noqa: E402
from fimbria.sources.k8s.client import ApiClient  # noqa: E402
from fimbria.sources.k8s.errors import ApiError, NotFound  # noqa: E402

PATIENCE: Final = 900.0


class Replica:
    """An operator process."""

    def __init__(self, server: BigServer, name: str, *options: str) -> None:
        self.port = realserver().free_port()
        log = server.kubeconfig.parent / f"{name}.log"
        argv = [sys.executable, "-m", "fimbria.operator", "--kubeconfig", str(server.kubeconfig), "--leader-elect"]
        argv += ["--namespace", "default", "--ipv4-pool", "10.64.0.0/10", "--ipv4-mask", "24"]
        argv += ["--metrics-listen", f"127.0.0.1:{self.port}", "--healthz-listen", f"127.0.0.1:{self.port}", *options]
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                argv, stdout=out, stderr=out, env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
                preexec_fn=realserver().die_with_parent,
            )  # fmt: skip

    def ask(self, path: str) -> str:
        """The answer; empty if there is none or a refusal."""
        try:
            with urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as reply:
                return str(reply.read().decode())
        except OSError:
            return ""

    def leading(self) -> bool:
        return "fimbria_operator_leading 1.0" in self.ask("/metrics")

    async def is_leading(self) -> bool:
        return await asyncio.to_thread(self.leading)

    async def is_ready(self) -> bool:
        return bool(await asyncio.to_thread(self.ask, "/readyz"))

    def cost(self) -> str:
        return f"{pss(self.process.pid):.0f} MiB, {cpu_seconds(self.process.pid):.1f} s CPU"


async def until(check: Callable[[], Coroutine[Any, Any, bool]]) -> float:
    """Seconds that it took."""
    began = time.monotonic()
    while not await check():
        if time.monotonic() - began > PATIENCE:
            raise RuntimeError("too long")
        await asyncio.sleep(0.1)
    return time.monotonic() - began


async def batched(client: ApiClient, address: str) -> bool:
    listed = await client.list(resources.CILIUM_ENDPOINT_SLICES)
    pairs = (p for s in listed.items for e in s.endpoints or () for p in e.networking.addressing or ())
    return any(p.ipv4 == address for p in pairs)


async def covered(client: ApiClient) -> bool:
    try:
        await client.get(resources.CILIUM_ENDPOINT_SLICES, rows.COVER)
    except NotFound:
        return False
    except ApiError:
        return False
    return True


async def add(client: ApiClient, number: int) -> str:
    """A pod's report; its address."""
    address = f"10.250.{number}.1"
    networking = {"addressing": [{"ipv4": address}], "node": "10.0.0.1"}
    body = {
        "metadata": {"name": f"added{number}"},
        "status": {"id": 1, "identity": {"id": 300}, "networking": networking},
    }
    await client.create(resources.CILIUM_ENDPOINTS, body, "default")
    return address


async def run(server: BigServer, nodes: int, pods: int, options: list[str]) -> None:
    reports = list(cluster_data.pods(pods, nodes, cluster_data.IDENTITIES, ipv6=False))
    for part in (
        bigserver.core_nodes(nodes), cluster_data.nodes(nodes, ipv6=False),
        cluster_data.identities(cluster_data.IDENTITIES), bigserver.core_pods(reports, nodes), reports,
    ):  # fmt: skip
        await server.fill(part)
    print(f"{nodes} nodes, {pods} pods are in etcd", flush=True)
    replicas = [Replica(server, f"operator{n}", *options) for n in range(2)]
    try:
        async with server.client() as client:
            took = await until(lambda: covered(client))
            first = next(r for r in replicas if r.leading())
            second = next(r for r in replicas if r is not first)
            slices = len((await client.list(resources.CILIUM_ENDPOINT_SLICES)).items) - 1
            print(f"{slices} slices hold everybody after {took:.1f} s; leader {first.cost()}", flush=True)
            await until(second.is_ready)
            await asyncio.sleep(20)
            print(f"at rest: leader {first.cost()}; standby {second.cost()}", flush=True)
            for n, how in enumerate((signal.SIGKILL, signal.SIGTERM)):
                used = cpu_seconds(second.process.pid)
                first.process.send_signal(how)
                address = await add(client, n)
                leads = await until(second.is_leading)
                known = await until(lambda address=address: batched(client, address))
                used = cpu_seconds(second.process.pid) - used
                print(f"{how.name}: {leads:.1f} s without a leader, a pod of that time in a slice {known:.1f} s later, "
                      f"{used:.1f} s CPU of the new leader", flush=True)  # fmt: skip
                first, second = second, Replica(server, f"again{n}", *options)
                replicas.append(second)
                await until(second.is_ready)
    finally:
        for one in replicas:
            one.process.kill()
            one.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=5000)
    parser.add_argument("--pods", type=int, default=100_000)
    parser.add_argument("--identities", choices=("agent", "operator"), default="agent", help="who allocates them")
    given = parser.parse_args()
    with big_server() as server:
        asyncio.run(run(server, given.nodes, given.pods, ["--identity-allocation", given.identities]))


if __name__ == "__main__":
    main()
