"""The composition root of the node runner."""

import argparse
import asyncio
import logging
import signal
from pathlib import Path

from fimbria.lab import kernel
from fimbria.lab.runner import cni
from fimbria.lab.runner.containers import Store
from fimbria.lab.runner.manager import Manager
from fimbria.lab.runner.node import NodeKeeper
from fimbria.lab.runner.pods import Host
from fimbria.lab.runner.spec import PODS, PodObject
from fimbria.sources.k8s import config
from fimbria.sources.k8s.client import ApiClient
from fimbria.sources.k8s.informer import Informer, object_key
from fimbria.tables.table import Table


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fimbria.lab.runner", description="A small kubelet for one node of a lab."
    )
    parser.add_argument("--node-name", required=True)
    parser.add_argument("--kubeconfig", required=True)
    parser.add_argument(
        "--address", action="append", required=True, help="the node's own addresses, the primary one first"
    )
    parser.add_argument("--cgroup", type=Path, required=True, help="cgroup v2 directory that pods are put below")
    parser.add_argument("--cni-conf-dir", type=Path, default=Path("/etc/cni/net.d"))
    parser.add_argument(
        "--cni-path", default="/opt/cni/bin:/usr/lib/cni", help="directories with plugins, separated by colons"
    )
    parser.add_argument("--zone", default="", help="label topology.kubernetes.io/zone of the node")
    parser.add_argument("--cni-cache", type=Path, default=Path("/var/lib/cni"))
    parser.add_argument("--directory", type=Path, default=Path("/run/fimbria-runner"))
    parser.add_argument("--logs", type=Path, default=Path("/var/log/pods"))
    return parser.parse_args()


async def run(args: argparse.Namespace) -> None:
    runtime = cni.Runtime([Path(p) for p in args.cni_path.split(":")], args.cni_cache)
    args.directory.mkdir(mode=0o700, exist_ok=True)
    store = Store(args.directory, args.cgroup, args.logs)

    def network() -> cni.NetworkList:
        return cni.load_list(args.cni_conf_dir)

    host = Host(store, runtime, network, tuple(args.address))
    pods: Table[str, PodObject] = Table("pods")
    async with ApiClient(config.load(args.kubeconfig), component="runner", rate=200, burst=400) as client:
        informer = Informer(
            client, PODS, pods, lambda pod: pod, key=object_key, fields=f"spec.nodeName={args.node_name}"
        )
        async with asyncio.TaskGroup() as group:
            keeper = NodeKeeper(client, args.node_name, args.address, runtime, network, zone=args.zone)
            tasks = [
                group.create_task(informer.run()),
                group.create_task(keeper.run()),
                group.create_task(Manager(client, pods, host, kernel.binary("labtool")).run()),
            ]
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, lambda: [t.cancel() for t in tasks])


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    asyncio.run(run(arguments()))
    return 0
