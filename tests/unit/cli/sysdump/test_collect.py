"""A whole cluster, against a server that speaks as an API server with many nodes does, some of which misbehave."""

import asyncio
import io
import json
import os
import zipfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from fimbria.cli.cluster import CantAsk
from fimbria.cli.sysdump import collect
from fimbria.cli.sysdump.archive import Package, Stream
from fimbria.cli.sysdump.collect import Collector, Options, cluster_name
from fimbria.cli.sysdump.findings import Facts
from fimbria.sources.k8s.client import ApiClient
from fimbria.sources.k8s.config import ClusterConfig
from fimbria.sources.k8s.exec import SUBPROTOCOL, PodAccess

IMAGE = "ghcr.io/fimbria/fimbria:0.1.0"
LABELS = {"app.kubernetes.io/part-of": "fimbria", "app.kubernetes.io/name": "fimbria-agent"}
Run = Callable[..., Any]


def sent(name: str, *, whole: bool = True) -> bytes:
    sink = io.BytesIO()
    stream = Stream(sink)
    stream.json("version.json", {"node": name})
    stream.json("plan.json", [])
    stream.text("kernel/cmdline.txt", "ro token=hunter2\n")
    if whole:
        stream.json("errors.json", {"maps/x.json": "no time was left"})
    stream.close()
    return sink.getvalue()


class Cluster:
    """`behaviour` of a node's agent by its name: what it does when it is asked."""

    def __init__(self, nodes: int) -> None:
        self.nodes = [f"n{i:04}" for i in range(nodes)]
        self.unready: set[str] = set()
        self.behaviour: dict[str, str] = {}
        self.forbidden: set[str] = set()
        self.asked: list[str] = []
        self.begun = asyncio.Event()
        self.at_once = self.most_at_once = 0
        self.url = ""

    def objects(self, plural: str) -> list[Any]:
        if plural == "nodes":
            return [{"metadata": {"name": n}, "status": {"images": ["x"] * 9}} for n in self.nodes]
        if plural == "pods":
            return [self._pod(n) for n in self.nodes]
        if plural == "daemonsets":
            status = {"desiredNumberScheduled": len(self.nodes)}
            spec = {"template": {"spec": {"containers": [{"image": IMAGE}]}}}
            return [{"metadata": {"name": "fimbria", "namespace": "kube-system"}, "spec": spec, "status": status}]
        return []

    def _pod(self, node: str) -> Any:
        ready = str(node not in self.unready)
        state = {"name": "agent", "ready": True, "state": {"running": {}}, "restartCount": 0}
        return {
            "metadata": {"name": f"fimbria-{node}", "namespace": "kube-system", "labels": LABELS},
            "spec": {"nodeName": node, "containers": [{"name": "agent", "image": IMAGE}]},
            "status": {"conditions": [{"type": "Ready", "status": ready}], "containerStatuses": [state]},
        }

    async def list(self, request: web.Request) -> web.Response:
        plural = request.path.rpartition("/")[2]
        if plural in self.forbidden:
            return web.json_response({"message": f"cannot list resource {plural}"}, status=403)
        if "operator" in request.query.get("labelSelector", ""):
            return web.json_response({"metadata": {}, "items": []})
        items, start = self.objects(plural), int(request.query.get("continue") or 0)
        limit = int(request.query.get("limit") or 0) or len(items)
        more = {"continue": str(start + limit)} if start + limit < len(items) else {}
        return web.json_response({"metadata": more, "items": items[start : start + limit]})

    async def exec(self, request: web.Request) -> web.WebSocketResponse:
        node = request.match_info["pod"].removeprefix("fimbria-")
        self.asked.append(node)
        self.begun.set()
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        socket = web.WebSocketResponse(protocols=(SUBPROTOCOL,))
        try:
            await socket.prepare(request)
            await self._answer(socket, node)
        finally:
            self.at_once -= 1
        return socket

    async def _answer(self, socket: web.WebSocketResponse, node: str) -> None:
        what = self.behaviour.get(node, "well")
        if what == "hangs":
            await socket.send_bytes(b"\x01" + sent(node, whole=False))
            async for _ in socket:
                pass
        elif what == "floods":
            while not socket.closed:
                await socket.send_bytes(b"\x01" + os.urandom(1 << 16))
        elif what == "old":
            await socket.send_bytes(b"\x02Error: There is no command 'sysdump'.\n")
            causes = [{"reason": "ExitCode", "message": "2"}]
            await socket.send_bytes(b"\x03" + json.dumps({"status": "Failure", "details": {"causes": causes}}).encode())
        else:
            data = b"\x01not an archive" if what == "nonsense" else b"\x01" + sent(node, whole=what != "breaks off")
            await socket.send_bytes(data)
            await socket.send_bytes(b'\x03{"status":"Success"}')

    async def version(self, _request: web.Request) -> web.Response:
        return web.json_response({"gitVersion": "v1.36.3"})

    async def log(self, _request: web.Request) -> web.Response:
        return web.Response(text="2026-11-23T15:00:00Z began with password=hunter2\n")


@pytest.fixture
async def make_cluster() -> AsyncIterator[Callable[..., Any]]:
    runners = []

    async def make(nodes: int) -> Cluster:
        made = Cluster(nodes)
        app = web.Application()
        base = "/api/v1/namespaces/kube-system/pods/{pod}"
        app.add_routes([web.get(f"{base}/exec", made.exec), web.get(f"{base}/log", made.log)])
        app.add_routes([web.get("/version", made.version)])
        app.add_routes([web.get("/{path:apis?/.*}", made.list)])
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        made.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        runners.append(runner)
        return made

    yield make
    for runner in runners:
        await runner.cleanup()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Collects from a cluster; the archive's files by name, and the facts."""

    async def collected(cluster: Cluster, **options: Any) -> tuple[dict[str, bytes], Facts]:
        config = ClusterConfig(cluster.url)
        facts, said = Facts("x", "now", "me"), []
        chosen: dict[str, Any] = {"detail": "normal", "folder": tmp_path, "node_seconds": 20.0} | options
        async with ApiClient(config, component="t", rate=1000) as client, PodAccess(config, component="t") as pods:
            with Package(tmp_path / "x.zip", "x") as package:
                await Collector(package, client, pods, options=Options(**chosen), facts=facts, say=said.append).run()
        assert sorted(os.listdir(tmp_path)) == ["x.zip"], "nothing else stays on disk"
        with zipfile.ZipFile(tmp_path / "x.zip") as found:
            return {n.removeprefix("x/"): found.read(n) for n in found.namelist()}, facts

    return collected


async def test_nodes_that_misbehave_cost_nobody_else(
    make_cluster: Any, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect, "MOST_NODE", 1 << 20)
    cluster = await make_cluster(8)
    names = cluster.nodes
    cluster.behaviour = dict(zip(names, ("well", "hangs", "floods", "old", "nonsense", "breaks off"), strict=False))
    found, facts = await run(cluster, node_seconds=3.0)
    errors = json.loads(found["errors.json"])
    about = {n: errors.get(f"nodes/{n}/the agent", "") for n in names}
    assert about[names[0]] == about[names[6]] == about[names[7]] == ""
    assert "took longer than 3 s" in about[names[1]]
    assert about[names[2]] == "sent more than it may"
    assert "of a version without this command" in about[names[3]]
    assert about[names[4]]
    assert "broke off after kernel/cmdline.txt" in about[names[5]]
    for n in (names[0], names[1], names[5], names[6]):
        assert json.loads(found[f"nodes/{n}/version.json"]) == {"node": n}, "what came is kept"
    assert errors[f"nodes/{names[0]}/maps/x.json"] == "no time was left"
    assert all(f"nodes/{n}/logs/agent.log" in found for n in names)
    assert not [n for n, data in found.items() if b"hunter2" in data]
    assert facts.server_version == "v1.36.3"
    listed = json.loads(found["kubernetes/nodes.json"])["items"]
    assert [n["metadata"]["name"] for n in listed] == names
    assert listed[0]["kind"] == "Node" and "images" not in listed[0]["status"]


async def test_of_thousands_of_nodes_the_unwell_are_taken(make_cluster: Any, run: Run) -> None:
    cluster = await make_cluster(3000)
    cluster.unready = {"n1234", "n2345"}
    found, facts = await run(cluster, most_nodes=12)
    assert len(cluster.asked) >= 12
    taken = {n.split("/")[1] for n in found if n.startswith("nodes/")}
    assert len(taken) == 12
    assert taken >= cluster.unready
    assert facts.left_out == 2988
    assert "**2988 nodes were left out**" in found["README.md"].decode()
    assert cluster.most_at_once <= collect.PARALLEL + 2
    assert len(json.loads(found["kubernetes/nodes.json"])["items"]) == 3000


async def test_lists_are_cut(make_cluster: Any, run: Run) -> None:
    found, _ = await run(await make_cluster(1200), most_nodes=1, most_objects=600)
    assert len(json.loads(found["kubernetes/nodes.json"])["items"]) == 1000, "at a page's end"
    assert "cut after 1000" in json.loads(found["errors.json"])["kubernetes/nodes.json (part)"]


async def test_chosen_nodes(make_cluster: Any, run: Run) -> None:
    cluster = await make_cluster(5)
    found, _ = await run(cluster, nodes=("n0003",))
    assert {n.split("/")[1] for n in found if n.startswith("nodes/")} == {"n0003"}


async def test_a_node_that_does_not_exist(make_cluster: Any, run: Run, tmp_path: Path) -> None:
    cluster = await make_cluster(2)
    with pytest.raises(CantAsk, match="no node 'n9'"):
        await run(cluster, nodes=("n9",))
    assert os.listdir(tmp_path) == []


async def test_what_is_forbidden_is_named(make_cluster: Any, run: Run) -> None:
    cluster = await make_cluster(1)
    cluster.forbidden = {"services", "customresourcedefinitions"}
    errors = json.loads((await run(cluster))[0]["errors.json"])
    assert "cannot list resource services" in errors["kubernetes/services.json"]
    assert "kubernetes/customresourcedefinitions.apiextensions.k8s.io.json" in errors


async def test_cancelled_it_leaves_nothing(make_cluster: Any, run: Run, tmp_path: Path) -> None:
    cluster = await make_cluster(3)
    cluster.behaviour = dict.fromkeys(cluster.nodes, "hangs")
    task = asyncio.create_task(run(cluster))
    await cluster.begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("origin", "server", "expected"),
    [
        ("/home/x/.kube/config, context prod/eu", "https://x", "prod_eu"),
        ("the pod's service account", "https://10.96.0.1:443", "10.96.0.1-443"),
        ("", "https://[fd00::1]:6443", "fd00--1]-6443"),
    ],
)
def test_the_archives_name(origin: str, server: str, expected: str) -> None:
    assert cluster_name(origin, server) == expected.replace("]", "_")
