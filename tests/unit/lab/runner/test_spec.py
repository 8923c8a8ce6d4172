"""What a pod asks for, and its status."""

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from fimbria.lab.errors import LabError
from fimbria.lab.runner.spec import (
    Addresses,
    ContainerState,
    PodObject,
    PodPlan,
    command,
    environment,
    expand,
    phase,
    plan,
    status,
)

TOOL = "/bin/labtool"
ADDRESSES = Addresses(("10.0.0.5", "fd00::5"), ("172.31.1.10",))


def pod(spec: dict[str, Any]) -> PodPlan:
    meta = {"name": "web", "namespace": "shop", "uid": "u"}
    return plan(msgspec.convert({"metadata": meta, "spec": {"nodeName": "n1"} | spec}, PodObject), TOOL)


def one(**container: Any) -> PodPlan:
    return pod({"containers": [{"name": "c", "image": "fimbria/labtool"} | container]})


def test_the_tools_image_serves_by_default() -> None:
    assert one().containers[0].argv[:2] == (TOOL, "serve")
    assert one(args=["sleep"]).containers[0].argv == (TOOL, "sleep")
    assert one(command=["labtool", "sleep"], image="fimbria/labtool:v1").containers[0].argv == (TOOL, "sleep")
    assert one(command=["sh"], args=["-c", "x"], image="any").containers[0].argv == ("sh", "-c", "x")


@pytest.mark.parametrize(
    ("container", "message"),
    [
        ({"image": "nginx"}, "container c: the lab pulls no images"),
        ({"envFrom": [{}]}, "envFrom"),
        ({"readinessProbe": {"grpc": {}}}, "none of tcpSocket"),
        ({"readinessProbe": {"tcpSocket": {"port": "nope"}}}, "'nope'"),
    ],
)
def test_what_the_lab_cannot_do_is_said(container: dict[str, Any], message: str) -> None:
    with pytest.raises(LabError, match=message):
        one(**container)


def test_environment() -> None:
    fields = [
        "metadata.name",
        "metadata.namespace",
        "metadata.uid",
        "spec.nodeName",
        "status.podIP",
        "status.podIPs",
        "status.hostIP",
    ]
    env = [{"name": f"F{i}", "valueFrom": {"fieldRef": {"fieldPath": f}}} for i, f in enumerate(fields)]
    p = one(env=[*env, {"name": "A", "value": "$(F0)-$(NOPE)-$$(F0)"}], command=["echo", "$(F4)", "$$x"])
    got = environment(p, p.containers[0], ADDRESSES)
    assert [got[f"F{i}"] for i in range(7)] == ["web", "shop", "u", "n1", "10.0.0.5", "10.0.0.5,fd00::5", "172.31.1.10"]
    assert got["A"] == "web-$(NOPE)-$(F0)"
    assert command(p.containers[0], got) == ["echo", "10.0.0.5", "$x"]
    bad = one(env=[{"name": "X", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}])
    with pytest.raises(LabError, match="fieldRef"):
        environment(bad, bad.containers[0], ADDRESSES)


def test_expand_leaves_what_it_does_not_know() -> None:
    assert expand("$(A)$(B)$", {"A": "1"}) == "1$(B)$"


def test_ports_by_name_and_host_ports() -> None:
    p = one(
        ports=[{"name": "http", "containerPort": 80, "hostPort": 8080}], readinessProbe={"httpGet": {"port": "http"}}
    )
    assert p.containers[0].readiness is not None
    assert p.containers[0].readiness.port == 80
    assert p.capabilities == {
        "portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": ""}]
    }


RUNNING = ContainerState("running", ready=True)
DONE, FAILED = ContainerState("terminated", exit_code=0), ContainerState("terminated", exit_code=2)


@pytest.mark.parametrize(
    ("policy", "init", "main", "expected"),
    [
        ("Always", ContainerState(), ContainerState(), "Pending"),
        ("Always", RUNNING, ContainerState(), "Pending"),
        ("Always", DONE, ContainerState(), "Pending"),
        ("Always", DONE, RUNNING, "Running"),
        ("Always", DONE, DONE, "Running"),
        ("Always", DONE, ContainerState("waiting", restarts=2), "Running"),
        ("OnFailure", DONE, DONE, "Succeeded"),
        ("OnFailure", DONE, FAILED, "Running"),
        ("Never", DONE, FAILED, "Failed"),
        ("Never", FAILED, ContainerState(), "Failed"),
        ("OnFailure", FAILED, ContainerState(), "Pending"),
    ],
)
def test_phase(policy: str, init: ContainerState, main: ContainerState, expected: str) -> None:
    spec = {
        "restartPolicy": policy,
        "containers": [{"name": "m", "command": ["x"]}],
        "initContainers": [{"name": "i", "command": ["x"]}],
    }
    assert phase(pod(spec), {"i": init, "m": main}) == expected


def test_status_keeps_times_while_nothing_changes_and_conditions_of_others() -> None:
    p = one()
    theirs = {"type": "example.com/gate", "status": "True"}
    first = status(p, {"c": RUNNING}, ADDRESSES, started="s", now="t1", before=[theirs])
    again = status(p, {"c": RUNNING}, ADDRESSES, started="s", now="t2", before=first["conditions"])
    assert again == first
    assert theirs in again["conditions"]
    later = status(
        p, {"c": replace(RUNNING, ready=False)}, ADDRESSES, started="s", now="t3", before=again["conditions"]
    )
    times = {c["type"]: c.get("lastTransitionTime") for c in later["conditions"]}
    assert (times["Ready"], times["PodScheduled"]) == ("t3", "t1")
    assert later["podIPs"] == [{"ip": "10.0.0.5"}, {"ip": "fd00::5"}]
