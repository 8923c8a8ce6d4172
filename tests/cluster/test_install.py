"""The chart on a real cluster: what its pods may do, whom the API server refuses, and that coming and going leaves
nobody without a network."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.cluster.bed import BedError, Cluster, processes
from tests.cluster.bed.install import CHART, NAMESPACE, RELEASE, wait_rollout
from tests.cluster.bed.layout import STARTUP_TAINT

from fimbria.sources.k8s.rows import NODE_ANNOTATION

AGNHOST = "registry.k8s.io/e2e-test-images/agnhost:2.63.0"
OURS, THEIRS, ASIDE = "05-fimbria.conflist", "10-ptp.conflist", "10-ptp.conflist.fimbria_bak"
PTP = {
    "cniVersion": "1.0.0",
    "name": "ptp",
    "plugins": [
        {
            "type": "ptp",
            "ipam": {
                "type": "host-local",
                "ranges": [[{"subnet": "10.200.0.0/24"}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        },
        {"type": "portmap", "capabilities": {"portMappings": True}},
    ],
}


def agents(cluster: Cluster) -> list[dict[str, Any]]:
    return list(cluster.get("-n", NAMESPACE, "pods", "-l", "k8s-app=fimbria")["items"])


def in_agent(cluster: Cluster, *command: str, container: str = "agent") -> str:
    return cluster.kubectl("-n", NAMESPACE, "exec", "daemonset/fimbria", "-c", container, "--", *command)


# --- rights -----------------------------------------------------------------------------------------------------------


def test_nothing_is_privileged(cluster: Cluster) -> None:
    """As the kernel has it: NET_ADMIN (12) and SYS_ADMIN (21) for the agent, BPF (39) for the observer."""
    for container, capabilities in (("agent", 1 << 12 | 1 << 21), ("observer", 1 << 39)):
        said = in_agent(cluster, "cat", "/proc/1/status", container=container)
        status = dict(line.split(":", 1) for line in said.splitlines())
        for kind in ("CapPrm", "CapEff", "CapBnd"):
            assert int(status[kind], 16) == capabilities, (container, kind)
        assert int(status["Seccomp"]) == 2, container
        assert int(status["NoNewPrivs"]) == 1, container
        with pytest.raises(BedError, match="Read-only file system"):
            in_agent(cluster, "touch", "/somewhere", container=container)
    operator = cluster.kubectl("-n", NAMESPACE, "exec", "deployment/fimbria-operator", "--", "cat", "/proc/1/status")
    status = dict(line.split(":", 1) for line in operator.splitlines())
    assert int(status["CapBnd"], 16) == 0 and status["Uid"].split() == ["65532"] * 4


def test_only_the_agent_has_a_token(cluster: Cluster) -> None:
    token = "/var/run/secrets/kubernetes.io/serviceaccount/token"
    assert in_agent(cluster, "cat", token).count(".") == 2
    with pytest.raises(BedError, match="No such file"):
        in_agent(cluster, "cat", token, container="observer")


@pytest.fixture
def as_agent(cluster: Cluster) -> Callable[..., str]:
    """kubectl with the token of node1's agent; nothing is written: only what admission says counts."""
    pod = next(p["metadata"]["name"] for p in agents(cluster) if p["spec"]["nodeName"] == "node1")
    bound = ("--bound-object-kind=Pod", f"--bound-object-name={pod}")
    token = cluster.kubectl("-n", NAMESPACE, "create", "token", "fimbria", *bound).strip()
    config = json.loads(cluster.kubectl("config", "view", "--raw", "-o", "json"))
    config["users"] = [{"name": config["users"][0]["name"], "user": {"token": token}}]
    path = cluster.layout.state / "home" / "agent.kubeconfig"
    path.touch(mode=0o600)
    path.write_text(json.dumps(config))

    def run(*words: str, stdin: str = "") -> str:
        return cluster.kubectl("--kubeconfig", str(path), *words, "--dry-run=server", stdin=stdin)

    return run


def patch(kind: str, name: str, change: dict[str, Any]) -> tuple[str, ...]:
    return ("patch", kind, name, "--type=merge", "--patch", json.dumps(change))


def test_an_agent_writes_its_own_node_only(as_agent: Callable[..., str]) -> None:
    address = {"spec": {"addresses": [{"type": "InternalIP", "ip": "10.99.0.66"}]}}
    assert "patched" in as_agent(*patch("ciliumnode", "node1", address))
    with pytest.raises(BedError, match="agent of node node1 may write its own CiliumNode only, not node2"):
        as_agent(*patch("ciliumnode", "node2", address))
    other = {"apiVersion": "cilium.io/v2", "kind": "CiliumNode", "metadata": {"name": "node9"}, "spec": {}}
    with pytest.raises(BedError, match="not node9"):
        as_agent("create", "-f", "-", stdin=json.dumps(other))
    with pytest.raises(BedError, match=r"may not change spec\.ipam"):
        as_agent(*patch("ciliumnode", "node1", {"spec": {"ipam": {"podCIDRs": ["10.244.77.0/24"]}}}))
    # As if somebody had deleted the object of a running node.
    mine = other | {"metadata": {"name": "node1"}, "spec": {"ipam": {"podCIDRs": ["10.99.0.0/24"]}}}
    with pytest.raises(BedError, match="may ask for blocks out of the pools only"):
        as_agent("create", "-f", "-", stdin=json.dumps(mine))


def test_an_agent_changes_no_identity(cluster: Cluster, as_agent: Callable[..., str]) -> None:
    name = cluster.get("ciliumidentities")["items"][0]["metadata"]["name"]
    assert "patched" in as_agent(*patch("ciliumidentity", name, {"metadata": {"annotations": {"a": "b"}}}))
    with pytest.raises(BedError, match="may neither change the labels"):
        as_agent(*patch("ciliumidentity", name, {"security-labels": {"k8s:app": "admin"}}))


def test_an_agent_names_no_other_owner(cluster: Cluster, as_agent: Callable[..., str]) -> None:
    """Kubernetes would delete the object, and it could be made anew with other labels or blocks."""
    owner = {"apiVersion": "v1", "kind": "Node", "name": "gone", "uid": "00000000-0000-0000-0000-000000000000"}
    name = cluster.get("ciliumidentities")["items"][0]["metadata"]["name"]
    for kind, which in (("ciliumidentity", name), ("ciliumnode", "node1")):
        with pytest.raises(BedError, match="may not change whose an object is"):
            as_agent(*patch(kind, which, {"metadata": {"ownerReferences": [owner]}}))
    made = {"apiVersion": "cilium.io/v2", "kind": "CiliumIdentity", "security-labels": {"k8s:app": "a"}}
    told = json.dumps(made | {"metadata": {"name": "65000"}})
    assert "created" in as_agent("create", "-f", "-", stdin=told)
    told = json.dumps(made | {"metadata": {"name": "65000", "ownerReferences": [owner]}})
    with pytest.raises(BedError, match="may not change whose an object is"):
        as_agent("create", "-f", "-", stdin=told)


@pytest.mark.usefixtures("reported_everywhere")
def test_an_agent_reports_pods_of_its_node_only(cluster: Cluster, as_agent: Callable[..., str]) -> None:
    by_node = {}
    for node in ("node1", "node2"):
        meta = cluster.get("ciliumendpoint", f"reported-{node}")["metadata"]
        assert meta["annotations"] == {NODE_ANNOTATION: node}, "every agent says which node it writes for"
        by_node[node] = meta
    identity = {"status": {"identity": {"id": 1}}}
    for node, meta in by_node.items():
        where = ("-n", meta["namespace"])
        for words in (patch("ciliumendpoint", meta["name"], identity), ("delete", "ciliumendpoint", meta["name"])):
            if node == "node1":
                as_agent(*where, *words)
                continue
            with pytest.raises(BedError, match=f"node node1 may write CiliumEndpoints of its own node only.*{node}"):
                as_agent(*where, *words)
    made = {"apiVersion": "cilium.io/v2", "kind": "CiliumEndpoint", "status": {}}
    for node, refused in (("node2", True), ("node1", False)):
        mark = {"metadata": {"name": "made-up", "namespace": "default", "annotations": {NODE_ANNOTATION: node}}}
        if refused:
            with pytest.raises(BedError, match="not made-up of node2"):
                as_agent("create", "-f", "-", stdin=json.dumps(made | mark))
        else:
            assert "created" in as_agent("create", "-f", "-", stdin=json.dumps(made | mark))


@pytest.mark.usefixtures("reported_everywhere")
def test_an_agent_is_believed_about_addresses_of_its_node_only(cluster: Cluster, as_agent: Callable[..., str]) -> None:
    """What the API server can't refuse: a new report, rightly marked, that gives another node's pod an identity."""
    address = cluster.get("pod", "reported-node2")["status"]["podIP"]
    status = {
        "identity": {"id": 299, "labels": ["k8s:forged=yes"]},
        "networking": {"addressing": [{"ipv4": address}], "node": "10.99.0.11"},
    }
    meta = {"name": "lie", "namespace": "default", "annotations": {NODE_ANNOTATION: "node1"}}
    lie = {"apiVersion": "cilium.io/v2", "kind": "CiliumEndpoint", "metadata": meta, "status": status}
    said = f"CiliumEndpoint default/lie is ignored: {address} is in no pod block of node node1"
    try:
        assert "created" in as_agent("create", "-f", "-", stdin=json.dumps(lie))
        cluster.kubectl("create", "-f", "-", stdin=json.dumps(lie))
        for pod in agents(cluster):
            name = pod["metadata"]["name"]

            def told(name: str = name) -> bool:
                return said in cluster.kubectl("-n", NAMESPACE, "logs", name, "-c", "agent", "--tail=200")

            processes.wait(f"{name} says so", told, 20, lambda: "")
            words = ("exec", name, "-c", "agent", "--", "fimbria", "ipcache", "get", address)
            known = cluster.kubectl("-n", NAMESPACE, *words)
            assert "299" not in known.split() and "reported-node2" in known, known
    finally:
        cluster.kubectl("delete", "ciliumendpoint", "lie", "--ignore-not-found")


@pytest.fixture
def reported_everywhere(cluster: Cluster) -> Iterator[None]:
    """A pod on each node."""
    nodes = ("node1", "node2")
    try:
        for node in nodes:
            start(cluster, f"reported-{node}", node)
            cluster.kubectl("wait", "--for=create", f"ciliumendpoint/reported-{node}", "--timeout=30s")
        yield
    finally:
        gone = ("--ignore-not-found", "--grace-period=1", "--timeout=60s")
        cluster.kubectl("delete", "pod", *(f"reported-{n}" for n in nodes), *gone)


# --- taint and values -------------------------------------------------------------------------------------------------


def test_a_node_that_forwards_loses_its_taint(cluster: Cluster) -> None:
    """A Node that was deleted comes back with it, for one."""
    others = {t["key"] for t in cluster.get("node", "node2")["spec"].get("taints", [])}
    cluster.kubectl("taint", "node", "node2", f"{STARTUP_TAINT}=:NoSchedule", "example.org/kept=yes:PreferNoSchedule")

    def keys() -> set[str]:
        return {t["key"] for t in cluster.get("node", "node2")["spec"].get("taints", [])}

    try:
        processes.wait("the taint goes", lambda: keys() == others | {"example.org/kept"}, 30, lambda: f": {keys()}")
    finally:
        cluster.kubectl("taint", "node", "node2", "example.org/kept-")
    conditions = {c["type"]: c for c in cluster.get("node", "node2")["status"]["conditions"]}
    assert conditions["NetworkUnavailable"]["status"] == "False"


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_node_without_a_ready_agent_gets_the_taint_again(cluster: Cluster) -> None:
    """A node that is away, and one that reboots: kubelet registers the taint only once."""

    def tainted() -> bool:
        return STARTUP_TAINT in {t["key"] for t in cluster.get("node", "node2")["spec"].get("taints", [])}

    assert not tainted()
    cluster.node("node2").stop_kubelet()
    try:
        # 40 s until Kubernetes notices, then the operator's minute.
        processes.wait("the taint is back", tainted, 240, lambda: "", pause=2.0)
    finally:
        cluster.node("node2").start_kubelet()
    processes.wait("the taint goes", lambda: not tainted(), 120, lambda: "", pause=1.0)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("tunelPort=8473", "additional properties 'tunelPort' not allowed"),
        ("routingMode=fast", "must be one of 'tunnel', 'native'"),
        ("extraConfig.policy-sets=0", "minimum: got 0, want 1"),
        ("operator.replicas=none", "got string, want integer"),
    ],
)
def test_a_bad_value_touches_nothing(cluster: Cluster, value: str, said: str) -> None:
    before = cluster.helm("history", RELEASE, "-n", NAMESPACE, "-o", "json")
    with pytest.raises(BedError, match=said):
        cluster.helm("upgrade", RELEASE, str(CHART), "-n", NAMESPACE, "--reset-then-reuse-values", "--set", value)
    assert cluster.helm("history", RELEASE, "-n", NAMESPACE, "-o", "json") == before


# --- coming and going -------------------------------------------------------------------------------------------------


def start(cluster: Cluster, name: str, node: str = "") -> str:
    """A pod that answers HTTP at port 8080, on a node if it is named; its address."""
    where = [f"--overrides={json.dumps({'spec': {'nodeName': node}})}"] if node else []
    cluster.kubectl("wait", "--for=create", "serviceaccount/default", "--timeout=60s")
    cluster.kubectl("run", name, f"--image={AGNHOST}", *where, "--", "netexec")
    cluster.kubectl("wait", "--for=condition=Ready", f"pod/{name}", "--timeout=90s")
    return str(cluster.get("pod", name)["status"]["podIP"])


def fetch(cluster: Cluster, source: str, address: str) -> str:
    """The name of the pod that answers."""
    return cluster.kubectl("exec", source, "--", "curl", "-s", "--max-time", "5", f"http://{address}:8080/hostname")


def configurations(cluster: Cluster) -> set[str]:
    return {n for n in cluster.node("node1").exec(["ls", "/etc/cni/net.d"]).split() if n != "cni.lock"}


def ready_since(cluster: Cluster) -> str:
    """When the node became Ready."""
    conditions = cluster.get("node", "node1")["status"]["conditions"]
    (found,) = [c for c in conditions if c["type"] == "Ready"]
    assert found["status"] == "True"
    return str(found["lastTransitionTime"])


@pytest.mark.long
@pytest.mark.timeout(900)
def test_from_another_plugin_and_back(make_cluster: Callable[[], Cluster]) -> None:
    cluster = make_cluster()
    cluster.up(nodes=1, taints=())
    cluster.node("node1").exec(["tee", f"/etc/cni/net.d/{THEIRS}"], stdin=json.dumps(PTP))
    processes.wait("node1 is Ready", lambda: bool(ready_since_or_none(cluster)), 60, lambda: "")
    old = start(cluster, "old")
    assert old.startswith("10.200.0.")
    since = ready_since(cluster)

    cluster.install_fimbria({"operator": {"replicas": 1}})
    assert configurations(cluster) == {OURS, ASIDE}
    assert ready_since(cluster) == since, "the node was without a network plugin for a moment"
    new = start(cluster, "new")
    assert new.startswith("10.244.")
    # Pods of the former plugin keep their interface and reach everybody, through the node's stack.
    assert fetch(cluster, "old", new) == "new"
    assert fetch(cluster, "new", old) == "old"
    assert fetch(cluster, "old", old) == "old"
    cluster.kubectl("delete", "pod", "old", "--grace-period=1", "--timeout=60s")

    # Gone again, without a trace, and the former plugin in force.
    cluster.helm(
        "upgrade", RELEASE, str(CHART), "-n", NAMESPACE, "--reset-then-reuse-values", "--set", "cleanup.enabled=true"
    )
    wait_rollout(cluster, "daemonset/fimbria")
    assert configurations(cluster) == {THEIRS}
    links = cluster.node("node1").exec(["ip", "-o", "link"])
    assert "fim" not in links, links
    assert cluster.node("node1").exec(["find", "/sys/fs/bpf", "-name", "fimbria"]) == ""
    assert ready_since(cluster) == since
    cluster.helm("uninstall", RELEASE, "-n", NAMESPACE, "--wait")
    assert start(cluster, "again").startswith("10.200.0.")
    cluster.kubectl("get", "ciliumidentities")  # definitions stay, and with them everybody's policies

    cluster.install_fimbria({"operator": {"replicas": 1}})
    assert start(cluster, "third").startswith("10.244.")


def ready_since_or_none(cluster: Cluster) -> str | None:
    try:
        return ready_since(cluster)
    except (AssertionError, KeyError, ValueError):
        return None
