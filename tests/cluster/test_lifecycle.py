"""Nodes' lives on a real cluster: join, drain, reboot, another address, removal, and an API server that is away."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address
from typing import Any, Final, TypeVar

import pytest
from tests.cluster.bed import BedError, Cluster
from tests.cluster.bed.handle import Node
from tests.cluster.bed.install import NAMESPACE as SYSTEM
from tests.cluster.bed.install import unready
from tests.cluster.bed.layout import addresses as bed_addresses
from tests.cluster.images.recipes import recipes

pytestmark = [pytest.mark.timeout(400), pytest.mark.long]
NAMESPACE: Final = "fim-nodes"
IMAGE: Final = recipes()["agnhost"].references[0]
PORT: Final = 8080
AWAY: Final = 600.0  # seconds without an API server
T = TypeVar("T")


def until(what: str, condition: Callable[[], T], seconds: float = 90.0) -> T:
    """The first value of `condition` that is true; a cluster that doesn't answer for a moment is asked again."""
    deadline = time.monotonic() + seconds
    while True:
        with suppress(BedError):
            value = condition()
            if value:
                return value
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.2)


def server(name: str, node: str) -> dict[str, Any]:
    container = {
        "name": "main", "image": IMAGE, "args": ["netexec", f"--http-port={PORT}"], "imagePullPolicy": "Never",
        "ports": [{"containerPort": PORT}],
    }  # fmt: skip
    return {
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": NAMESPACE, "labels": {"app": "server"}},
        "spec": {
            "nodeName": node, "terminationGracePeriodSeconds": 0, "containers": [container],
            "tolerations": [{"operator": "Exists"}],
        },
    }  # fmt: skip


class Place:
    """One namespace, with a server on each node and clients in them."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def apply(self, *objects: dict[str, Any]) -> None:
        listed = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        self.cluster.kubectl("apply", "-f", "-", stdin=json.dumps(listed))

    def kubectl(self, *arguments: str, **more: Any) -> str:
        return self.cluster.kubectl("-n", NAMESPACE, *arguments, **more)

    def get(self, *arguments: str) -> Any:
        return self.cluster.get("-n", NAMESPACE, *arguments)

    def addresses(self, name: str) -> list[str]:
        return [entry["ip"] for entry in self.get("pod", name)["status"].get("podIPs", [])]

    def wait_ready(self, *names: str) -> None:
        self.kubectl("wait", "--for=condition=Ready", *(f"pod/{n}" for n in names), "--timeout=120s", seconds=130)

    def reaches(self, source: str, address: str, port: int = PORT) -> bool:
        """From inside a pod, by the kubelet of its node."""
        end = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        try:
            self.kubectl("exec", source, "--", "/agnhost", "connect", end, "--timeout=1s")
        except BedError:
            return False
        return True

    def answers(self, node: str, netns: str, address: str) -> bool:
        """From inside a pod, without the API server: in its network namespace on a node."""
        url = f"http://[{address}]:{PORT}/hostname" if ":" in address else f"http://{address}:{PORT}/hostname"
        command = ["nsenter", f"--net={netns}", "curl", "-sS", "-m", "5", url]
        try:
            return bool(self.cluster.node(node).exec(command).strip())
        except BedError:
            return False

    def namespace_of(self, node: str, address: str) -> str:
        """Path of the network namespace that has an address, on a node."""
        script = 'for n in /run/netns/cni-*; do nsenter --net=$n ip -o addr | grep -qF " $1/" && echo $n && exit; done'
        return self.cluster.node(node).exec(["sh", "-c", script, "sh", address]).strip()


@pytest.fixture(scope="module")
def place(cluster: Cluster) -> Iterator[Place]:
    made = Place(cluster)
    cluster.kubectl("create", "namespace", NAMESPACE)
    try:
        until("its service account", lambda: made.get("serviceaccounts")["items"])
        made.apply(server("one", "node1"), server("two", "node2"))
        made.wait_ready("one", "two")
        yield made
    finally:
        cluster.kubectl("delete", "namespace", NAMESPACE, "--timeout=120s", seconds=130)


def cilium_node(cluster: Cluster, name: str) -> dict[str, Any] | None:
    found = cluster.get("ciliumnodes.cilium.io")["items"]
    return next((i for i in found if i["metadata"]["name"] == name), None)


def internal(cluster: Cluster, name: str) -> set[str]:
    node = cilium_node(cluster, name)
    return {a["ip"] for a in node["spec"].get("addresses", ()) if a["type"] == "InternalIP"} if node else set()


def agent_of(cluster: Cluster, node: str) -> dict[str, Any]:
    field = f"--field-selector=spec.nodeName={node}"
    found: list[dict[str, Any]] = cluster.get("-n", SYSTEM, "pods", "-l", "k8s-app=fimbria", field)["items"]
    return found[0]


@pytest.mark.timeout(AWAY + 400)
def test_the_api_server_is_away(place: Place) -> None:
    """Pods go on; kubelet makes a sandbox anew; when the server is back all converges."""
    cluster = place.cluster
    ones, twos = place.addresses("one"), place.addresses("two")
    inside = {"node1": place.namespace_of("node1", ones[0]), "node2": place.namespace_of("node2", twos[0])}
    assert all(inside.values())
    cluster.stop_api()
    try:
        began = time.monotonic()
        old = sandbox(cluster, "node2", "two")
        cluster.node("node2").exec(["ctr", "-n", "k8s.io", "task", "kill", "-s", "SIGKILL", old])
        failed = rounds = 0
        while time.monotonic() - began < AWAY:
            rounds += 1
            failed += not place.answers("node2", "/proc/1/ns/net", ones[0])  # the node to a pod of another
            failed += not place.answers("node1", inside["node1"], ones[0])
            time.sleep(0.5)
        assert rounds > 5 and failed == 0, (failed, rounds)
        new = until("a sandbox made anew without the API server", lambda: other_sandbox(cluster, "node2", "two", old))
    finally:
        cluster.start_api()
    back = time.monotonic()
    assert new != old
    until("the new address is known", lambda: set(place.addresses("two")) not in (set(), set(twos)))
    place.wait_ready("two")
    for address in place.addresses("two"):
        until("and reached", lambda a=address: place.reaches("one", a))  # type: ignore[misc]
    print(f"API server away for {AWAY:.0f} s: converged {time.monotonic() - back:.1f} s after it was back")
    until("nodes are Ready", lambda: not unready(cluster))


def sandbox(cluster: Cluster, node: str, name: str) -> str:
    """The id of a pod's sandbox that runs; empty if there is none."""
    tasks = cluster.node(node).exec(["ctr", "-n", "k8s.io", "task", "ls"]).splitlines()[1:]
    for one in (line.split()[0] for line in tasks if "RUNNING" in line):
        info = json.loads(cluster.node(node).exec(["ctr", "-n", "k8s.io", "containers", "info", one]))
        labels = info.get("Labels") or {}
        if labels.get("io.cri-containerd.kind") == "sandbox" and labels.get("io.kubernetes.pod.name") == name:
            return one
    return ""


def other_sandbox(cluster: Cluster, node: str, name: str, old: str) -> str:
    found = sandbox(cluster, node, name)
    return found if found != old else ""


def test_a_nodes_address_changes(place: Place) -> None:
    """Kubelet comes back with another address: the CiliumNode, the pods' reports and the other nodes follow."""
    cluster = place.cluster
    node = cluster.node("node2")
    before = bed_addresses("node2")
    after = replace(before, ipv4=IPv4Address("10.99.0.62"), ipv6=IPv6Address("fd00:10:99::62"))
    twos = place.addresses("two")
    for old, new in ((before, after), (after, before)):
        node.stop_kubelet()
        lines = [
            f"address del {old.ipv4}/24 dev eth0", f"address add {new.ipv4}/24 dev eth0",
            f"address add {new.ipv6}/64 dev eth0 nodad", f"address del {old.ipv6}/64 dev eth0",
        ]  # fmt: skip
        routes = [r for f in ("-4", "-6") for r in default_routes(cluster, "node2", f)]
        node.exec(["ip", "-batch", "-"], stdin="\n".join(lines) + "\n")
        for route in routes:
            node.exec(["ip", *route])
        node.host.start_kubelet(new)
        began = time.monotonic()
        until("the Node says so", lambda n=new: str(n.ipv4) in node_addresses(cluster, "node2"))  # type: ignore[misc]
        told = time.monotonic()
        wanted = {str(new.ipv4), str(new.ipv6)}
        until("the CiliumNode follows", lambda w=wanted: internal(cluster, "node2") == w)  # type: ignore[misc]
        for address in twos:
            until("its pods are reached", lambda a=address: place.reaches("one", a))  # type: ignore[misc]
        took = time.monotonic() - told
        print(f"{new.ipv4}: reported {told - began:.1f} s after kubelet's start, reached {took:.1f} s later")
        until("reports follow", lambda n=new: reported_node(place, "two") == str(n.ipv4))  # type: ignore[misc]
    until("nodes are Ready", lambda: not unready(cluster))
    assert place.addresses("two") == twos


def default_routes(cluster: Cluster, node: str, family: str) -> list[list[str]]:
    """`ip` arguments that make the default routes again that go with an address."""
    lines = cluster.node(node).exec(["ip", family, "route", "show", "default"]).splitlines()
    return [[family, "route", "replace", *line.split()[:5]] for line in lines if line.strip()]


def node_addresses(cluster: Cluster, node: str) -> list[str]:
    return [a["address"] for a in cluster.get("node", node)["status"]["addresses"]]


def reported_node(place: Place, name: str) -> str:
    return str(place.get("ciliumendpoints.cilium.io", name)["status"]["networking"]["node"])


def test_a_reboot(place: Place) -> None:
    """/run, /sys/fs/bpf and the network are as new: kubelet starts the pods again, each with an address of its own."""
    cluster = place.cluster
    made = [server(f"boot{n}", "node2") for n in range(5)]
    made[0]["spec"]["containers"][0]["ports"] = [{"containerPort": PORT, "hostPort": 8196}]
    names = [m["metadata"]["name"] for m in made]
    place.apply(*made)
    place.wait_ready(*names)
    node4 = str(bed_addresses("node2").ipv4)
    until("the host port answers", lambda: place.reaches("one", node4, 8196))
    node = cluster.node("node2")
    uids = {n: place.get("pod", n)["metadata"]["uid"] for n in names}
    node.stop()
    time.sleep(2)
    began = time.monotonic()
    node.start()
    until("the agent is Ready", lambda: kept_up(node) and back(agent_of(cluster, "node2")), 150)
    agent_took = time.monotonic() - began
    until("all pods are Ready, restarted", lambda: all(restarted(place, n) for n in (*names, "two")), 150)
    print(f"reboot: agent Ready after {agent_took:.1f} s, all pods after {time.monotonic() - began:.1f} s")
    assert {n: place.get("pod", n)["metadata"]["uid"] for n in names} == uids
    now = [a for n in (*names, "two") for a in place.addresses(n)]
    assert len(set(now)) == len(now)
    for name in (*names, "two"):
        until("its report", lambda n=name: reported(place, n) == set(place.addresses(n)))  # type: ignore[misc]
        for address in place.addresses(name):
            until("is reached", lambda a=address: place.reaches("one", a))  # type: ignore[misc]
    until("the host port answers", lambda: place.reaches("one", node4, 8196))
    until("nodes are Ready", lambda: not unready(cluster))
    place.kubectl("delete", "pod", *names, "--force", "--grace-period=0")


def kept_up(node: Node) -> bool:
    """Kubelet ends if containerd isn't ready for it; an init system would start it again."""
    try:
        node.host.check()
    except BedError:
        node.start_kubelet()
    return True


def back(pod: dict[str, Any]) -> bool:
    """Whether a pod is Ready with containers that were started again."""
    ready = next((c for c in pod["status"].get("conditions", ()) if c["type"] == "Ready"), None)
    statuses = pod["status"].get("containerStatuses") or ()
    return bool(ready and ready["status"] == "True" and statuses and all(s["restartCount"] for s in statuses))


def restarted(place: Place, name: str) -> bool:
    status = place.get("pod", name)["status"]
    ready = any(c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions", ()))
    return ready and all(s["restartCount"] for s in status["containerStatuses"])


def reported(place: Place, name: str) -> set[str]:
    found = place.get("ciliumendpoints.cilium.io", name)["status"]["networking"]["addressing"]
    return {a for pair in found for a in pair.values()}


def test_a_node_joins_is_drained_and_leaves(place: Place) -> None:
    """It takes pods when it really forwards; drained it has none; gone it leaves nothing; its name comes back."""
    cluster = place.cluster
    deployment = {
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "spread", "namespace": NAMESPACE},
        "spec": {
            "replicas": 1, "selector": {"matchLabels": {"app": "spread"}},
            "template": {"metadata": {"labels": {"app": "spread"}}, "spec": {
                "terminationGracePeriodSeconds": 0, "containers": server("x", "")["spec"]["containers"],
                "affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [
                    {"weight": 100, "preference": {"matchExpressions": [
                        {"key": "kubernetes.io/hostname", "operator": "In", "values": ["node3"]}]}}]}}}},
        },
    }  # fmt: skip
    try:
        for _ in range(2):
            began = time.monotonic()
            cluster.add_node()
            until("it takes pods", lambda: not unready(cluster), 150)
            print(f"node3 takes pods {time.monotonic() - began:.1f} s after its start")
            place.apply(deployment, server("three", "node3"))
            place.wait_ready("three")
            place.kubectl("rollout", "status", "deployment/spread", "--timeout=90s")
            for address in place.addresses("three"):
                assert place.reaches("one", address) and place.reaches("two", address)
            assert place_of(place, "spread") == "node3"
            cluster.kubectl(
                "drain", "node3", "--ignore-daemonsets", "--force", "--delete-emptydir-data", "--timeout=90s"
            )
            until("its pod is elsewhere", lambda: place_of(place, "spread") in ("node1", "node2"))
            cluster.kubectl("uncordon", "node3")
            place.kubectl("delete", "deployment", "spread")
            cluster.remove_node("node3")
            cluster.kubectl("delete", "node", "node3")
            until("its CiliumNode goes with it", lambda: cilium_node(cluster, "node3") is None)
            until("and the others forget it", lambda: not routes_to(cluster, "node1", "node3"))
    finally:
        with suppress(BedError):
            cluster.remove_node("node3")
        cluster.kubectl("delete", "node", "node3", "--ignore-not-found")
        place.kubectl("delete", "pod", "three", "--ignore-not-found", "--force", "--grace-period=0")
        place.kubectl("delete", "deployment", "spread", "--ignore-not-found")


def place_of(place: Place, app: str) -> str:
    """The node of the Ready pod of a Deployment of one."""
    for pod in place.get("pods", "-l", f"app={app}")["items"]:
        conditions = pod["status"].get("conditions", ())
        if any(c["type"] == "Ready" and c["status"] == "True" for c in conditions) and not pod["metadata"].get(
            "deletionTimestamp"
        ):
            return str(pod["spec"]["nodeName"])
    return ""


def routes_to(cluster: Cluster, node: str, other: str) -> list[str]:
    """What a node's agent knows of another node."""
    name = agent_of(cluster, node)["metadata"]["name"]
    text = cluster.kubectl("-n", SYSTEM, "exec", name, "-c", "agent", "--", "fimbria", "node", "list", "-o", "json")
    return [row["name"] for row in json.loads(text) if row["name"] == other]


def test_the_node_object_is_deleted_under_a_running_node(place: Place) -> None:
    """Its CiliumNode goes with it. When kubelet registers again both come back, with the blocks that pods have
    addresses of."""
    cluster = place.cluster
    node = cilium_node(cluster, "node2")
    assert node
    blocks = node["spec"]["ipam"]["podCIDRs"]
    cluster.kubectl("delete", "node", "node2")
    cluster.node("node2").stop_kubelet()
    cluster.node("node2").start_kubelet()
    until("its Node is there again", lambda: "node2" in [n["metadata"]["name"] for n in cluster.get("nodes")["items"]])
    uid = cluster.get("node", "node2")["metadata"]["uid"]
    until("its CiliumNode belongs to it", lambda: owner(cluster, "node2") == uid)
    again = cilium_node(cluster, "node2")
    assert again and again["spec"]["ipam"]["podCIDRs"] == blocks
    until("nodes are Ready", lambda: not unready(cluster), 150)
    place.kubectl("delete", "pod", "two", "--ignore-not-found", "--force", "--grace-period=0")
    place.apply(server("two", "node2"))
    place.wait_ready("two")
    for address in place.addresses("two"):
        until("is reached", lambda a=address: place.reaches("one", a))  # type: ignore[misc]


def owner(cluster: Cluster, name: str) -> str:
    node = cilium_node(cluster, name)
    owners = node["metadata"].get("ownerReferences", ()) if node else ()
    return str(owners[0]["uid"]) if owners else ""
