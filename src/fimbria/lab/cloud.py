"""What a cloud provider does around the nodes: `python -m fimbria.lab.cloud --lab NAME`.

It carries API connections between the machine and the lab (in both directions: kubectl on the machine to the embedded
server, or the lab's nodes to a server on the machine), with native routing it keeps the fabric's route table equal to
the pod ranges of the nodes, and it gives LoadBalancer Services their addresses and leads those to nodes (balancers.py).
"""

import argparse
import asyncio
import contextlib
import logging
import signal
import socket
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import yaml

from fimbria.lab import fabric, kernel, state
from fimbria.lab.balancers import Balancers
from fimbria.lab.errors import LabError
from fimbria.lab.forward import Forwarder, listener
from fimbria.lab.layout import API_PORT, LabSpec, Paths
from fimbria.sources.k8s import config
from fimbria.sources.k8s.client import ApiClient
from fimbria.sources.k8s.informer import Informer, object_key
from fimbria.sources.k8s.resources import CILIUM_NODES
from fimbria.sources.k8s.types.cilium import CiliumNode
from fimbria.tables.table import Table

RETRY = 1.0  # seconds
log = logging.getLogger("cloud")
Routes = frozenset[tuple[str, str]]  # (pod CIDR, node)


def readdressed(kubeconfig: str, base: Path, host: str, port: int) -> str:
    """The same kubeconfig for a server reached at another address: certificates are still checked against its own name.

    Relative file names are made absolute against `base`. Raises LabError if it isn't a kubeconfig.
    """
    document = yaml.safe_load(kubeconfig)
    try:
        for entry in document["clusters"]:
            cluster = entry["cluster"]
            parts = urlsplit(cluster["server"])
            if parts.scheme == "https":
                cluster.setdefault("tls-server-name", parts.hostname)
            cluster["server"] = urlunsplit(
                (parts.scheme, f"[{host}]:{port}" if ":" in host else f"{host}:{port}", "", "", "")
            )
        sections = [e["cluster"] for e in document["clusters"]] + [
            e.get("user") or {} for e in document.get("users") or ()
        ]
    except (TypeError, KeyError) as e:
        raise LabError(f"not a kubeconfig: {e} is missing") from None
    for section in sections:
        for key in ("certificate-authority", "client-certificate", "client-key", "tokenFile"):
            if section.get(key):
                section[key] = str(base / section[key])
    return yaml.safe_dump(document)


def server_of(kubeconfig: str) -> tuple[str, int]:
    """Host and port of the current context's server. Raises LabError."""
    document = yaml.safe_load(kubeconfig)
    try:
        context = next(c["context"] for c in document["contexts"] if c["name"] == document["current-context"])
        url = next(c["cluster"]["server"] for c in document["clusters"] if c["name"] == context["cluster"])
    except (TypeError, KeyError, StopIteration):
        raise LabError("the kubeconfig has no usable current context") from None
    parts = urlsplit(url)
    if not parts.hostname:
        raise LabError(f"the kubeconfig's server {url!r} is no URL")
    return parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


def open_api(spec: LabSpec, paths: Paths) -> Forwarder:
    """Writes the kubeconfig of the side that can't reach the server by itself, and returns the forwarder that it
    leads to."""
    control = paths.netns("control")
    if not spec.kubeconfig:
        listening = _machine_listener(paths)
        text = readdressed(paths.kubeconfig.read_text(), paths.state, *listening.getsockname()[:2])
        state.write(paths.host_kubeconfig, text)
        return Forwarder(listening, control, spec.control.ipv4, API_PORT)
    source = Path(spec.kubeconfig)
    listening = listener(control, spec.control.ipv4, API_PORT)
    state.write(paths.host_kubeconfig, source.read_text())
    state.write(paths.kubeconfig, readdressed(source.read_text(), source.parent, spec.control.ipv4, API_PORT))
    return Forwarder(listening, None, *server_of(source.read_text()))


def _machine_listener(paths: Paths) -> socket.socket:
    """At the port of before, so that kubeconfigs in use stay right; another one if that was taken meanwhile."""
    if paths.host_kubeconfig.exists():
        with contextlib.suppress(OSError):
            return listener(None, *server_of(paths.host_kubeconfig.read_text()))
    return listener(None, "127.0.0.1", 0)


def pod_cidrs(node: CiliumNode) -> tuple[str, ...]:
    return tuple(node.spec.ipam.pod_cidrs or ())


async def keep_routes(spec: LabSpec, paths: Paths, nodes: Table[str, tuple[str, ...]]) -> None:
    """Makes the fabric's routes follow the table, for ever."""
    known: Routes = frozenset()
    subscription = nodes.subscribe()
    await nodes.wait_synced()
    await _change(paths, fabric.forget_routes())
    while True:
        subscription.drain()
        wanted: Routes = frozenset((c, n) for n, cidrs in nodes.items() for c in cidrs if n in spec.node_names)
        try:
            await _change(paths, fabric.route_changes(spec, known, wanted))
        except LabError as e:
            log.error("starting over: %s", e)
            await asyncio.sleep(RETRY)
            await _change(paths, fabric.forget_routes())
            known = frozenset()
            continue
        known = wanted
        await subscription.wait()


async def _change(paths: Paths, lines: list[str]) -> None:
    if lines:
        log.info("routes: %s", "; ".join(lines))
        await asyncio.to_thread(kernel.ip_batch, paths.netns_name(fabric.ROUTER), lines)


async def main(lab: str) -> None:
    paths = Paths(lab)
    spec = state.load(lab)
    forwarder = open_api(spec, paths)
    async with asyncio.TaskGroup() as group:
        group.create_task(forwarder.run())
        client = await _stay_open(ApiClient(config.load(paths.host_kubeconfig), component="lab-cloud"))
        balancers = Balancers(spec, paths, client)
        group.create_task(balancers.run())
        watchers: list[asyncio.Task[None]] = []
        nodes: Table[str, tuple[str, ...]] = Table("nodes")
        if spec.routing == "native":
            group.create_task(Informer(client, CILIUM_NODES, nodes, pod_cidrs, key=object_key).run())
            watchers.append(group.create_task(keep_routes(spec, paths, nodes)))

        def again() -> None:
            """A node was booted anew: its routes went with its old cable."""
            balancers.forget()
            if watchers:
                watchers.pop().cancel()
                watchers.append(group.create_task(keep_routes(spec, paths, nodes)))

        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, again)


async def _stay_open(client: ApiClient) -> ApiClient:
    return await client.__aenter__()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    parser = argparse.ArgumentParser()
    parser.add_argument("--lab", required=True)
    asyncio.run(main(parser.parse_args().lab))
