"""The client, informers, leader election and events against the lab's API server, a real process that is killed."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from scripted_api import until

from fimbria.sources.k8s import config, errors
from fimbria.sources.k8s.client import ApiClient
from fimbria.sources.k8s.events import EventRecorder
from fimbria.sources.k8s.informer import Informer, object_key
from fimbria.sources.k8s.leader import LeaderElection
from fimbria.sources.k8s.resources import EVENTS, LEASES, NAMESPACES, NETWORK_POLICIES, NODES, PODS, SERVICES
from fimbria.sources.k8s.types.core import Pod
from fimbria.tables.table import Table


class Server:
    """The embedded API server as a child process on a free port of loopback."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kubeconfig = folder / "kubeconfig"
        self._listen = "127.0.0.1:0"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.kubeconfig.unlink(missing_ok=True)
        command = [sys.executable, "-m", "fimbria.lab.apiserver", "--db", str(self.folder / "db")]
        command += ["--listen", self._listen, "--kubeconfig-out", str(self.kubeconfig)]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not self.kubeconfig.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server didn't start:\n{(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.05)
        self._listen = config.from_kubeconfig(self.kubeconfig).server.removeprefix("https://")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    try:
        made.start()
        yield made
    finally:
        made.kill()


@pytest.fixture
async def client(server: Server) -> AsyncIterator[ApiClient]:
    made = ApiClient(config.from_kubeconfig(server.kubeconfig), component="test", rate=1000, burst=1000)
    async with asyncio.timeout(30), made:
        while True:  # the kubeconfig may be there before the socket
            try:
                await made.create(NAMESPACES, {"metadata": {"name": "team"}})
                break
            except errors.Unavailable:
                await asyncio.sleep(0.05)
    async with made:
        yield made


def pod(name: str, node: str = "n1") -> dict[str, Any]:
    containers = [{"name": "c", "image": "x"}]
    return {
        "metadata": {"name": name, "labels": {"app": name[0]}},
        "spec": {"nodeName": node, "containers": containers},
    }


@asynccontextmanager
async def following(client: ApiClient, table: Table[str, str]) -> AsyncIterator[Informer[Pod, str, str]]:
    informer = Informer(client, PODS, table, lambda one: one.status.pod_ip or "-", key=object_key, page_size=7)
    task = asyncio.create_task(informer.run())
    try:
        await asyncio.wait_for(table.wait_synced(), 10)
        yield informer
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_objects_come_change_and_go(client: ApiClient) -> None:
    for n in range(20):
        await client.create(PODS, pod(f"a{n}"), "team")
    table = Table[str, str]("pods")
    async with following(client, table):
        assert len(table) == 20, "three pages"
        await client.create(PODS, pod("b"), "team")
        await client.patch_status(PODS, "b", {"podIP": "10.0.0.9", "phase": "Running"}, "team", kind="strategic")
        await until(lambda: table.get("team/b") == "10.0.0.9")
        await client.delete(PODS, "a1", "team", grace_seconds=0)
        await until(lambda: "team/a1" not in table)
    listed = await client.list(PODS, "team", labels="app=a", limit=6)
    assert len(listed.items) == 19


async def test_killed_server_costs_no_row_and_no_event(server: Server, client: ApiClient) -> None:
    for name in ("a", "b"):
        await client.create(PODS, pod(name), "team")
    table = Table[str, str]("pods")
    async with following(client, table) as informer:
        await until(lambda: informer.connected)
        revision = table.revision
        server.kill()
        await until(lambda: not informer.connected)
        assert len(table) == 2
        with pytest.raises(errors.Unavailable):
            await client.get(PODS, "a", "team")
        await asyncio.to_thread(server.start)
        await until(lambda: informer.connected, 20)
        await client.create(PODS, pod("c"), "team")
        await until(lambda: len(table) == 3)
        assert table.revision == revision + 1, "what was there isn't touched"


async def test_errors_of_a_real_server(client: ApiClient) -> None:
    await client.create(PODS, pod("a"), "team")
    with pytest.raises(errors.AlreadyExists, match='create Pod "team/a": 409 AlreadyExists'):
        await client.create(PODS, pod("a"), "team")
    with pytest.raises(errors.NotFound, match='get Pod "team/zz": 404 NotFound'):
        await client.get(PODS, "zz", "team")
    with pytest.raises(errors.Invalid, match=r"metadata\.name"):
        await client.create(SERVICES, {"metadata": {"name": "Bad_Name"}, "spec": {"ports": [{"port": 80}]}}, "team")
    await client.create(NODES, {"metadata": {"name": "n1"}})
    node = await client.get(NODES, "n1")
    await client.patch(NODES, "n1", {"metadata": {"labels": {"x": "y"}}})
    with pytest.raises(errors.Conflict):
        await client.replace(NODES, "n1", node)
    with pytest.raises(errors.Conflict):
        await client.delete(NODES, "n1", uid="another")


async def test_policy_survives_the_round_trip(client: ApiClient) -> None:
    spec = {
        "podSelector": {"matchLabels": {"app": "db"}},
        "policyTypes": ["Ingress"],
        "ingress": [{"from": [{"namespaceSelector": {}}], "ports": [{"port": 5432, "protocol": "TCP"}]}],
    }
    made = await client.create(NETWORK_POLICIES, {"metadata": {"name": "db"}, "spec": spec}, "team")
    assert made.spec.ingress is not None
    assert made.spec.ingress[0].from_ is not None
    assert made.spec.ingress[0].from_[0].namespace_selector is not None
    assert made.spec.ingress[0].ports is not None
    assert made.spec.ingress[0].ports[0].port == 5432


async def test_events_are_counted(client: ApiClient) -> None:
    made = await client.create(PODS, pod("a"), "team")
    recorder = EventRecorder(client, component="fimbria-agent", host="n1")
    for _ in range(3):
        recorder.emit(PODS, made.metadata, "Warning", "PolicyInvalid", "no such port")
        await recorder.flush()
    assert recorder.failed == 0
    (event,) = (await client.list(EVENTS, "team")).items
    assert (event.reason, event.count, event.involved_object.name) == ("PolicyInvalid", 3, "a")


async def test_leadership_passes_on(client: ApiClient) -> None:
    terms: list[str] = []
    finish = {"a": asyncio.Event(), "b": asyncio.Event()}

    def candidate(name: str) -> asyncio.Task[None]:
        election = LeaderElection(
            client, namespace="team", name="operator", identity=name, duration=3, renew_within=2.0, retry=0.1
        )

        async def lead() -> None:
            assert election.holds()
            terms.append(name)
            await finish[name].wait()

        return asyncio.create_task(election.run(lead))

    first = candidate("a")
    await until(lambda: terms == ["a"])
    second = candidate("b")
    await asyncio.sleep(0.5)
    assert terms == ["a"]
    finish["a"].set()
    await first
    await until(lambda: terms == ["a", "b"])
    lease = await client.get(LEASES, "operator", "team")
    assert (lease.spec.holder_identity, lease.spec.lease_transitions) == ("b", 1)
    finish["b"].set()
    await second


def test_kubeconfig_is_private(server: Server) -> None:
    assert os.stat(server.kubeconfig).st_mode & 0o077 == 0
