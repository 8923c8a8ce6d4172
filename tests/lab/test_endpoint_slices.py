"""Slices of endpoints, identities by the operator, changed label filters: on real nodes, under traffic."""

import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import pytest
from traffic import Traffic, agent, pod, set_options, start_pods, starved, wait_settled

from fimbria.lab import components
from fimbria.lab.handle import Lab

COVER = "fimbria-covers-all-endpoints"
SLICES = "/apis/cilium.io/v2alpha1/ciliumendpointslices"
CEPS = "/apis/cilium.io/v2/namespaces/default/ciliumendpoints"
OPERATOR = "control/operator"
CLOSED = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: servers}
spec:
  podSelector: {matchLabels: {app: server}}
  ingress: [{from: [{podSelector: {matchLabels: {app: client}}}]}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: client}
spec:
  podSelector: {matchLabels: {app: client}}
  policyTypes: [Egress]
  egress: [{to: [{podSelector: {matchLabels: {app: server}}}]}]
"""


@pytest.fixture(scope="module")
def lab(make_lab: Callable[..., Lab]) -> Lab:
    lab = make_lab(nodes=2)
    start_pods(lab)
    lab.apply(CLOSED)
    lab.wait("slices hold everybody", lambda: COVER in slices(lab))
    return lab


def slices(lab: Lab) -> dict[str, list[dict[str, Any]]]:
    return {s["metadata"]["name"]: s["endpoints"] for s in lab.request("GET", SLICES)["items"]}


def follows_slices(lab: Lab, node: str) -> bool:
    """Whether the agent's only informer of other nodes' pods is that of slices."""
    kinds = [line for line in agent(lab, node, "metrics").splitlines() if line.startswith("fimbria_k8s_connected{")]
    found = {line.split('"')[1]: line.endswith(" 1.0") for line in kinds}
    return found.get("CiliumEndpointSlice", False) and "CiliumEndpoint" not in found


def restart_operator(lab: Lab, *options: str) -> None:
    lab.kill(OPERATOR)
    lab.wait("the operator has ended", lambda: not _alive(lab))
    argv = [*components.operator(lab.spec, lab.paths).argv(), *options]
    components.start(lab.paths, OPERATOR, argv)


def _alive(lab: Lab) -> bool:
    from fimbria.lab import state

    known = state.recall(lab.paths, OPERATOR)
    return known is not None and known.alive()


def restart_agents(lab: Lab, *options: str) -> None:
    set_options(lab, *options)
    for node in lab.spec.node_names:
        lab.kill(f"{node}/agent")
        lab.restart(f"{node}/agent")
    wait_settled(lab, 60)


@contextmanager
def nobody_is_forgotten(lab: Lab) -> Iterator[None]:
    """While the body runs every agent that answers knows every pod's address, with an identity of its own."""
    addresses = {a for name in ("client", "near", "far") for a in lab.addresses(name)}
    missing: list[str] = []
    looks = 0
    over = threading.Event()

    def look() -> None:
        nonlocal looks
        while not over.wait(0.05):
            for node in lab.spec.node_names:
                try:
                    rows = agent(lab, node, "maps/ipcache")
                except (OSError, AssertionError, subprocess.SubprocessError, json.JSONDecodeError):
                    continue  # it is being started again; the kernel has what it had
                text = json.dumps([r for r in rows if r["value"]["identity"] >= 256])
                missing.extend(f"{node}: {a}" for a in addresses if f'"{a}' not in text)
                looks += 1

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert looks > 10 and not missing, missing[:5]


def test_from_slices_to_pods_and_back(lab: Lab) -> None:
    """In both orders, agents of both kinds at once, the operator killed in between: nobody is forgotten."""
    lab.wait("slices are followed", lambda: all(follows_slices(lab, n) for n in lab.spec.node_names))
    with Traffic(lab), nobody_is_forgotten(lab):
        restart_operator(lab, "--no-endpoint-slices")  # agents still would follow slices, but there are none
        lab.wait("no slices", lambda: not slices(lab))
        lab.wait("pods are followed", lambda: not any(follows_slices(lab, n) for n in lab.spec.node_names))
        wait_settled(lab, 60)
        restart_agents(lab, "no-endpoint-slices")
        restart_operator(lab)
        lab.wait("slices hold everybody", lambda: COVER in slices(lab))
        set_options(lab)
        lab.kill("node2/agent")
        lab.restart("node2/agent")  # node1's goes on with single pods
        wait_settled(lab, 60)
        lab.wait("node2 follows slices", lambda: follows_slices(lab, "node2"))
        assert not follows_slices(lab, "node1")
        restart_agents(lab)
        lab.kill(OPERATOR)
        lab.wait("the operator has ended", lambda: not _alive(lab))
        restart_agents(lab)  # without an operator, slices are what they were
        lab.restart(OPERATOR)
        wait_settled(lab, 60)
    lab.wait("slices are followed", lambda: all(follows_slices(lab, n) for n in lab.spec.node_names))


def report(lab: Lab, number: int) -> float:
    """Seconds from a pod's report, as node2's agent would make it, until node1's agent knows the address; without those
    that the machine let the lab's processes wait for a processor."""
    node2 = lab.spec.node("node2").ipv4
    address = f"10.244.250.{number}"
    status = {
        "id": number, "identity": {"id": 4000}, "networking": {"addressing": [{"ipv4": address}], "node": node2},
    }  # fmt: skip
    body = {"apiVersion": "cilium.io/v2", "kind": "CiliumEndpoint", "metadata": {"name": f"told{number}"}}
    # Kubernetes would remove it with its owner; the operator does so without one, but not while we look.
    began, before = time.monotonic(), starved(lab)
    lab.request("POST", CEPS, body | {"status": status})
    while all(row["prefix"] != f"{address}/32" for row in agent(lab, "node1", "ipcache")):
        assert time.monotonic() - began < 60
        time.sleep(0.005)
    return time.monotonic() - began - max(starved(lab) - before, 0.0)


def test_how_soon_other_nodes_know_a_pod(lab: Lab) -> None:
    """A lone new pod is known at once in both ways; the figures are printed."""
    lab.wait("slices are followed", lambda: all(follows_slices(lab, n) for n in lab.spec.node_names))
    found = {}
    for n, way in enumerate(("slices", "single pods")):
        took = []
        for number in range(10):
            time.sleep(0.6)
            took.append(report(lab, 20 * n + number + 1))
        found[way] = took
        if way == "slices":
            restart_operator(lab, "--no-endpoint-slices")
            lab.wait("pods are followed", lambda: not any(follows_slices(lab, n) for n in lab.spec.node_names))
    restart_operator(lab)
    lab.wait("slices hold everybody", lambda: COVER in slices(lab))
    for way, took in found.items():
        print(f"\nknown on another node, by {way}: median {median(took) * 1000:.0f} ms, most {max(took) * 1000:.0f} ms")
    assert median(found["slices"]) < 1.0


def identity_of(lab: Lab, name: str) -> tuple[int, list[str]]:
    found = lab.request("GET", f"{CEPS}/{name}")["status"]["identity"]
    return found["id"], found["labels"]


def label(lab: Lab, name: str, **labels: str | None) -> None:
    path, body = f"/api/v1/namespaces/default/pods/{name}", {"metadata": {"labels": labels}}
    lab.call(lambda c: c.request("PATCH", path, body, "application/merge-patch+json"))


def test_changed_labels_and_a_changed_filter_drop_nothing(lab: Lab) -> None:
    """Every pod gets another identity while policies on both sides go on allowing what they allowed."""
    names = ("client", "near", "far")

    def have(*, extra: bool) -> bool:
        return all(any(x.startswith("k8s:extra=") for x in identity_of(lab, n)[1]) is extra for n in names)

    before = {name: identity_of(lab, name)[0] for name in names}
    with Traffic(lab):
        for name in names:
            label(lab, name, extra="yes")
        lab.wait("new identities", lambda: have(extra=True), 60)
        time.sleep(2)
        restart_operator(lab, "--label-filter", "!extra")
        restart_agents(lab, "label-filter=!extra")
        lab.wait("identities by the new filter", lambda: have(extra=False), 60)
        assert {name: identity_of(lab, name)[0] for name in names} == before
        restart_operator(lab)
        restart_agents(lab)
        lab.wait("identities by the former filter", lambda: have(extra=True), 60)
        for name in names:
            label(lab, name, extra=None)
        lab.wait("as before", lambda: {n: identity_of(lab, n)[0] for n in names} == before, 60)


def test_identities_by_the_operator(lab: Lab) -> None:
    """Agents wait for it; a pod that starts without it is told why, and starts once it is there."""
    restart_operator(lab, "--identity-allocation", "operator")
    restart_agents(lab, "identity-allocation=operator")
    lab.apply(pod("made", "node2", "by-the-operator"))
    lab.wait_ready(["made"], 60)
    lab.kill(OPERATOR)
    lab.wait("the operator has ended", lambda: not _alive(lab))
    lab.apply(pod("waits", "node2", "never-seen"))
    lab.wait("the agent says why", lambda: "the operator has not made it" in lab.process_log("node2/agent"), 60)
    components.start(
        lab.paths, OPERATOR,
        [*components.operator(lab.spec, lab.paths).argv(), "--identity-allocation", "operator"],
    )  # fmt: skip
    lab.wait_ready(["waits"], 60)
    restart_operator(lab)
    restart_agents(lab)
