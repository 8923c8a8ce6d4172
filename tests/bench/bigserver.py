"""A real kube-apiserver that holds a large cluster: objects are put straight into its etcd, as it would have stored
them itself, since a hundred thousand requests would only measure how we wait."""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import aiohttp
from tests.bench import cluster_data
from tests.bench.agent import cpu_seconds
from tests.bench.cluster_data import Row

from fimbria.sources.k8s import config
from fimbria.sources.k8s.client import ApiClient

ROOT: Final = Path(__file__).parents[2]
CRDS: Final = ROOT / "src/fimbria/crds"
TMPFS: Final = Path("/dev/shm")  # etcd's files: a disk would be measured otherwise
BATCH: Final = 100  # operations of one etcd transaction; 128 is etcd's limit
AT_ONCE: Final = 8
STORED_AS: Final = {"nodes": "minions"}
_SAMPLE: Final = re.compile(r"^apiserver_request_total\{(.*)\} (\S+)$", re.MULTILINE)
_LABEL: Final = re.compile(r'(\w+)="([^"]*)"')


def realserver() -> ModuleType:
    """tests/kube/realserver.py, which is in no package."""
    name = "fimbria_realserver"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "tests/kube/realserver.py")
        assert spec and spec.loader
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@dataclass(slots=True)
class BigServer:
    """The server's processes and how to ask what they did."""

    kubeconfig: Path
    etcd_url: str
    pids: Mapping[str, int]

    def client(self, component: str = "bench", **options: Any) -> ApiClient:
        """Without a limit of its own: one process stands for thousands of agents."""
        options = {"rate": 1e6, "burst": 1_000_000, "connections": 200, "timeout": 300.0, **options}
        return ApiClient(config.load(self.kubeconfig), component=component, **options)

    def cpu(self) -> float:
        """Seconds of CPU that API server and etcd used so far."""
        return sum(cpu_seconds(pid) for pid in self.pids.values())

    def rss(self) -> float:
        """MiB of the API server."""
        lines = Path(f"/proc/{self.pids['apiserver']}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024

    async def requests(self) -> dict[tuple[str, str], float]:
        """Requests answered so far by (verb, resource), watches that ended among them."""
        cluster = config.load(self.kubeconfig)
        headers = {"Authorization": f"Bearer {cluster.token.get() if cluster.token else ''}"}
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=cluster.tls or True)) as session,
            session.get(f"{cluster.server}/metrics", headers=headers) as response,
        ):
            text = await response.text()
        found: dict[tuple[str, str], float] = {}
        for labels, value in _SAMPLE.findall(text):
            named = dict(_LABEL.findall(labels))
            key = (named.get("verb", ""), named.get("resource", ""))
            found[key] = found.get(key, 0.0) + float(value)
        return found

    async def fill(self, rows: Iterable[Row]) -> int:
        """Put objects into etcd; returns how many. Raises RuntimeError if etcd refuses."""
        count, batch, tasks = 0, [], set[asyncio.Task[None]]()
        async with aiohttp.ClientSession() as session:
            for row in rows:
                count += 1
                batch.append(_operation(row))
                if len(batch) == BATCH:
                    tasks.add(asyncio.create_task(self._transaction(session, batch)))
                    batch = []
                if len(tasks) >= AT_ONCE:
                    done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        task.result()
            if batch:
                tasks.add(asyncio.create_task(self._transaction(session, batch)))
            await asyncio.gather(*tasks)
        return count

    async def _transaction(self, session: aiohttp.ClientSession, operations: list[dict[str, Any]]) -> None:
        async with session.post(f"{self.etcd_url}/v3/kv/txn", json={"success": operations}) as response:
            if response.status != 200:
                raise RuntimeError(f"etcd: {response.status} {(await response.text())[:300]}")


def _operation(row: Row) -> dict[str, Any]:
    resource, namespace, name, body = row
    plural, _, group = resource.partition(".")
    parts = ["/registry", group, STORED_AS.get(plural, plural), namespace, name]
    key, value = "/".join(filter(None, parts)).encode(), json.dumps(body, separators=(",", ":")).encode()
    return {"requestPut": {"key": base64.b64encode(key).decode(), "value": base64.b64encode(value).decode()}}


@contextmanager
def big_server(*extra: str) -> Iterator[BigServer]:
    """A server with our kinds and the namespaces of `cluster_data`, gone at the end. Raises RuntimeError."""
    real = realserver()
    with tempfile.TemporaryDirectory(prefix="fimbench-", dir=TMPFS) as folder:
        server = real.RealServer(Path(folder), extra=list(extra), new_etcd=True)
        server.start()
        try:
            kubectl = [str(real.binaries() / "kubectl"), f"--kubeconfig={server.kubeconfig}"]
            crds = [f"--filename={path}" for path in sorted(CRDS.glob("*.yaml"))]
            subprocess.run([*kubectl, "create", *crds], check=True, capture_output=True)
            wait = [*kubectl, "wait", "--for=condition=Established", "crd", "--all", "--timeout=30s"]
            subprocess.run(wait, check=True, capture_output=True)
            pids = {name: process.pid for name, process in server._processes.items()}
            big = BigServer(server.kubeconfig, server.etcd_url, pids)
            asyncio.run(big.fill(namespaces()))
            yield big
        finally:
            server.stop()


# --- kinds that Kubernetes itself brings ---------------------------------------------------------------------------


def namespaces() -> Iterator[Row]:
    """Namespaces ns0, ns1, ..."""
    for n in range(cluster_data.NAMESPACES):
        yield "namespaces", "", f"ns{n}", _core("Namespace", f"ns{n}") | {"status": {"phase": "Active"}}


def core_nodes(count: int) -> Iterator[Row]:
    """Nodes, of the CiliumNodes of `cluster_data`."""
    for n in range(count):
        addresses = [{"type": "InternalIP", "address": cluster_data.node_addresses(n)[0]}]
        yield "nodes", "", f"far{n}", _core("Node", f"far{n}") | {"status": {"addresses": addresses}}


def core_pods(rows: Iterable[Row], node_count: int) -> Iterator[Row]:
    """The Pod of each CiliumEndpoint of `cluster_data.pods`, running."""
    for n, (_, namespace, name, body) in enumerate(rows):
        labels = {k.removeprefix("k8s:"): v for k, v in cluster_data.identity_labels(_number(body)).items()}
        kept = {k: v for k, v in labels.items() if not k.startswith("io.")}
        address = body["status"]["networking"]["addressing"][0]["ipv4"]
        yield "pods", namespace, name, core_pod(namespace, name, f"far{n % node_count}", kept, address)


def core_pod(namespace: str, name: str, node: str, labels: Mapping[str, str], address: str = "") -> dict[str, Any]:
    """A Pod as the API server stores it."""
    pod = _core("Pod", name, namespace)
    pod["metadata"]["labels"] = dict(labels)
    containers = [{"name": "main", "image": "registry.invalid/app:1", "resources": {}}]
    pod["spec"] = {"nodeName": node, "containers": containers, "serviceAccountName": "default"}
    pod["status"] = {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}]} if address else {}
    return pod


def slices(count: int, endpoints: int = 3) -> Iterator[Row]:
    """EndpointSlices of Services with some endpoints each."""
    for n in range(count):
        namespace, name = f"ns{n % cluster_data.NAMESPACES}", f"app{n}-{n * 2654435761 % 2**20:05x}"
        body = _core("EndpointSlice", name, namespace) | {"apiVersion": "discovery.k8s.io/v1", "addressType": "IPv4"}
        body["metadata"]["labels"] = {"kubernetes.io/service-name": f"app{n}"}
        body["endpoints"] = [
            {
                "addresses": [f"10.{64 + (n >> 14)}.{n >> 6 & 255}.{(n & 63) * 4 + e}"],
                "conditions": {"ready": True, "serving": True, "terminating": False},
                "nodeName": f"far{(n + e) % 1000}",
                "targetRef": {"kind": "Pod", "name": f"{name}-{e}", "namespace": namespace},
            }
            for e in range(endpoints)
        ]
        body["ports"] = [{"name": "http", "port": 8080, "protocol": "TCP"}]
        yield "endpointslices", namespace, name, body


def _core(kind: str, name: str, namespace: str = "") -> dict[str, Any]:
    return cluster_data._object(kind, name, namespace) | {"apiVersion": "v1"}


def _number(body: Mapping[str, Any]) -> int:
    return int(body["status"]["identity"]["id"]) - cluster_data.FIRST_IDENTITY
