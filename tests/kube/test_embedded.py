"""What only the embedded server can be asked: death by kill -9, a bounded history, its sockets."""

from __future__ import annotations

import asyncio
import http.client
import ipaddress
import os
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from fimbria.lab.apiserver.app import Api
from fimbria.lab.apiserver.registry import Registry
from fimbria.lab.apiserver.store import Store

pytestmark = pytest.mark.timeout(120)
SOURCE = Path(__file__).parents[2] / "src"
Obj = dict[str, Any]


def cm(name: str = "") -> str:
    return "/api/v1/namespaces/default/configmaps" + (f"/{name}" if name else "")


def test_kill_loses_nothing_and_versions_go_on(embedded_server: Any) -> None:
    client = embedded_server.start()
    made = [client.post(cm(), {"metadata": {"name": f"a{number}"}}) for number in range(20)]
    last = client.delete(cm("a0"))
    newest = int(client.get(cm())["metadata"]["resourceVersion"])
    embedded_server.kill()
    client = embedded_server.start()
    assert last["status"] == "Success" and client.call("GET", cm("a0")).code == 404
    assert client.get(cm("a7"))["metadata"] == made[7]["metadata"]
    assert int(client.get(cm())["metadata"]["resourceVersion"]) >= newest
    assert int(client.post(cm(), {"metadata": {"name": "next"}})["metadata"]["resourceVersion"]) > newest


def test_watch_over_a_restart(embedded_server: Any) -> None:
    client = embedded_server.start()
    old = client.post(cm(), {"metadata": {"name": "a"}})["metadata"]["resourceVersion"]
    new = client.post(cm(), {"metadata": {"name": "b"}})["metadata"]["resourceVersion"]
    embedded_server.kill()
    client = embedded_server.start()
    kind, status = client.watch(cm(), resourceVersion=old).next()
    assert (kind, status["code"], status["reason"]) == ("ERROR", 410, "Expired")
    watcher = client.watch(cm(), resourceVersion=new)
    client.post(cm(), {"metadata": {"name": "c"}})
    assert watcher.next()[1]["metadata"]["name"] == "c"


def test_history_is_bounded(embedded_server: Any) -> None:
    client = embedded_server.start()
    for number in range(5):
        client.post(cm(), {"metadata": {"name": f"p{number}"}})
    page = client.get(cm(), limit=2)
    rv = page["metadata"]["resourceVersion"]
    for number in range(120):
        client.patch(cm("p0"), {"data": {"n": str(number)}})
    kind, status = client.watch(cm(), resourceVersion=rv).next()
    assert (kind, status["code"]) == ("ERROR", 410)
    answer = client.call("GET", cm(), resourceVersion=rv, resourceVersionMatch="Exact")
    assert (answer.code, answer.body["reason"]) == (410, "Expired")
    answer = client.call("GET", cm(), limit="2", **{"continue": page["metadata"]["continue"]})
    assert (answer.code, answer.body["reason"]) == (410, "Expired")
    rest = client.get(cm(), **{"continue": answer.body["metadata"]["continue"]})
    assert {"p2", "p3", "p4"} <= {item["metadata"]["name"] for item in rest["items"]}


def test_a_watcher_that_does_not_read_is_cut_off(embedded_server: Any) -> None:
    client = embedded_server.start()
    rv = client.get(cm())["metadata"]["resourceVersion"]
    watcher = client.watch(cm(), resourceVersion=rv)
    big = "x" * 200_000
    client.post(cm(), {"metadata": {"name": "big"}, "data": {"k": big}})
    for number in range(150):
        client.patch(cm("big"), {"data": {"n": str(number)}})
    kinds = []
    while True:
        kind, obj = watcher.next()
        kinds.append(kind)
        if kind == "ERROR":
            assert obj["code"] == 410
            break
    assert len(kinds) < 150 and watcher.ended()


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path):
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self._path))


def test_unix_socket_is_private_and_needs_no_token(embedded_server: Any, tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    embedded_server._options += ("--listen", f"unix:{path}")
    embedded_server.start()
    deadline = time.monotonic() + 30
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(embedded_server.kubeconfig.stat().st_mode) == 0o600
    connection = UnixConnection(path)
    connection.request("GET", "/api/v1/namespaces/default")
    assert connection.getresponse().status == 200
    connection.close()


def test_controllers_outlive_the_server(embedded_server: Any, tmp_path: Path) -> None:
    client = embedded_server.start()
    log = (tmp_path / "controllers.log").open("wb")
    command = [sys.executable, "-m", "fimbria.lab.apiserver.controllers", "--kubeconfig", str(client.kubeconfig)]
    process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"PYTHONPATH": str(SOURCE)})
    try:
        labels = {"app": "a"}
        template = {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "c", "image": "x"}]}}
        spec = {"replicas": 2, "selector": {"matchLabels": labels}, "template": template}
        path = "/apis/apps/v1/namespaces/default/deployments"

        def pods() -> int:
            return len(client.get("/api/v1/namespaces/default/pods")["items"])

        client.post(path, {"metadata": {"name": "d"}, "spec": spec})
        client.eventually(lambda: pods() == 2)
        for wanted in (3, 5, 1):
            embedded_server.kill()
            client = embedded_server.start()
            client.patch(f"{path}/d", {"spec": {"replicas": wanted}})
            client.eventually(lambda wanted=wanted: pods() == wanted)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def test_port_in_use_and_bad_options_are_one_sentence(embedded_server: Any, tmp_path: Path) -> None:
    embedded_server.start()
    address = f"127.0.0.1:{embedded_server._port}"
    cases = {
        ("--listen", address): "address already in use",
        ("--listen", "nowhere:1"): "does not appear to be an IPv4 or IPv6 address",
        ("--listen", "127.0.0.1:0", "--service-cidr", "10.0.0.0/99"): "--service-cidr",
        ("--listen", "127.0.0.1:0", "--db", "/nowhere/db"): "/nowhere/db: unable to open database file",
        ("--listen", "127.0.0.1:0", "--db", str(embedded_server.folder / "db.sqlite")): "database is locked",
    }
    for options, words in cases.items():
        command = [sys.executable, "-m", "fimbria.lab.apiserver", "--db", str(tmp_path / "other.db"), *options]
        env = os.environ | {"PYTHONPATH": str(SOURCE)}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode != 0 and words in done.stderr and "Traceback" not in done.stderr, done.stderr


async def test_an_abandoned_watch_leaves_nothing_behind(tmp_path: Path) -> None:
    store = Store(tmp_path / "db")
    registry = Registry(store, [ipaddress.ip_network("10.96.0.0/16")])
    runner = Api(registry, "secret").runner()
    await runner.setup()
    path = str(tmp_path / "sock")
    await web.UnixSite(runner, path).start()
    shelf = registry.shelf(registry.namespaces)
    try:
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(path)) as session:
            for _ in range(5):
                await session.get("http://lab/api/v1/namespaces?watch=1")
            assert len(shelf._wakers) == 5
        async with asyncio.timeout(30):
            while shelf._wakers:  # noqa: ASYNC110 - what is waited for has no event
                await asyncio.sleep(0.01)
    finally:
        await runner.cleanup()
        store.close()
