"""Pod addresses: what one answers whose pod is gone, reuse at once, and pools that are too small, overlap or change."""

import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from traffic import TCP, agent, node_root, pod, wait_settled

from fimbria.lab.handle import Lab

AT_ONCE = 500_000  # microseconds; a silent drop would take the probe's whole timeout


@pytest.fixture(scope="module", params=["overlay", "native"])
def lab(make_lab: Callable[..., Lab], request: pytest.FixtureRequest) -> Lab:
    lab = make_lab(nodes=2, routing=request.param)
    lab.apply(pod("near", "node1", sleeps=True) + pod("far", "node2", sleeps=True))
    lab.wait_ready(["near", "far"])
    return lab


@pytest.fixture(autouse=True)
def _settled(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "lab" in request.fixturenames:
        wait_settled(request.getfixturevalue("lab"))


def remove(lab: Lab, name: str) -> None:
    lab.delete(pod(name, "node1"))
    lab.wait(f"{name} is gone", lambda: name not in {e["pod"] for e in agent(lab, "node1", "endpoints")})


def unreachable(lab: Lab, source: str, address: str) -> bool:
    answer = lab.probe(source, "udp", address, 9001, "--timeout", "1000")
    return bool(answer["result"] == "unreachable" and answer["latency_us"] < AT_ONCE)


def test_a_gone_pods_address_is_unreachable(lab: Lab) -> None:
    lab.apply(pod("leaving", "node1"))
    lab.wait_ready(["leaving"])
    addresses = lab.addresses("leaving")
    sources = ["near", "far", "node/node1", "node/node2"]
    if lab.spec.routing == "native":  # elsewhere the world has no way to a pod's address
        sources.append("node/world")
        for address, gateway in zip(addresses, (lab.spec.world.gateway4, lab.spec.world.gateway6), strict=True):
            block = "10.244.0.0/16" if "." in address else "fd00:244::/104"
            assert lab.run("node/world", "ip", "route", "replace", block, "via", gateway).returncode == 0
    for source in sources:
        for address in addresses:
            assert lab.probe(source, "udp", address, 9001)["result"] == "ok", (source, address)
    remove(lab, "leaving")
    for source in sources:
        for address in addresses:
            # The kernel answers once a second and peer: what others asked before may have used this one up.
            lab.wait(f"{source} is told that {address} is gone", partial(unreachable, lab, source, address))


def test_an_address_is_reused_at_once(make_lab: Callable[..., Lab]) -> None:
    """With room for a single pod each next pod gets the same address: nothing of its former owner's is left."""
    lab = make_lab(nodes=1, ipv4_pool="10.244.0.0/29", ipv4_mask=29, ipv6_pool="", agent_options=("trace-interval=1",))
    lab.apply(pod("client", "node1", sleeps=True))
    for filler in range(3):
        lab.apply(pod(f"filler{filler}", "node1", sleeps=True))
    lab.wait_ready(["client", "filler0", "filler1", "filler2"])
    seen = set()
    for n in range(4):
        lab.apply(pod(f"server{n}", "node1"))
        lab.wait_ready([f"server{n}"])
        (address,) = lab.addresses(f"server{n}")
        seen.add(address)
        # One source port for all: the same connection, had the first one's state been kept.
        answers = [lab.probe("client", "tcp", address, TCP, "--timeout", "1000") for _ in range(3)]
        assert {a["answer"]["name"] for a in answers if a["result"] == "ok"} == {f"server{n}"}, answers
        assert all(a["result"] == "ok" for a in answers)
        remove(lab, f"server{n}")
    assert len(seen) == 1, "the only free address"
    wait_settled(lab)
    # And when nothing is free: the CNI error names the pool, and nobody else is touched.
    lab.apply(pod("last", "node1") + pod("one-too-many", "node1"))

    def said() -> str:
        waiting = [
            c["state"].get("waiting", {}).get("message", "")
            for name in ("last", "one-too-many")
            for c in lab.pod(name)["status"].get("containerStatuses", ())
        ]
        return next((m for m in waiting if "10.244.0.0/29" in m), "")

    message = lab.wait("the CNI error names the block", said)
    assert "no free IPv4 address" in message or "no IPv4 address" in message, message
    assert lab.probe("client", "icmp", lab.addresses("filler0")[0])["result"] == "ok"
    remove(lab, "filler1")  # room again
    lab.wait_ready(["last", "one-too-many"])


def test_pools_too_small_overlapping_and_changed(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(nodes=2, ipv4_pool="10.244.0.0/23")
    lab.apply(pod("near", "node1") + pod("far", "node2"))
    lab.wait_ready(["near", "far"])
    nodes = "/apis/cilium.io/v2/ciliumnodes"

    def problem(name: str) -> str:
        status = lab.request("GET", f"{nodes}/{name}").get("status", {})
        return str(status.get("ipam", {}).get("operator-status", {}).get("error", ""))

    def blocks(name: str) -> list[str]:
        return list(lab.request("GET", f"{nodes}/{name}")["spec"]["ipam"].get("podCIDRs", ()))

    # A node that claims another one's block, when the pool has none left.
    first = blocks("node1")
    for path, kind in (("/api/v1/nodes", "Node"), (nodes, "CiliumNode")):
        group = "v1" if kind == "Node" else "cilium.io/v2"
        body = {"apiVersion": group, "kind": kind, "metadata": {"name": "thief"}}
        spec = {"ipam": {"podCIDRs": [first[0]]}} if kind == "CiliumNode" else {}
        lab.request("POST", path, body | {"spec": spec})
    said = lab.wait("the younger node is told", lambda: problem("thief"))
    assert "no IPv4 block is free for node thief in 10.244.0.0/23" in said, said
    assert f"{first[0]} overlaps {first[0]} of node node1" in lab.process_log("control/operator")
    assert first[0] not in blocks("thief")
    assert blocks("node1") == first and problem("node1") == ""
    # Pools that don't contain what nodes have any more.
    lab.kill("control/operator")
    spec = json.loads(lab.paths.spec.read_text()) | {"ipv4_pool": "10.90.0.0/16"}
    lab.paths.spec.write_text(json.dumps(spec))
    lab.restart("control/operator")
    said = lab.wait("the node is told", lambda: problem("node1"))
    assert first[0] in said and "no configured pool" in said, said
    assert blocks("node1") == first
    assert all(lab.probe("near", "icmp", a)["result"] == "ok" for a in lab.addresses("far"))
    # The object of a running node deleted: it comes back with what its pods have.
    lab.request("DELETE", f"{nodes}/node1")
    lab.wait("node1 is there again", lambda: any(i["metadata"]["name"] == "node1" for i in listed(lab, nodes)))
    assert blocks("node1") == first
    for source, target in (("near", "far"), ("far", "near")):  # node2 hears of it a moment later
        for address in lab.addresses(target):
            lab.wait(f"{target} answers", lambda s=source, a=address: lab.probe(s, "icmp", a)["result"] == "ok")  # type: ignore[misc]
    wait_settled(lab)


def listed(lab: Lab, path: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = lab.request("GET", path)["items"]
    return found


def test_a_broken_journal(lab: Lab) -> None:
    """A file that can't be read is set aside; its pod keeps what the kernel has until it is asked for again."""
    state = node_root(lab, "node1") / "run/fimbria/state"
    lab.kill("node1/agent")
    (state / "numbers.json").write_text("{")
    (state / "node.json").write_text("[]")
    (state / "endpoints/9999.json").write_text('{"endpoint": {}}')
    lab.restart("node1/agent")
    wait_settled(lab)
    assert (state / "endpoints/9999.bad").exists()
    said = lab.process_log("node1/agent")
    assert all(f"{name} can't be read" in said for name in ("9999.json", "numbers.json", "node.json"))
    time.sleep(0.2)
    assert all(lab.probe("near", "icmp", a)["result"] == "ok" for a in lab.addresses("far"))
