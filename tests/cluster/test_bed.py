"""The bed itself: what it brings up is a Kubernetes whose parts reach each other, and nothing of it is left."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cluster.bed import BedError, Cluster, processes, verdict
from tests.cluster.bed.boot import KERNEL_VALUES
from tests.cluster.bed.install import merged
from tests.cluster.bed.layout import NODE_CGROUP2, REPOSITORY, Layout, addresses
from tests.cluster.bed.routes import routes_of
from tests.cluster.images.recipes import recipes

MakeCluster = Callable[[], Cluster]
SERVER = "bed-server"


# --- a running one ---


def test_nodes_have_addresses_of_both_families_and_take_pods(cluster: Cluster) -> None:
    for node in cluster.get("nodes")["items"]:
        at = addresses(node["metadata"]["name"])
        internal = [a["address"] for a in node["status"]["addresses"] if a["type"] == "InternalIP"]
        assert internal == [str(at.ipv4), str(at.ipv6)]

    def taints() -> list[str]:
        return [t["key"] for n in cluster.get("nodes")["items"] for t in n["spec"].get("taints", [])]

    # Every five seconds Kubernetes looks for nodes that are Ready and have the NoExecute taint of those that aren't.
    processes.wait("nodes without taints", lambda: not taints(), 30, lambda: f": {taints()}", pause=0.5)


def test_a_node_has_what_the_machine_has_only_once_for_itself(cluster: Cluster) -> None:
    one, other = (cluster.node(name) for name in cluster.nodes()[:2])
    for file in ("/proc/sys/kernel/random/boot_id", "/etc/machine-id", "/proc/sys/kernel/hostname"):
        assert len({one.exec(["cat", file]), other.exec(["cat", file]), Path(file).read_text()}) == 3
    for key in KERNEL_VALUES:
        before = Path("/proc/sys", key).read_text()
        one.exec(["tee", f"/proc/sys/{key}"], stdin="7\n")
        assert Path("/proc/sys", key).read_text() == before
        one.exec(["tee", f"/proc/sys/{key}"], stdin=KERNEL_VALUES[key])


def test_what_a_node_writes_stays_on_its_disk(cluster: Cluster) -> None:
    one, other = (cluster.node(name) for name in cluster.nodes()[:2])
    for folder in ("/etc", "/opt", "/var/lib", "/run", "/tmp"):
        path = f"{folder}/bed-{secrets.token_hex(4)}"
        one.exec(["touch", path])
        assert not Path(path).exists()
        with pytest.raises(BedError, match="No such file"):
            other.exec(["ls", path])
        one.exec(["rm", path])


def test_a_nodes_processes_are_in_its_part_of_the_cgroup_tree(cluster: Cluster) -> None:
    for name in cluster.nodes():
        # Pods go and come while it looks: what is gone meanwhile is no failure, and nobody asks for it below.
        look = f"find {NODE_CGROUP2} -name cgroup.procs -exec cat '{{}}' ';' || true"
        inside = cluster.node(name).exec(["sh", "-c", look])
        numbers = cluster.node(name).exec(["ps", "-eo", "pid=,comm="])
        kubelet = next(line.split()[0] for line in numbers.splitlines() if line.split()[1] == "kubelet")
        assert kubelet in inside.split()
        agent = next(line.split()[0] for line in numbers.splitlines() if line.split()[1].startswith("fimbria"))
        assert agent in inside.split()


@pytest.fixture
def server(cluster: Cluster, namespace: str) -> str:
    """A namespace with a pod that serves HTTP at 8080, and a node port for it."""
    image = recipes()["agnhost"].references[0]
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": SERVER, "labels": {"app": "bed"}},
        "spec": {
            "containers": [{"name": "server", "image": image, "args": ["netexec"]}],
            "terminationGracePeriodSeconds": 0,
        },
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": SERVER},
        "spec": {
            "type": "NodePort",
            "selector": {"app": "bed"},
            "ports": [{"port": 80, "targetPort": 8080}],
            "ipFamilyPolicy": "RequireDualStack",
        },
    }
    for manifest in (pod, service):
        cluster.kubectl("-n", namespace, "apply", "-f", "-", stdin=json.dumps(manifest))
    cluster.kubectl("-n", namespace, "wait", "--for=condition=Ready", f"pod/{SERVER}", "--timeout=60s")

    def known() -> bool:
        listed = cluster.get("-n", namespace, "endpoints")["items"]
        return any(part.get("addresses") for one in listed for part in one.get("subsets") or ())

    # The API server's proxy goes by these, and a controller writes them some time after the pod is Ready.
    processes.wait("endpoints", known, 60, lambda: "", pause=0.3)
    return namespace


def test_the_api_server_reaches_kubelets_pods_and_services(cluster: Cluster, server: str) -> None:
    assert cluster.kubectl("-n", server, "exec", SERVER, "--", "hostname").strip() == SERVER
    assert "Started HTTP server" in cluster.kubectl("-n", server, "logs", SERVER)
    for path in (f"pods/{SERVER}:8080", f"services/{SERVER}:80"):
        assert cluster.kubectl("get", "--raw", f"/api/v1/namespaces/{server}/{path}/proxy/hostname") == SERVER
    forward = [*cluster.enter("control"), "--", "kubectl", "-n", server, "port-forward", SERVER, "18080:8080"]
    with subprocess.Popen(forward, env=cluster.control_env, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout and "Forwarding" in process.stdout.readline()
            assert cluster.control(["curl", "-sf", "-m5", "http://127.0.0.1:18080/hostname"]) == SERVER
        finally:
            process.terminate()


def test_the_world_reaches_node_ports_of_both_families(cluster: Cluster, server: str) -> None:
    port = cluster.get("-n", server, f"service/{SERVER}")["spec"]["ports"][0]["nodePort"]
    for name in cluster.nodes():
        at = addresses(name)
        for host in (str(at.ipv4), f"[{at.ipv6}]"):
            # The pod may be Ready a moment before all nodes have heard of it: until then the port is refused.
            patient = ["--retry", "20", "--retry-connrefused", "--retry-delay", "1"]
            assert cluster.world(["curl", "-sf", "-m30", *patient, f"http://{host}:{port}/hostname"]) == SERVER


def test_a_second_up_changes_nothing(cluster: Cluster) -> None:
    def seen() -> dict[str, str]:
        pids = cluster.layout.state / "pids"
        return {p.name: p.read_text() for p in pids.iterdir()} | {
            name: cluster.node(name).exec(["cat", "/proc/sys/kernel/random/boot_id"]) for name in cluster.nodes()
        }

    before = seen()
    cluster.up(nodes=len(cluster.nodes()))
    assert seen() == before


# --- its life ---


@pytest.mark.long
def test_life_of_a_cluster(make_cluster: MakeCluster) -> None:
    """Its parts stop and start, and its end leaves nothing."""
    cluster = make_cluster()
    cluster.up(nodes=1)
    node = cluster.node("node1")
    boot = node.exec(["cat", "/proc/sys/kernel/random/boot_id"])
    node.exec(["touch", "/var/lib/kept"])
    node.stop()
    with pytest.raises(BedError, match="isn't running"):
        node.exec(["true"])
    node.start()
    assert node.exec(["cat", "/proc/sys/kernel/random/boot_id"]) != boot
    node.exec(["ls", "/var/lib/kept"])

    cluster.stop_api()
    with pytest.raises(BedError, match="refused"):
        cluster.kubectl("get", "nodes")
    cluster.start_api()
    assert [n["metadata"]["name"] for n in cluster.get("nodes")["items"]] == ["node1"]

    assert cluster.add_node().name == "node2"
    cluster.remove_node("node2")
    assert cluster.nodes() == ["node1"]

    cluster.down()
    assert cluster.remains() == []
    cluster.down()
    assert cluster.remains() == []


@pytest.mark.long
@pytest.mark.parametrize("seconds", [0.6, 1.5, 3.0, 6.0])
def test_up_killed_in_the_middle(make_cluster: MakeCluster, seconds: float) -> None:
    """Whatever is there by then, `up` goes on from it, and `down` removes it."""
    cluster = make_cluster()
    command = [sys.executable, "-m", "tests.cluster.bed", "--name", cluster.name, "up", "--nodes", "1"]
    for finish in (cluster.down, lambda: cluster.up(nodes=1)):
        with subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True, stderr=subprocess.DEVNULL) as process:
            time.sleep(seconds)
            os.killpg(process.pid, signal.SIGKILL)
        finish()
        names = cluster.get("nodes")["items"] if finish != cluster.down else []
        assert len(names) == (finish != cluster.down)
    cluster.down()
    assert cluster.remains() == []


def test_a_cluster_that_never_was(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    cluster.down()
    assert cluster.remains() == [] and not cluster.installed() and cluster.nodes() == []
    with pytest.raises(BedError, match="there is no cluster"):
        cluster.kubectl("get", "nodes")
    with pytest.raises(BedError, match="has no node7"):
        cluster.node("node7")


# --- its arithmetic ---


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a/b", "a" * 25, "..", "a b"])
def test_names_that_cant_be(name: str) -> None:
    with pytest.raises(BedError, match="can't be a cluster's name"):
        Layout(name)


def test_a_cluster_owns_its_namespaces_and_no_others() -> None:
    mine = Layout("a")
    assert all(mine.owns_netns(f"fimk-a-{member}") for member in ("control", "world", "node1", "node12"))
    assert not any(mine.owns_netns(n) for n in ("fimk-a-b-control", "fimk-ab-node1", "fimk-a-nodes", "fimk-b-node1"))


def test_routes_lead_over_the_address_of_the_same_family() -> None:
    node = {
        "spec": {
            "addresses": [{"type": "InternalIP", "ip": "10.99.0.11"}, {"type": "InternalIP", "ip": "fd00:10:99::11"}],
            "ipam": {"podCIDRs": ["10.244.3.0/24", "fd00:10:244:3::/64", "rubbish"]},
        }
    }
    assert routes_of(node) == {"10.244.3.0/24": "10.99.0.11", "fd00:10:244:3::/64": "fd00:10:99::11"}
    assert routes_of({}) == {}


def test_values_are_merged_as_helm_does() -> None:
    assert merged({"a": {"b": 1, "c": [1]}, "d": 2}, {"a": {"c": [2]}, "d": {"e": 3}}) == {
        "a": {"b": 1, "c": [2]},
        "d": {"e": 3},
    }


def test_the_verdict_counts_by_file() -> None:
    report = """<testsuites><testsuite>
      <testcase classname="tests.cluster.test_a" name="x" time="1.5"/>
      <testcase classname="tests.cluster.test_a.TestIt" name="y" time="2"><failure message="no"/></testcase>
      <testcase classname="tests.cluster.test_b" name="z" time="0"><skipped/></testcase>
    </testsuite></testsuites>"""
    first, second = verdict.of_junit(report)
    assert first == verdict.Line("a", passed=1, failed=1, seconds=3.5)
    assert second == verdict.Line("b", skipped=1)
    assert verdict.table([first]).splitlines()[-1].split() == ["a", "1", "1", "0", "4"]
