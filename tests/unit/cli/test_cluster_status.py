"""`fimbria status` of a cluster: what is said of objects as an API server has them."""

from typing import Any

import click
import msgspec
import pytest

from fimbria.cli import cluster, cluster_status
from fimbria.cli.cluster import AgentPod, Installation, NodeRow, Workload, by_node, pod_trouble
from fimbria.cli.cluster_status import View, as_json, helm_release, problems

IMAGE = "ghcr.io/fimbria/fimbria:0.1.0"


def pod(node: str, *, ready: bool = True, image: str = IMAGE, **status: Any) -> AgentPod:
    state = {"name": "agent", "ready": ready, "restartCount": 0, "image": image, "state": {"running": {}}}
    conditions = [{"type": "Ready", "status": str(ready)}]
    containers = [{"name": name, "image": image} for name in ("agent", "observer")]
    return msgspec.convert(
        {
            "metadata": {"name": f"fimbria-{node}", "namespace": "kube-system"},
            "spec": {"nodeName": node, "containers": containers},
            "status": {"phase": "Running", "conditions": conditions, "containerStatuses": [state]} | status,
        },
        AgentPod,
    )  # fmt: skip


def waiting(reason: str, why: str = "", **last: Any) -> dict[str, Any]:
    state = {"name": "agent", "state": {"waiting": {"reason": reason, "message": why}}, "restartCount": 3}
    return {"containerStatuses": [state | ({"lastState": {"terminated": last}} if last else {})]}


def node(name: str, ready: str = "True", **spec: Any) -> NodeRow:
    conditions = [{"type": "Ready", "status": ready, "message": "kubelet says why"}]
    return msgspec.convert({"metadata": {"name": name}, "spec": spec, "status": {"conditions": conditions}}, NodeRow)


def workload(desired: int, **status: Any) -> Workload:
    spec = {"replicas": desired, "template": {"spec": {"containers": [{"image": IMAGE}]}}}
    labels = {"helm.sh/chart": "fimbria-0.1.0", "app.kubernetes.io/version": "0.1.0"}
    metadata = {"name": "fimbria", "labels": labels, "annotations": {"meta.helm.sh/release-name": "mine"}}
    return msgspec.convert({"metadata": metadata, "spec": spec, "status": status}, Workload)


def view(*agents: AgentPod, desired: int = 0, operators: int = 2, nodes: tuple[NodeRow, ...] = (), **more: Any) -> View:
    installation = Installation(
        "kube-system",
        workload(0, desiredNumberScheduled=desired or len(agents)),
        workload(2, readyReplicas=operators) if operators >= 0 else None,
        by_node(agents),
    )
    return View("https://x:6443", installation, nodes, **more)


def test_well() -> None:
    v = view(pod("a"), pod("b"), nodes=(node("a"), node("b")), leader="a_1")
    assert problems(v) == []
    value = as_json(v)
    assert (value["ready"], value["agents"]["ready"], value["operator"]["leader"]) == (True, 2, "a_1")
    assert helm_release(v.installation.agent) == "release mine, chart fimbria-0.1.0"


TAINTED = node("a", taints=[{"key": "node.cilium.io/agent-not-ready"}])
NO_IMAGE = waiting("ErrImagePull", "not found")
CRASHING = waiting("CrashLoopBackOff", "back-off 5m0s", exitCode=1, message="no BTF")


@pytest.mark.parametrize(
    ("v", "text"),
    [
        (
            view(pod("a", ready=False, **NO_IMAGE)),
            "node a: the agent isn't ready: container agent: ErrImagePull: not f",
        ),
        (view(pod("a", ready=False, **CRASHING)), "it keeps ending, with exit code 1, 3 times so far: no BTF"),
        (view(pod("a", ready=False), said={"a": ["no addresses"]}), "node a: the agent isn't ready: no addresses"),
        (view(pod("a", ready=False)), "container agent isn't ready yet"),
        (view(pod("a"), desired=3), "2 nodes of 3 have no agent yet"),
        (view(), "no node is to have an agent"),
        (view(pod("a"), operators=0), "no operator is ready, nodes get no pod addresses: it has no pods yet"),
        (view(pod("a"), operators=-1), "there is no operator"),
        (view(pod("a"), nodes=(node("a", "Unknown"),)), "node a isn't Ready: kubelet says why"),
        (view(pod("a"), nodes=(TAINTED,)), "node a takes no pods"),
        (view(pod("a"), pod("b", image="old:1")), "1 agent still runs another image (b)"),
    ],
)
def test_unwell(v: View, text: str) -> None:
    assert any(text in p for p in problems(v)), problems(v)
    assert as_json(v)["ready"] is False


def test_one_operator_of_two_suffices() -> None:
    assert problems(view(pod("a"), operators=1)) == []


def test_of_two_pods_on_a_node_the_one_that_stays_counts() -> None:
    leaving = msgspec.structs.replace(
        pod("a"),
        metadata=msgspec.structs.replace(pod("a").metadata, name="old", deletion_timestamp="2026-01-01T00:00:00Z"),
    )
    starting = pod("a", ready=False)
    assert by_node([starting, leaving])["a"].metadata.name == "fimbria-a"
    assert by_node([pod(""), leaving])["a"].metadata.name == "old"
    assert pod_trouble(starting) == "container agent isn't ready yet"


def test_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    cluster_status.show(view(pod("a"), pod("b", ready=False, **waiting("ErrImagePull")), leader="a_1"), verbose=True)
    shown = click.unstyle(capsys.readouterr().out)
    for text in (
        "1 of 2 ready",
        "DaemonSet kube-system/fimbria",
        "leader a_1",
        "not well",
        "fimbria-b",
        "ErrImagePull",
    ):
        assert text in shown


def test_containers() -> None:
    found = pod("a")
    assert found.container().name == "agent"
    assert found.container("observer").name == "observer"
    assert found.running("agent") and not found.running("observer")
    assert cluster.AGENTS.startswith("app.kubernetes.io/part-of=fimbria")
