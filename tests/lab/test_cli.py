"""The command line on the nodes of a running lab: every command, live flows, and the connectivity test."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import pytest
from traffic import starved

from fimbria.lab import components
from fimbria.lab.handle import Lab

APP = """
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec:
  nodeName: node1
  terminationGracePeriodSeconds: 1
  containers: [{name: main, image: fimbria/labtool, args: [serve, --http, "80"]}]
---
apiVersion: v1
kind: Pod
metadata: {name: other, namespace: shop, labels: {app: other}}
spec:
  nodeName: node2
  terminationGracePeriodSeconds: 1
  containers: [{name: main, image: fimbria/labtool, command: [labtool, sleep]}]
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: shop, labels: {app: client}}
spec:
  nodeName: node2
  terminationGracePeriodSeconds: 1
  containers: [{name: main, image: fimbria/labtool, command: [labtool, sleep]}]
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {selector: {app: web}, ports: [{port: 80, name: http}]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: only-clients, namespace: shop}
spec:
  podSelector: {matchLabels: {app: web}}
  ingress: [{from: [{podSelector: {matchLabels: {app: client}}}], ports: [{port: 80}]}]
"""
NAME = "fim-interrupted"
PYTHONPATH = {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}
SABOTEUR = """
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: saboteur}
spec:
  endpointSelector: {matchLabels: {fimbria.io/role: near}}
  ingressDeny: [{fromEndpoints: [{matchLabels: {fimbria.io/client: plain}}]}]
"""


def fimbria(lab: Lab, *args: str, node: str = "node1") -> "subprocess.CompletedProcess[str]":
    """As a user on the node would run it."""
    return lab.run(f"node/{node}", "fimbria", *args)


def answer(lab: Lab, *args: str) -> Any:
    done = fimbria(lab, *args, "-o", "json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def shop(agent_lab: Lab) -> Lab:
    agent_lab.apply(APP)
    agent_lab.wait_ready(["shop/web", "shop/other", "shop/client"])
    enforced = lambda: [e for e in answer(agent_lab, "endpoint", "list") if e["enforced_by"]["ingress"]]  # noqa: E731
    agent_lab.wait("the policy is known", enforced)
    return agent_lab


def test_status(shop: Lab) -> None:
    done = fimbria(shop, "status", "--wait", "--timeout", "30")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ready" in done.stdout
    value = answer(shop, "status")
    assert (value["node"], value["ready"], value["problems"]) == ("node1", True, [])
    assert value["observer"]["seen_flows"] >= 0


@pytest.mark.parametrize("kind", ["node", "endpoint", "identity", "ipcache", "service", "policy", "map"])
def test_lists(shop: Lab, kind: str) -> None:
    rows = answer(shop, kind, "list")
    assert rows
    for output in ("table", "wide"):
        done = fimbria(shop, kind, "list", "-o", output)
        assert done.returncode == 0
        assert len(done.stdout.splitlines()) == len(rows) + 1


def test_get_endpoint(shop: Lab) -> None:
    # The other node's pod gets into the set as soon as its CiliumEndpoint's identity is known here.
    row = shop.wait("an entry", lambda: (r := answer(shop, "endpoint", "get", "shop/web")) and r["entries"] and r)
    assert row["enforced_by"] == {"ingress": ["NetworkPolicy shop/only-clients"], "egress": []}
    (entry,) = row["entries"]
    assert (entry["direction"], entry["verdict"], entry["ports"]) == ("ingress", "allow", "TCP/80")
    assert "k8s:app=client" in entry["peer_is"]
    assert (entry["rule"]["name"], entry["rule"]["path"]) == ("only-clients", "ingress[0]")
    address = shop.addresses("shop/web")[0]
    assert "NetworkPolicy shop/only-clients" in fimbria(shop, "endpoint", "get", address).stdout


def test_get_by_address(shop: Lab) -> None:
    for address in shop.addresses("shop/other"):
        found = answer(shop, "ipcache", "get", address)
        assert "k8s:app=other" in found["answer"]["labels"]
        assert found["answer"]["claims"] == ["pod shop/other (its CiliumEndpoint)"]
        assert len(found["matches"]) == 2, "the pod's own prefix and the node's block"
    assert answer(shop, "ipcache", "get", "198.51.100.1")["answer"]["labels"] == ["reserved:world"]
    number = answer(shop, "ipcache", "get", shop.addresses("shop/other")[0])["answer"]["identity"]
    identity = answer(shop, "identity", "get", str(number))
    assert [p for p in identity["prefixes"] if p.partition("/")[0] in shop.addresses("shop/other")]


def test_get_service_policy_node(shop: Lab) -> None:
    service = answer(shop, "service", "get", "shop/web")
    assert service["frontends"][0]["backends"] == [f"{shop.addresses('shop/web')[0]}:80"]
    assert [(e["node"], e["state"], e["used"]) for e in service["endpoints"]] == [("node1", "active", True)]
    said = fimbria(shop, "service", "get", service["frontends"][0]["frontend"]).stdout
    assert "active" in said and "ClusterIP" in said
    policy = answer(shop, "policy", "get", "only-clients")
    assert policy["selects"] == ["shop/web"]
    assert policy["specs"][0]["rules"][0]["ports"] == ["TCP/80"]
    assert answer(shop, "node", "get", "node2")["name"] == "node2"


def test_every_map_can_be_dumped(shop: Lab) -> None:
    for row in answer(shop, "map", "list"):
        assert isinstance(answer(shop, "map", "dump", row["name"]), list), row["name"]
    assert shop.probe("shop/client", "http", shop.addresses("shop/web")[0], 80)["result"] == "ok"
    denied(shop)
    counted = {r["name"]: r["packets"] for r in answer(shop, "map", "dump", "metrics")}
    assert counted["POLICY_DENIED"] > 0
    assert counted["FORWARDED"] > 0
    prefixes = {r["key"]["prefix"] for r in answer(shop, "map", "dump", "ipcache")}
    assert f"{shop.addresses('shop/web')[0]}/32" in prefixes


def test_plan_sees_what_others_did(shop: Lab) -> None:
    """A route that looks like ours: the agent removes it at its next audit, plan says so now."""
    assert shop.wait("nothing to change", lambda: fimbria(shop, "plan").returncode == 0)
    made = shop.run("node/node1", "ip", "route", "add", "198.51.100.0/24", "dev", "fimbria_host", "proto", "241")
    assert made.returncode == 0, made.stderr
    done = fimbria(shop, "plan", "-o", "json")
    try:
        repaired = answer(shop, "status")["repaired"].get("routes", 0)
        seen = [c for c in json.loads(done.stdout) if c["key"] == "198.51.100.0/24"]
        assert (done.returncode == 3 and seen) or repaired
    finally:
        shop.run("node/node1", "ip", "route", "del", "198.51.100.0/24")


def test_metrics_after_a_drop(shop: Lab) -> None:
    assert shop.probe("shop/other", "http", shop.addresses("shop/web")[0], 80)["result"] == "timeout"
    text = fimbria(shop, "metrics").stdout
    line = next(ln for ln in text.splitlines() if ln.startswith("fimbria_drop_count_total{") and "POLICY_DENIED" in ln)
    assert float(line.rpartition(" ")[2]) >= 1


def test_version(shop: Lab) -> None:
    value = answer(shop, "version")
    assert (value["node"], value["agent"]) == ("node1", value["client"])


def test_no_agent_where_there_is_none(shop: Lab) -> None:
    done = shop.run("node/world", "env", "FIMBRIA_RUN_DIR=/nonexistent", "fimbria", "status")
    assert done.returncode == 2
    assert "No agent runs on this node: there is no socket /nonexistent/agent.sock." in done.stderr


class Monitor:
    """`fimbria monitor` on node1, with the lines that it prints."""

    def __init__(self, lab: Lab, *args: str) -> None:
        self._process = lab.start("node/node1", "fimbria", "monitor", *args)
        self.lines: Queue[str] = Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.put(line)

    def wait(self, text: str, patience: float) -> str:
        deadline = time.monotonic() + patience
        seen: list[str] = []
        while (left := deadline - time.monotonic()) > 0:
            try:
                line = self.lines.get(timeout=left)
            except Empty:
                break
            if text in line:
                return line
            seen.append(line)
        pytest.fail(f"no line with {text!r} within {patience} s, only {seen}")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(10)
        self._reader.join(10)
        assert self._process.stdout is not None
        self._process.stdout.close()


@pytest.fixture
def drops(shop: Lab) -> Iterator[Monitor]:
    monitor = Monitor(shop, "--verdict", "dropped", "--from-pod", "shop/other")
    followers = lambda: answer(shop, "status")["observer"]["followers"]  # noqa: E731
    shop.wait("monitor follows", followers)
    yield monitor
    monitor.close()


def denied(shop: Lab) -> None:
    address = shop.addresses("shop/web")[0]
    assert shop.probe("shop/other", "http", address, 80, "--timeout", "300")["result"] == "timeout"


def test_monitor_shows_a_drop_with_the_policy_at_once(shop: Lab, drops: Monitor) -> None:
    before = starved(shop)
    denied(shop)
    began = time.monotonic()
    line = drops.wait("POLICY_DENIED", 30.0)
    assert time.monotonic() - began - max(starved(shop) - before, 0.0) < 2.0
    assert "shop/other" in line
    assert "-> shop/web:80" in line
    assert "NetworkPolicy shop/only-clients" in line


def test_monitor_survives_the_observer(shop: Lab, drops: Monitor) -> None:
    denied(shop)
    drops.wait("POLICY_DENIED", 30.0)
    shop.kill("node1/observer")
    drops.wait("the observer went away", 30.0)
    denied(shop)  # what happens meanwhile isn't lost: it waits in the ring buffer
    shop.restart("node1/observer")
    drops.wait("the observer is back", 60.0)
    drops.wait("only-clients", 30.0)


def test_monitor_remembers(shop: Lab) -> None:
    denied(shop)
    shop.wait("the drop is remembered", lambda: "only-clients" in past(shop, "--policy", "shop/only-clients"))
    for line in past(shop, "--to-port", "80", "-o", "json").splitlines():
        flow = json.loads(line)
        assert flow["l4"]["TCP"]["destination_port"] == 80
    assert past(shop, "--policy", "no-such-policy") == ""
    assert fimbria(shop, "monitor", "--ip", "nonsense").returncode == 1


def past(lab: Lab, *args: str) -> str:
    done = fimbria(lab, "monitor", "--no-follow", "--last", "50", *args)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_sysdump_of_a_node(shop: Lab) -> None:
    """Alone, without the API."""
    denied(shop)
    done = fimbria(shop, "sysdump", "--local", "-o", "/run/fimbria-test.zip")
    try:
        assert done.returncode == 0, done.stderr
        listed = shop.run("node/node1", "python3", "-m", "zipfile", "-l", "/run/fimbria-test.zip").stdout
    finally:
        shop.run("node/node1", "rm", "-f", "/run/fimbria-test.zip")
    for name in (
        "README.md",
        "status.json",
        "maps/policy_sets.json",
        "endpoints/",
        "flows/dropped.ndjson",
        "errors.json",
    ):
        assert name in listed


def test_sysdump_of_a_lab(shop: Lab, tmp_path: Path) -> None:
    """From the machine: every node is asked, and the objects are there."""
    denied(shop)
    process = subprocess.run(
        [sys.executable, "-m", "fimbria.cli.main", "sysdump", "--lab", shop.spec.name, "-o", str(tmp_path / "lab.zip")],
        capture_output=True, text=True, check=False, env=components.ENVIRONMENT | PYTHONPATH,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    with zipfile.ZipFile(tmp_path / "lab.zip") as package:
        found = {n.partition("/")[2]: package.read(n) for n in package.namelist()}
    for node in shop.spec.node_names:
        assert json.loads(found[f"nodes/{node}/status.json"])["node"] == node
        assert found[f"nodes/{node}/logs/agent.log"]
    assert b"only-clients" in found["kubernetes/networkpolicies.networking.k8s.io.json"]
    assert b"only-clients" in found["nodes/node1/flows/dropped.ndjson"]
    assert "POLICY_DENIED" in found["README.md"].decode()
    assert json.loads(found["errors.json"]) == {}
    assert os.listdir(tmp_path) == ["lab.zip"]


def test_map_dump_of_as_many_rows(shop: Lab) -> None:
    assert shop.probe("shop/client", "http", shop.addresses("shop/web")[0], 80)["result"] == "ok"
    for name in ("conntrack", "ipcache", "frontends", "policy_sets"):
        whole = answer(shop, "map", "dump", name)
        assert whole, name
        assert len(whole) > 1 or name in ("conntrack", "policy_sets")
        assert len(answer(shop, "map", "dump", name, "--most", "1")) == 1


# --- connectivity test ---------------------------------------------------------------------------------------------


def connectivity(lab: Lab, *args: str) -> list[str]:
    return ["fimbria", "connectivity", "test", "--kubeconfig", str(lab.paths.kubeconfig), "--timeout", "60", *args]


def namespaces(lab: Lab) -> set[str]:
    return {n["metadata"]["name"] for n in lab.request("GET", "/api/v1/namespaces")["items"]}


def test_connectivity_passes(shop: Lab) -> None:
    before = namespaces(shop)
    outside = shop.start("node/world", "labtool", "serve", "--http", "8042")
    try:
        external = f"http://{shop.spec.world.ipv4}:8042"
        done = shop.run("node/node1", *connectivity(shop, "-o", "json", "--external", external))
    finally:
        outside.kill()
        outside.communicate(timeout=10)
    assert done.returncode == 0, done.stderr + done.stdout
    value = json.loads(done.stdout)
    assert value["failed"] == 0
    assert {r["family"] for r in value["results"]} == {4, 6}
    assert any(not r["allowed"] for r in value["results"])
    assert [r["check"] for r in value["results"] if r["target"] == external.removeprefix("http://")] == [
        "to the outside"
    ]
    assert "removing namespace" in done.stderr
    assert namespaces(shop) == before


def test_connectivity_fails_when_something_is_broken(shop: Lab) -> None:
    shop.apply(SABOTEUR)
    try:
        done = shop.run("node/node1", *connectivity(shop, "--no-policies"))
    finally:
        shop.delete(SABOTEUR)
    assert done.returncode == 1, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("✗")]
    assert rows
    behind = (" near ", " pair ", " sticky ")  # all that near is behind
    assert all(any(name in row for name in behind) for row in rows), "only what is broken"
    assert any("plain -> pod near" in row and "no connection (timeout), expected: connected" in row for row in rows)
    assert "didn't go as expected" in done.stdout


def test_connectivity_cleans_up_when_interrupted(shop: Lab) -> None:
    """From the machine, as its user would: the signal must reach the command itself."""
    config = str(shop.paths.host_kubeconfig)
    process = subprocess.Popen(
        [sys.executable, "-m", "fimbria.cli.main", "connectivity", "test", "--kubeconfig", config, "--namespace", NAME],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=components.ENVIRONMENT | PYTHONPATH,
    )
    try:
        shop.wait("it has begun", lambda: NAME in namespaces(shop))
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, output
    assert "what was created has been removed" in output
    assert NAME not in namespaces(shop)


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("--nodes", "node9"), "there is no node node9; there are node1, node2, node3"),
        (("--namespace", "shop"), "namespace shop exists already"),
    ],
)
def test_connectivity_that_cannot_be_run(shop: Lab, args: tuple[str, ...], text: str) -> None:
    done = shop.run("node/node1", *connectivity(shop, *args))
    assert done.returncode == 2
    assert text in done.stderr
    assert "shop" in namespaces(shop)
