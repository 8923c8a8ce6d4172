"""Pods' lives under a real kubelet: what it does with them that a lab's runner doesn't."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Final, TypeVar

import pytest
from tests.cluster.bed import BedError, Cluster
from tests.cluster.images.recipes import recipes

pytestmark = pytest.mark.timeout(300)
NAMESPACE: Final = "fim-pods"
IMAGE: Final = recipes()["agnhost"].references[0]
PORT: Final = 8080
MANIFESTS: Final = "/etc/kubernetes/manifests"
T = TypeVar("T")


def listens(port: int) -> dict[str, Any]:
    """A probe. Without one a pod is Ready as soon as its process exists."""
    return {"tcpSocket": {"port": port}, "periodSeconds": 1}


def pod(name: str, node: str, *, labels: dict[str, str] | None = None, **spec: Any) -> dict[str, Any]:
    """A server that is Ready when it listens; `spec` is merged into the pod's."""
    arguments = ["netexec", f"--http-port={PORT}", f"--udp-port={PORT}"]
    container = {
        "name": "main", "image": IMAGE, "args": arguments, "imagePullPolicy": "Never", "readinessProbe": listens(PORT),
    }  # fmt: skip
    return {
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": NAMESPACE, "labels": labels or {"app": name}},
        "spec": {"nodeName": node, "terminationGracePeriodSeconds": 0, "containers": [container], **spec},
    }  # fmt: skip


class Pods:
    """One namespace of a cluster."""

    def __init__(self, cluster: Cluster, namespace: str = NAMESPACE) -> None:
        self.cluster = cluster
        self.namespace = namespace

    def apply(self, *objects: dict[str, Any]) -> None:
        listed = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        self.cluster.kubectl("apply", "-f", "-", stdin=json.dumps(listed))

    def delete(self, *names: str, kind: str = "pod") -> None:
        self.kubectl("delete", kind, *names, "--ignore-not-found", "--grace-period=0", "--force")

    def kubectl(self, *arguments: str, **more: Any) -> str:
        return self.cluster.kubectl("-n", self.namespace, *arguments, **more)

    def get(self, *arguments: str) -> Any:
        return self.cluster.get("-n", self.namespace, *arguments)

    def find(self, kind: str, name: str) -> dict[str, Any] | None:
        """None if there is no such object."""
        return next((i for i in self.get(kind)["items"] if i["metadata"]["name"] == name), None)

    def wait_ready(self, *names: str, seconds: int = 90) -> None:
        self.kubectl("wait", "--for=condition=Ready", *(f"pod/{n}" for n in names), f"--timeout={seconds}s")

    def addresses(self, name: str) -> list[str]:
        return [entry["ip"] for entry in self.get("pod", name)["status"].get("podIPs", [])]

    def gets_through(self, source: str, address: str, port: int = PORT, protocol: str = "tcp") -> bool:
        """Whether a pod reaches an address that it must reach: a second and a third SYN are no failure."""
        return self.reaches(source, address, port, protocol, seconds=4)

    def reaches(
        self, source: str, address: str, port: int = PORT, protocol: str = "tcp", *, seconds: int = 1
    ) -> bool:  # fmt: skip
        """Whether a pod gets through to an address within a time."""
        end = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        try:
            self.kubectl(
                "exec", source, "-c", "main", "--",
                "/agnhost", "connect", end, f"--timeout={seconds}s", f"--protocol={protocol}",
            )  # fmt: skip
        except BedError:
            return False
        return True

    def reported(self, name: str) -> set[str]:
        """The addresses in a pod's CiliumEndpoint."""
        found = self.find("ciliumendpoints.cilium.io", name)
        pairs = found["status"]["networking"]["addressing"] if found and "status" in found else []
        return {a for pair in pairs for a in pair.values()}


def until(what: str, condition: Callable[[], T], seconds: float = 60.0) -> T:
    """The first value of `condition` that is true."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.2)
    return value


@pytest.fixture(scope="module")
def pods(cluster: Cluster) -> Iterator[Pods]:
    made = Pods(cluster)
    cluster.kubectl("create", "namespace", NAMESPACE)
    try:
        until("its service account", lambda: made.get("serviceaccounts")["items"])
        made.apply(pod("near", "node1"), pod("far", "node2"))
        made.wait_ready("near", "far")
        yield made
    finally:
        cluster.kubectl("delete", "namespace", NAMESPACE, "--timeout=90s")


def sandbox(pods: Pods, node: str, name: str) -> str:
    """The id of a pod's sandbox, as its runtime has it."""
    listed = pods.cluster.node(node).exec(["ctr", "-n", "k8s.io", "containers", "ls", "-q"]).split()
    for one in listed:
        info = json.loads(pods.cluster.node(node).exec(["ctr", "-n", "k8s.io", "containers", "info", one]))
        labels = info.get("Labels") or {}
        if labels.get("io.cri-containerd.kind") == "sandbox" and labels.get("io.kubernetes.pod.name") == name:
            return one
    raise AssertionError(f"{node} has no sandbox of {name}")


def test_a_sandbox_made_anew(pods: Pods) -> None:
    """The pause process dies: kubelet makes another sandbox for the same pod. The report describes the new one, and
    nothing of the old one is left."""
    pods.apply(pod("broken", "node1"))
    pods.wait_ready("broken")
    before = set(pods.addresses("broken"))
    until("its report", lambda: pods.reported("broken") == before)
    old = sandbox(pods, "node1", "broken")
    pods.cluster.node("node1").exec(["ctr", "-n", "k8s.io", "task", "kill", "-s", "SIGKILL", old])
    began = time.monotonic()
    until("it has another address", lambda: set(pods.addresses("broken")).isdisjoint(before | {""}) and now(pods))
    pods.wait_ready("broken")
    print(f"sandbox anew: Ready again after {time.monotonic() - began:.1f} s")
    after = pods.addresses("broken")
    until("the report follows", lambda: pods.reported("broken") == set(after))
    report = pods.find("ciliumendpoints.cilium.io", "broken")
    assert report and report["status"]["external-identifiers"]["container-id"] != old
    assert all(pods.gets_through(s, a) for s in ("near", "far") for a in after)
    assert not any(pods.reaches("near", a) for a in before)
    pods.delete("broken")


def now(pods: Pods) -> list[str]:
    return pods.addresses("broken")


def test_a_static_pod(pods: Pods) -> None:
    """From a file on the node: kubelet gives it another uid than its mirror has, and starts it without asking."""
    manifest = pod("static", "node2", labels={"app": "static"})
    del manifest["spec"]["nodeName"]
    path = f"{MANIFESTS}/static.json"
    node = pods.cluster.node("node2")
    node.exec(["tee", path], stdin=json.dumps(manifest))
    try:
        until("its mirror", lambda: pods.find("pod", "static-node2"))
        pods.wait_ready("static-node2")
        mirror = pods.get("pod", "static-node2")["metadata"]
        assert mirror["annotations"]["kubernetes.io/config.mirror"] != mirror["uid"]
        report = until("its report", lambda: pods.find("ciliumendpoints.cilium.io", "static-node2"))
        assert report["metadata"]["ownerReferences"][0]["uid"] == mirror["uid"]
        until("its identity", lambda: identity(pods, "static-node2") > 255)
        labels = pods.find("ciliumendpoints.cilium.io", "static-node2")
        assert labels and "k8s:app=static" in labels["status"]["identity"]["labels"]
        assert all(pods.gets_through("near", a) for a in pods.addresses("static-node2"))
    finally:
        node.exec(["rm", "-f", path])
    until("it is gone", lambda: pods.find("pod", "static-node2") is None)


def identity(pods: Pods, name: str) -> int:
    """In a pod's report; 0 as long as it says none."""
    found = pods.find("ciliumendpoints.cilium.io", name) or {}
    return int(found.get("status", {}).get("identity", {}).get("id", 0))


def test_labels_of_running_pods_and_of_their_namespace(pods: Pods) -> None:
    """Policies follow them without a restart of anything."""
    pods.apply(pod("guarded", "node1"))
    pods.wait_ready("guarded")
    (address, *_) = pods.addresses("guarded")
    source = [{"podSelector": {"matchLabels": {"friend": "yes"}}}]
    other = [{"namespaceSelector": {"matchLabels": {"trusted": "yes"}}}]
    policy = {
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": "guarded", "namespace": NAMESPACE},
        "spec": {"podSelector": {"matchLabels": {"app": "guarded"}}, "ingress": [{"from": source + other}]},
    }  # fmt: skip
    pods.apply(policy)
    until("it is closed", lambda: not pods.reaches("far", address))
    try:
        pods.kubectl("label", "pod", "far", "friend=yes")
        until("a friend is let in", lambda: pods.reaches("far", address))
        pods.kubectl("label", "pod", "far", "friend-")
        until("and is none any more", lambda: not pods.reaches("far", address))
        pods.cluster.kubectl("label", "namespace", NAMESPACE, "trusted=yes")
        until("the whole namespace is let in", lambda: pods.reaches("far", address) and pods.reaches("near", address))
        pods.cluster.kubectl("label", "namespace", NAMESPACE, "trusted-")
        until("and out", lambda: not pods.reaches("far", address) and not pods.reaches("near", address))
    finally:
        pods.kubectl("delete", "networkpolicy", "guarded")
        pods.delete("guarded")


def test_host_ports(pods: Pods) -> None:
    """TCP and UDP, both families, one address alone; a second pod waits until the first goes. The scheduler sees to it,
    and kubelet refuses who comes past it."""
    inside = pods.cluster.get("node", "node1")["status"]["addresses"]
    nodes = [a["address"] for a in inside if a["type"] == "InternalIP"]
    ports = [
        {"containerPort": PORT, "hostPort": 8199, "protocol": "TCP"},
        {"containerPort": PORT, "hostPort": 8199, "protocol": "UDP"},
        {"containerPort": PORT, "hostPort": 8198, "protocol": "TCP", "hostIP": nodes[0]},
    ]
    first, second = (with_ports(pod(n, "node1"), ports) for n in ("holder", "waiter"))
    del second["spec"]["nodeName"]
    second["spec"]["nodeSelector"] = on("node1")
    pods.apply(first)
    pods.wait_ready("holder")
    for address in nodes:
        assert pods.gets_through("far", address, 8199) and pods.gets_through("near", address, 8199)
        assert pods.gets_through("far", address, 8199, "udp")
    assert pods.gets_through("far", nodes[0], 8198) and not pods.reaches("far", nodes[1], 8198)
    pods.apply(second)
    until("an event says why", lambda: events(pods, "waiter", "free ports"))
    pods.delete("holder")
    pods.wait_ready("waiter")
    assert all(pods.gets_through("far", address, 8199) for address in nodes)
    pods.delete("waiter")
    until("the port is free", lambda: not pods.reaches("far", nodes[0], 8199))


def with_ports(made: dict[str, Any], ports: list[dict[str, Any]]) -> dict[str, Any]:
    made["spec"]["containers"][0]["ports"] = ports
    return made


def events(pods: Pods, name: str, text: str) -> str:
    """The first message of an event of a pod that contains a text."""
    items = pods.get("events", "--field-selector", f"involvedObject.name={name}")["items"]
    return next((i["message"] for i in items if text in i["message"]), "")


def test_init_containers_and_restarts(pods: Pods) -> None:
    """The network is there before the first init container runs, and stays the same while containers come and go."""
    target = pods.addresses("far")[0]
    asks = {
        "name": "asks", "image": IMAGE, "imagePullPolicy": "Never",
        "command": ["/agnhost", "connect", f"{target}:{PORT}", "--timeout=5s"],
    }  # fmt: skip
    made = pod("phased", "node1", initContainers=[asks], restartPolicy="Always")
    pods.apply(made)
    pods.wait_ready("phased")
    status = pods.get("pod", "phased")["status"]
    assert status["initContainerStatuses"][0]["restartCount"] == 0, status
    before = pods.addresses("phased")
    until("its identity", lambda: identity(pods, "phased") > 255)
    number = identity(pods, "phased")
    with suppress(BedError):  # it may be taken along by what it kills
        pods.kubectl("exec", "phased", "-c", "main", "--", "sh", "-c", "kill -9 1; kill 1", seconds=20)
    until("it was restarted", lambda: restarts(pods, "phased") == 1)
    pods.wait_ready("phased")
    assert pods.addresses("phased") == before and identity(pods, "phased") == number
    assert all(pods.gets_through("far", a) for a in before)
    pods.delete("phased")


def restarts(pods: Pods, name: str) -> int:
    statuses = pods.get("pod", name)["status"]["containerStatuses"]
    return int(statuses[0]["restartCount"])


def test_a_terminating_pod_keeps_its_network(pods: Pods) -> None:
    """Until its containers are gone; then nothing is left of it."""
    made = pod("leaving", "node1", terminationGracePeriodSeconds=60)
    stays = ["sh", "-c", "until [ -e /tmp/go ]; do sleep 0.2; done"]
    made["spec"]["containers"][0]["lifecycle"] = {"preStop": {"exec": {"command": stays}}}
    pods.apply(made)
    pods.wait_ready("leaving")
    (address, *_) = pods.addresses("leaving")
    pods.kubectl("delete", "pod", "leaving", "--wait=false")
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        assert pods.gets_through("far", address) and pods.gets_through("leaving", pods.addresses("far")[0])
    pods.kubectl("exec", "leaving", "-c", "main", "--", "touch", "/tmp/go")
    until("it is gone", lambda: pods.find("pod", "leaving") is None)
    until("its report is gone", lambda: pods.find("ciliumendpoints.cilium.io", "leaving") is None)
    assert not pods.reaches("far", address)


def test_deleted_by_force(pods: Pods) -> None:
    """The object goes at once, the containers when kubelet gets to it: the name can be used again meanwhile."""
    pods.apply(pod("forced", "node1", terminationGracePeriodSeconds=30))
    pods.wait_ready("forced")
    before = pods.addresses("forced")
    pods.delete("forced")
    pods.apply(pod("forced", "node2"))
    pods.wait_ready("forced")
    after = pods.addresses("forced")
    assert set(after).isdisjoint(before)
    until("the report is the new one's", lambda: pods.reported("forced") == set(after))
    until("the old one is gone", lambda: not any(pods.reaches("near", a) for a in before))
    time.sleep(1)
    assert pods.reported("forced") == set(after), "nor does what is cleaned up late take the new one's report away"
    pods.delete("forced")


def test_a_stateful_set_on_the_move(pods: Pods) -> None:
    """web-0 goes from node to node and keeps its name; its report follows each time."""
    template = pod("x", "")["spec"] | {"nodeName": None}
    del template["nodeName"]
    spec = {
        "replicas": 1, "serviceName": "web", "selector": {"matchLabels": {"app": "web"}},
        "template": {"metadata": {"labels": {"app": "web"}}, "spec": template | {"nodeSelector": on("node1")}},
    }  # fmt: skip
    made = {"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": {"name": "web", "namespace": NAMESPACE}}
    pods.apply(made | {"spec": spec})
    for node in ("node1", "node2", "node1"):
        patch = json.dumps({"spec": {"template": {"spec": {"nodeSelector": on(node)}}}})
        pods.kubectl("patch", "statefulset", "web", "--type=merge", "-p", patch)
        until(f"it is on {node}", lambda n=node: on_node(pods, "web-0") == n)  # type: ignore[misc]
        pods.wait_ready("web-0")
        addresses = set(pods.addresses("web-0"))
        until("its report", lambda a=addresses: pods.reported("web-0") == a)  # type: ignore[misc]
        assert all(pods.gets_through(s, a) for s in ("near", "far") for a in addresses)
    pods.kubectl("delete", "statefulset", "web")


def on(node: str) -> dict[str, str]:
    return {"kubernetes.io/hostname": node}


def on_node(pods: Pods, name: str) -> str:
    found = pods.find("pod", name)
    return str(found["spec"].get("nodeName", "")) if found else ""


def test_a_readiness_gate(pods: Pods) -> None:
    """Somebody else decides when a pod is Ready: until then its Service doesn't lead to it."""
    pods.apply(pod("gated", "node2", readinessGates=[{"conditionType": "example.com/gate"}]))
    service = {
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "gated", "namespace": NAMESPACE},
        "spec": {"selector": {"app": "gated"}, "ports": [{"port": 80, "targetPort": PORT}]},
    }  # fmt: skip
    pods.apply(service)
    address = pods.get("service", "gated")["spec"]["clusterIP"]
    until("it runs", lambda: pods.addresses("gated"))
    until("it answers itself", lambda: pods.reaches("near", pods.addresses("gated")[0]))
    assert not pods.reaches("near", address, 80)
    gate = {"type": "example.com/gate", "status": "True"}
    patch = json.dumps({"status": {"conditions": [gate]}})
    pods.kubectl("patch", "pod", "gated", "--subresource=status", "--type=strategic", "-p", patch)
    until("the Service leads to it", lambda: pods.reaches("near", address, 80))
    pods.delete("gated")
    pods.kubectl("delete", "service", "gated")


def test_a_pod_in_the_nodes_network(pods: Pods) -> None:
    """It has its node's identity and no report; a Service leads to it, as a node port does from outside."""
    arguments = ["netexec", "--http-port=8197", "--udp-port=-1"]
    made = pod("hosted", "node2", hostNetwork=True)
    made["spec"]["containers"][0] |= {"args": arguments, "readinessProbe": listens(8197)}
    service = {
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "hosted", "namespace": NAMESPACE},
        "spec": {"type": "NodePort", "selector": {"app": "hosted"}, "ports": [{"port": 80, "targetPort": 8197}]},
    }  # fmt: skip
    pods.apply(made, service)
    pods.wait_ready("hosted")
    spec = pods.get("service", "hosted")["spec"]
    port = spec["ports"][0]["nodePort"]
    for source in ("near", "far"):
        until("by its Service", lambda s=source: pods.reaches(s, spec["clusterIP"], 80))  # type: ignore[misc]
    for node in ("10.99.0.11", "10.99.0.12"):
        answer = pods.cluster.world(["curl", "-sS", "-m", "10", f"http://{node}:{port}/hostname"])
        assert answer.strip() == "node2", (node, answer)
    assert pods.find("ciliumendpoints.cilium.io", "hosted") is None
    pods.delete("hosted")
    pods.kubectl("delete", "service", "hosted")


def test_a_namespace_with_all_its_pods(cluster: Cluster, pods: Pods) -> None:
    """Nothing of them is left, here or on the nodes."""
    cluster.kubectl("create", "namespace", "fim-pods-gone")
    other = Pods(cluster, "fim-pods-gone")
    until("its service account", lambda: other.get("serviceaccounts")["items"])
    made = [pod(f"gone{n}", f"node{n % 2 + 1}") for n in range(6)]
    for one in made:
        one["metadata"]["namespace"] = other.namespace
    other.apply(*made)
    other.wait_ready(*(m["metadata"]["name"] for m in made))
    addresses = [a for m in made for a in other.addresses(m["metadata"]["name"])]
    began = time.monotonic()
    cluster.kubectl("delete", "namespace", other.namespace, "--timeout=90s", seconds=100)
    print(f"namespace with 6 pods gone after {time.monotonic() - began:.1f} s")
    reports = cluster.get("ciliumendpoints.cilium.io", "-A")["items"]
    assert not [r for r in reports if r["metadata"]["namespace"] == other.namespace]
    # Without a grace period their objects go at once, and the containers when kubelet gets to it.
    until("nobody answers any more", lambda: not any(pods.reaches("near", a) for a in addresses[:2]))
