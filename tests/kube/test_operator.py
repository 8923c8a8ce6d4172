"""The operator as a process against both API servers: slices, identities, collection, and what happens when it dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fimbria.lab.cluster import definitions

SOURCE = Path(__file__).resolve().parent.parent.parent / "src"
CEPS = "/apis/cilium.io/v2/namespaces/{}/ciliumendpoints"
SLICES = "/apis/cilium.io/v2alpha1/ciliumendpointslices"
IDENTITIES = "/apis/cilium.io/v2/ciliumidentities"
NODES = "/apis/cilium.io/v2/ciliumnodes"
COVER = "fimbria-covers-all-endpoints"


@dataclass
class Operator:
    process: subprocess.Popen[bytes]
    health: int
    metrics: int
    log: Path

    def answer(self, path: str) -> tuple[int, str]:
        port = self.metrics if path == "/metrics" else self.health
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError as error:
            return 0, str(error)

    @property
    def leading(self) -> bool:
        return "fimbria_operator_leading 1.0" in self.answer("/metrics")[1]

    def value(self, metric: str) -> float:
        lines = [line for line in self.answer("/metrics")[1].splitlines() if line.startswith(metric)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


@dataclass
class Operators:
    """Starts them; none outlives the test."""

    server: Any
    folder: Path
    load: Callable[[str], Any]
    lease: str = field(default_factory=lambda: f"fim-{uuid.uuid4().hex[:6]}")
    started: list[Operator] = field(default_factory=list)

    def start(self, *options: str) -> Operator:
        real = self.load("realserver")
        health, metrics = real.free_port(), real.free_port()
        log = self.folder / f"operator{len(self.started)}.log"
        command = [
            sys.executable, "-m", "fimbria.operator", "--kubeconfig", str(self.server.kubeconfig),
            "--healthz-listen", f"127.0.0.1:{health}", "--metrics-listen", f"127.0.0.1:{metrics}", *options,
        ]  # fmt: skip
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=out, env=os.environ | {"PYTHONPATH": str(SOURCE)},
                preexec_fn=real.die_with_parent,
            )  # fmt: skip
        self.started.append(Operator(process, health, metrics, log))
        return self.started[-1]

    def stop(self) -> None:
        for one in self.started:
            one.process.kill()
            one.process.wait()


@pytest.fixture
def operators(server: Any, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Operators]:
    conftest = sys.modules[type(server).__module__]
    for manifest in definitions():
        server.call("POST", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", dict(manifest.value))
    for path in (SLICES, IDENTITIES, NODES, CEPS.format("default")):  # each is served by itself
        server.eventually(lambda path=path: server.call("GET", path).code == 200)
    if server.call("GET", "/api/v1/namespaces/kube-system").code == 404:
        server.post("/api/v1/namespaces", {"metadata": {"name": "kube-system"}})
    made = Operators(server, tmp_path, conftest.load)
    try:
        yield made
    finally:
        made.stop()
        for path in (SLICES, NODES, IDENTITIES):
            server.call("DELETE", path)
        server.call("DELETE", "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases/fimbria-operator")


def endpoint(name: str, number: int, identity: int = 300) -> dict[str, Any]:
    networking = {"addressing": [{"ipv4": f"10.1.{number // 250}.{number % 250 + 1}"}], "node": "172.31.0.1"}
    return {
        "apiVersion": "cilium.io/v2", "kind": "CiliumEndpoint", "metadata": {"name": name},
        "status": {"id": number + 1, "state": "ready", "identity": {"id": identity}, "networking": networking},
    }  # fmt: skip


def report(server: Any, ns: str, name: str, number: int, identity: int = 300) -> None:
    server.post(CEPS.format(ns), endpoint(name, number, identity))


def batched(server: Any, ns: str) -> Counter[str]:
    """How often each endpoint of a namespace is in a slice, with its identity."""
    items = [s for s in server.get(SLICES)["items"] if s.get("namespace") == ns]
    return Counter(f"{e['name']}={e['id']}" for s in items for e in s["endpoints"])


def covers(server: Any) -> bool:
    return bool(server.call("GET", f"{SLICES}/{COVER}").code == 200)


def test_slices_hold_every_endpoint_once_and_survive_meddling(server: Any, operators: Operators, ns: str) -> None:
    for n in range(30):
        report(server, ns, f"before{n}", n)
    one = operators.start()
    server.eventually(lambda: covers(server), 60)
    wanted = {f"before{n}=300": 1 for n in range(30)}
    assert batched(server, ns) == wanted
    report(server, ns, "after", 99)
    wanted["after=300"] = 1
    server.eventually(lambda: batched(server, ns) == wanted)
    server.patch(f"{CEPS.format(ns)}/after", {"status": {"identity": {"id": 301}}})
    server.delete(f"{CEPS.format(ns)}/before0")
    del wanted["after=300"], wanted["before0=300"]
    wanted["after=301"] = 1
    server.eventually(lambda: batched(server, ns) == wanted)
    # Somebody deletes a slice, another one makes a slice of his own.
    mine = next(s for s in server.get(SLICES)["items"] if s.get("namespace") == ns)
    server.delete(f"{SLICES}/{mine['metadata']['name']}")
    entries = [{"name": "stranger", "id": 666, "networking": {"addressing": []}}, *mine["endpoints"][:3]]
    body = {"apiVersion": "cilium.io/v2alpha1", "kind": "CiliumEndpointSlice", "metadata": {"name": "foreign"}}
    server.post(SLICES, body | {"namespace": ns, "endpoints": entries})
    server.eventually(lambda: batched(server, ns) == wanted)
    server.delete(f"{SLICES}/{COVER}")
    server.eventually(lambda: covers(server))
    assert one.answer("/livez")[0] == one.answer("/readyz")[0] == 200
    server.eventually(lambda: one.value("fimbria_ces_slices") >= 1 and one.value("fimbria_ces_covered") == 1)
    # Another setting: the slice that agents go by is gone, and so are the others.
    one.process.terminate()
    assert one.process.wait(20) == 0
    operators.start("--no-endpoint-slices")
    server.eventually(lambda: not server.get(SLICES)["items"], 60)


def seconds_until(check: Callable[[], bool], within: float) -> float:
    began = time.monotonic()
    while not check():
        assert time.monotonic() - began < within, f"still not after {within} s"
        time.sleep(0.05)
    return time.monotonic() - began


def node(name: str) -> dict[str, Any]:
    return {"apiVersion": "cilium.io/v2", "kind": "CiliumNode", "metadata": {"name": name}, "spec": {}}


def blocks(server: Any) -> Counter[str]:
    found = [n.get("spec", {}).get("ipam", {}).get("podCIDRs", []) for n in server.get(NODES)["items"]]
    return Counter(block for cidrs in found for block in cidrs)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_the_next_leader_goes_on(server: Any, operators: Operators, ns: str, how: signal.Signals) -> None:
    """On an orderly end at once, else when the lease is over; nothing is given twice, nothing forgotten."""
    pair = [operators.start("--leader-elect") for _ in range(2)]
    server.eventually(lambda: sum(o.leading for o in pair) == 1 and covers(server), 60)
    first, second = sorted(pair, key=lambda o: not o.leading)
    for n in range(20):
        server.post(NODES, node(f"{ns}-a{n}"))
        report(server, ns, f"pod{n}", n)
    server.eventually(lambda: second.answer("/readyz")[0] == 200, 60)
    first.process.send_signal(how)
    for n in range(20, 40):
        server.post(NODES, node(f"{ns}-b{n}"))
        report(server, ns, f"pod{n}", n)
    took = seconds_until(lambda: second.leading, 60.0)
    print(f"{how.name}: {took:.1f} s without a leader")
    # Its end gives the lease up; else it lasts 15 s. The rest is for a busy machine.
    assert took < (12.0 if how is signal.SIGTERM else 40.0)
    wanted = {f"pod{n}=300": 1 for n in range(40)}
    server.eventually(lambda: batched(server, ns) == wanted, 30)
    server.eventually(lambda: len(blocks(server)) == 40, 30)
    assert set(blocks(server).values()) == {1}


def test_a_deposed_leader_stops(server: Any, operators: Operators, ns: str) -> None:
    """Stopped for longer than its lease, it finds on waking that another one leads, and writes nothing more."""
    pair = [operators.start("--leader-elect") for _ in range(2)]
    server.eventually(lambda: sum(o.leading for o in pair) == 1 and covers(server), 60)
    first, second = sorted(pair, key=lambda o: not o.leading)
    first.process.send_signal(signal.SIGSTOP)
    report(server, ns, "pod", 1)
    seconds_until(lambda: second.leading, 60.0)
    server.eventually(lambda: batched(server, ns) == {"pod=300": 1}, 30)
    first.process.send_signal(signal.SIGCONT)
    assert first.process.wait(60) == 1
    assert "lease" in first.log.read_text()
    assert batched(server, ns) == {"pod=300": 1}


def pod(name: str, **labels: str) -> dict[str, Any]:
    spec = {"containers": [{"name": "c", "image": "none"}]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels}, "spec": spec}


def identities(server: Any, ns: str) -> dict[str, dict[str, str]]:
    key = "k8s:io.kubernetes.pod.namespace"
    items = server.get(IDENTITIES)["items"]
    return {i["metadata"]["name"]: i["security-labels"] for i in items if i["security-labels"].get(key) == ns}


def test_the_operator_makes_identities_and_collects_them(server: Any, operators: Operators, ns: str) -> None:
    pods = f"/api/v1/namespaces/{ns}/pods"
    options = ("--identity-allocation", "operator", "--label-filter", "!build", "--identity-grace", "2")
    one = operators.start(*options, "--collect-interval", "1")
    for n in range(6):
        hashed = {"pod-template-hash": f"h{n}", "controller-revision-hash": "x", "apps.kubernetes.io/pod-index": str(n)}
        server.post(pods, pod(f"web{n}", app="web", build=str(n), **hashed))
    server.post(pods, pod("db", app="db"))
    server.eventually(lambda: len(identities(server, ns)) == 2, 60)
    found = identities(server, ns)
    assert sorted(labels["k8s:app"] for labels in found.values()) == ["db", "web"]
    assert all(key.startswith(("k8s:app", "k8s:io.")) for labels in found.values() for key in labels)
    time.sleep(5)
    assert identities(server, ns) == found, "what pods have is not collected, whether an agent has reported them or not"
    server.call("DELETE", f"{pods}/db", {"gracePeriodSeconds": 0})
    server.eventually(lambda: sorted(x["k8s:app"] for x in identities(server, ns).values()) == ["web"], 30)
    assert one.value("fimbria_gc_deletions_total") >= 1
    server.patch(f"/api/v1/namespaces/{ns}", {"metadata": {"labels": {"team": "red"}}})
    team = "k8s:io.cilium.k8s.namespace.labels.team"
    server.eventually(lambda: any(x.get(team) == "red" for x in identities(server, ns).values()), 30)


def test_reports_without_an_owner_are_removed_with_their_pod(server: Any, operators: Operators, ns: str) -> None:
    pods = f"/api/v1/namespaces/{ns}/pods"
    server.post(pods, pod("alive"))
    report(server, ns, "alive", 1)
    report(server, ns, "dead", 2)
    server.post(NODES, node(f"{ns}-gone"))
    operators.start("--collect-interval", "1")
    server.eventually(lambda: server.call("GET", f"{NODES}/{ns}-gone").code == 404, 60)
    server.eventually(lambda: [c["metadata"]["name"] for c in server.get(CEPS.format(ns))["items"]] == ["alive"], 60)
    time.sleep(3)
    assert server.call("GET", f"{CEPS.format(ns)}/alive").code == 200
