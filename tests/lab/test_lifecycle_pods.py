"""Pods that aren't as usual: static ones, those of another plugin, those whose journal is lost, and names that move."""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from traffic import TCP, Traffic, agent, cni, node_root, pod, ready, start_pods, starved, wait_settled

from conftest import install_ptp
from fimbria.lab import state
from fimbria.lab.handle import Lab

ENDPOINTS = "/apis/cilium.io/v2/namespaces/default/ciliumendpoints"
STATIC_UID = "0123456789abcdef0123456789abcdef"
CLOSED = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: static}
spec: {podSelector: {matchLabels: {app: static}}, ingress: [{from: [{podSelector: {matchLabels: {app: client}}}]}]}
"""


@pytest.fixture(scope="module")
def lab(make_lab: Callable[..., Lab]) -> Lab:
    lab = make_lab(nodes=2)
    start_pods(lab)
    return lab


@pytest.fixture(autouse=True)
def _settled(lab: Lab) -> Iterator[None]:
    yield
    wait_settled(lab)


def endpoint(lab: Lab, node: str, name: str) -> dict[str, Any] | None:
    return next((e for e in agent(lab, node, "endpoints") if e["pod"] == name), None)


def report(lab: Lab, name: str) -> dict[str, Any] | None:
    return next((i for i in lab.request("GET", ENDPOINTS)["items"] if i["metadata"]["name"] == name), None)


def reaches(lab: Lab, source: str, address: str, port: int = TCP) -> bool:
    """With the patience of a client on a busy machine."""
    return bool(lab.probe(source, "tcp", address, port, "--timeout", "3500")["result"] in ("ok", "refused"))


def in_vain(lab: Lab, source: str, address: str, port: int = TCP) -> bool:
    return bool(lab.probe(source, "tcp", address, port, "--timeout", "300")["result"] not in ("ok", "refused"))


def test_a_static_pod_before_its_mirror(lab: Lab) -> None:
    """Kubelet starts it without asking the API server, under a uid that the API server never sees. Closed until its
    labels are known, then as its labels say; its report is owned by the mirror."""
    lab.apply(CLOSED)
    assert lab.run("node/node1", "ip", "netns", "add", "fimstatic").returncode == 0
    try:
        began, before = time.monotonic(), starved(lab)
        code, result = cni(lab, "ADD", "static1", "/run/netns/fimstatic", "static-node1", STATIC_UID)
        assert code == 0, result
        assert time.monotonic() - began - max(starved(lab) - before, 0) < 6
        address = next(ip["address"].split("/")[0] for ip in result["ips"])
        found = endpoint(lab, "node1", "static-node1")
        assert found and found["identity"] == 5, found
        assert reaches(lab, "node/node1", address), "its own node, for probes"
        assert in_vain(lab, "near", address) and in_vain(lab, "far", address)
        assert report(lab, "static-node1") is None
        mirror = pod("static-node1", "node1", "static", sleeps=True).replace(
            "labels:", f"annotations: {{kubernetes.io/config.mirror: {STATIC_UID}}}, labels:"
        )
        lab.kill("node1/runner")  # it would start the mirror as a pod of its own
        lab.apply(mirror)
        lab.wait("it has its identity", lambda: (endpoint(lab, "node1", "static-node1") or {})["identity"] > 255)
        lab.wait("a friend gets through", lambda: reaches(lab, "client", address))
        assert in_vain(lab, "near", address) and in_vain(lab, "far", address)
        owner = lab.wait("its report", lambda: report(lab, "static-node1"))["metadata"]["ownerReferences"][0]
        assert owner["uid"] == lab.pod("static-node1")["metadata"]["uid"] != STATIC_UID
    finally:
        cni(lab, "DEL", "static1", "", "static-node1", STATIC_UID)
        lab.run("node/node1", "ip", "netns", "delete", "fimstatic")
        lab.delete(CLOSED + "---\n" + pod("static-node1", "node1"))
        lab.restart("node1/runner")


def test_a_pod_of_the_same_name_is_no_static_pod(lab: Lab) -> None:
    """The uid decides: an ADD for a pod that the API server has no more isn't answered by another's labels."""
    assert lab.run("node/node1", "ip", "netns", "add", "fimother").returncode == 0
    try:
        code, said = cni(lab, "ADD", "other1", "/run/netns/fimother", "client", "11111111-2222-3333-4444-555555555555")
        assert code == 1 and said["code"] == 11 and "default/client" in said["msg"], said
    finally:
        lab.run("node/node1", "ip", "netns", "delete", "fimother")


def test_a_lost_journal(lab: Lab) -> None:
    """Kernel and cluster know the pods still: they go on, unnoticed by those who talk to them."""
    before = {e["pod"]: (e["id"], e["ipv4"], e["identity"]) for e in agent(lab, "node1", "endpoints")}
    with Traffic(lab):
        lab.kill("node1/agent")
        for path in sorted((node_root(lab, "node1") / "run/fimbria/state").rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        lab.restart("node1/agent")
        lab.wait("it is ready", lambda: ready(lab, "node1"))
        wait_settled(lab)
    assert {e["pod"]: (e["id"], e["ipv4"], e["identity"]) for e in agent(lab, "node1", "endpoints")} == before
    assert "was recovered" in lab.process_log("node1/agent")
    # New pods get other numbers and addresses than those.
    lab.apply(pod("later", "node1"))
    lab.wait_ready(["later"])
    later = endpoint(lab, "node1", "later")
    assert later and later["id"] > max(n for n, _, _ in before.values())
    assert later["ipv4"] not in {a for _, a, _ in before.values()}
    lab.delete(pod("later", "node1"))
    lab.wait("it is gone", lambda: endpoint(lab, "node1", "later") is None)


def test_a_lost_journal_and_a_report_that_says_otherwise(lab: Lab) -> None:
    """Nobody vouches for the pod: it is cut off, the log and the status name it."""
    lab.apply(pod("doubtful", "node1"))
    lab.wait_ready(["doubtful"])
    lab.wait("its report", lambda: report(lab, "doubtful"))
    address = lab.addresses("doubtful")[0]
    lab.kill("node1/agent")
    found = endpoint_file(lab, "doubtful")
    found.unlink()
    patch = {"status": {"external-identifiers": {"container-id": "somebody-else"}}}
    lab.call(lambda c: c.request("PATCH", f"{ENDPOINTS}/doubtful", patch, "application/merge-patch+json"))
    lab.restart("node1/agent")
    lab.wait("it is ready", lambda: ready(lab, "node1"))
    assert "pod default/doubtful has an interface of ours" in lab.process_log("node1/agent")
    assert agent(lab, "node1", "status")["unmanaged"] == ["default/doubtful"]
    assert in_vain(lab, "client", address)
    lab.delete(pod("doubtful", "node1"))
    lab.wait("it isn't listed any more", lambda: agent(lab, "node1", "status")["unmanaged"] == [])


def endpoint_file(lab: Lab, name: str) -> Any:
    files = (node_root(lab, "node1") / "run/fimbria/state/endpoints").glob("*.json")
    return next(p for p in files if json.loads(p.read_text())["endpoint"]["pod"] == name)


def test_a_journal_of_a_newer_version(lab: Lab) -> None:
    """Fields that this version doesn't know cost no pod its network."""
    with Traffic(lab):
        lab.kill("node1/agent")
        state = node_root(lab, "node1") / "run/fimbria/state"
        for path in (state / "endpoints").glob("*.json"):
            raw = json.loads(path.read_text())
            raw["endpoint"] |= {"colour": "blue", "host_ports": [[8080, 80, 6, "", "newer"]]}
            path.write_text(json.dumps(raw | {"format": 7}))
        (state / "node.json").write_text(json.dumps(json.loads((state / "node.json").read_text()) | {"zone": "a"}))
        count = len(list((state / "endpoints").glob("*.json")))
        lab.restart("node1/agent")
        lab.wait("it is ready", lambda: ready(lab, "node1"))
    assert len(agent(lab, "node1", "endpoints")) == count
    assert not list((state / "endpoints").glob("*.bad"))


def test_a_name_that_moved_to_another_node(lab: Lab) -> None:
    """As of a StatefulSet whose node was away: what comes back late doesn't take the name from who has it now."""
    lab.apply(pod("web-0", "node1"))
    lab.wait_ready(["web-0"])
    lab.wait("its report", lambda: report(lab, "web-0"))
    old = lab.addresses("web-0")
    lab.kill("node1/agent")
    lab.kill("node1/runner")
    # As the node life-cycle controller does with a node that doesn't answer.
    lab.request("DELETE", "/api/v1/namespaces/default/pods/web-0", {"gracePeriodSeconds": 0})
    lab.wait("it is gone", lambda: all(i["metadata"]["name"] != "web-0" for i in pods(lab)))
    lab.apply(pod("web-0", "node2"))
    lab.wait_ready(["web-0"])
    new = lab.addresses("web-0")
    assert set(new).isdisjoint(old)
    lab.wait("the report is the new one's", lambda: reported(lab, "web-0") == set(new))
    lab.restart("node1/agent")
    lab.wait("it is ready", lambda: ready(lab, "node1"))
    time.sleep(1)  # what it would write it writes at once
    assert reported(lab, "web-0") == set(new)
    lab.restart("node1/runner")
    lab.wait("the old one is gone", lambda: endpoint(lab, "node1", "web-0") is None)
    time.sleep(0.5)
    assert reported(lab, "web-0") == set(new)
    assert all(reaches(lab, "client", a) for a in new) and all(in_vain(lab, "client", a) for a in old)
    lab.delete(pod("web-0", "node2"))
    lab.wait("and its report goes", lambda: report(lab, "web-0") is None)


def pods(lab: Lab) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = lab.request("GET", "/api/v1/namespaces/default/pods")["items"]
    return found


def reported(lab: Lab, name: str) -> set[str]:
    found = report(lab, name)
    pairs = found["status"]["networking"]["addressing"] if found else []
    return {a for pair in pairs for a in pair.values()}


def test_pods_of_another_plugin(make_lab: Callable[..., Lab]) -> None:
    """They were there before Fimbria: they keep their network, and the status names them until they are restarted."""
    lab = make_lab(nodes=1, agents=False, ipv4_pool="10.90.0.0/16", ipv6_pool="fd00:90::/104")
    install_ptp(lab)
    lab.apply(pod("old", "node1") + pod("beside", "node1"))
    lab.wait_ready(["old", "beside"])
    old = lab.addresses("old")
    assert all(a.startswith(("10.244.", "fd00:244:")) for a in old)
    spec = lab.spec.to_json() | {"agents": True}
    state.write(lab.paths.spec, json.dumps(spec))
    lab = Lab(lab.spec.name)
    for process in ("control/operator", "node1/agent"):
        lab.restart(process)
    lab.wait("the agent is ready", lambda: ready(lab, "node1"))
    assert agent(lab, "node1", "status")["unmanaged"] == ["default/beside", "default/old"]
    assert agent(lab, "node1", "endpoints") == []
    lab.apply(pod("new", "node1"))
    lab.wait_ready(["new"])
    assert set(lab.addresses("new")).isdisjoint(old) and endpoint(lab, "node1", "new")
    for source, target in (("beside", old), ("old", lab.addresses("new")), ("new", old), ("node/node1", old)):
        assert all(reaches(lab, source, a) for a in target), (source, target)
    lab.wait("its report", lambda: report(lab, "new"))
    assert [i["metadata"]["name"] for i in lab.request("GET", ENDPOINTS)["items"]] == ["new"]
    lab.delete(pod("old", "node1"))
    lab.wait("it is gone", lambda: agent(lab, "node1", "status")["unmanaged"] == ["default/beside"])
    lab.apply(pod("old", "node1"))
    lab.wait_ready(["old"])
    assert agent(lab, "node1", "status")["unmanaged"] == ["default/beside"]
    assert endpoint(lab, "node1", "old")


def test_a_report_that_somebody_deleted(lab: Lab) -> None:
    """It is written again, and not only at the pod's next change; a pod that changes nothing costs no request."""
    lab.wait("its report", lambda: report(lab, "near"))
    lab.request("DELETE", f"{ENDPOINTS}/near")
    lab.wait("it is there again", lambda: report(lab, "near"))
    assert reported(lab, "near") == set(lab.addresses("near"))
    version = (report(lab, "near") or {})["metadata"]["resourceVersion"]
    patch = {"metadata": {"annotations": {"example.com/nothing": "changed"}}}
    path = "/api/v1/namespaces/default/pods/near"
    lab.call(lambda c: c.request("PATCH", path, patch, "application/merge-patch+json"))
    time.sleep(1)
    assert (report(lab, "near") or {})["metadata"]["resourceVersion"] == version
