"""Nodes come, go, and change: their address, their boot, their API server. What pods notice of it, and for how long."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from traffic import TCP, Traffic, pod, start_pods, wait_settled

from fimbria.lab import kernel
from fimbria.lab.handle import Lab
from fimbria.lab.layout import Member

NODES, CILIUM_NODES = "/api/v1/nodes", "/apis/cilium.io/v2/ciliumnodes"


@pytest.fixture(scope="module")
def lab(make_lab: Callable[..., Lab]) -> Lab:
    lab = make_lab(nodes=2)
    start_pods(lab)
    return lab


def ip(lab: Lab, node: str, *lines: str) -> None:
    done = lab.run(f"node/{node}", "ip", "-batch", "-", stdin="\n".join(lines) + "\n")
    assert done.returncode == 0, done.stderr


def readdress(lab: Lab, member: Member, before: tuple[str, str], after: tuple[str, str]) -> None:
    """Takes a node's addresses (IPv4, IPv6) away and gives it others of the same subnets, at one moment."""
    ip(
        lab, member.name,
        f"address del {before[0]}/{member.ipv4_prefix} dev eth0",
        f"address add {after[0]}/{member.ipv4_prefix} dev eth0",
        f"address add {after[1]}/{member.ipv6_prefix} dev eth0 nodad",
        f"address del {before[1]}/{member.ipv6_prefix} dev eth0",
        f"route replace default via {member.gateway4} dev eth0",
        f"route replace ::/0 via {member.gateway6} dev eth0",
    )  # fmt: skip


def report_addresses(lab: Lab, node: str, *addresses: str) -> None:
    """As kubelet does when its node's addresses changed."""
    listed = [{"type": "InternalIP", "address": a} for a in addresses] + [{"type": "Hostname", "address": node}]
    merge(lab, f"{NODES}/{node}/status", {"status": {"addresses": listed}})


def merge(lab: Lab, path: str, patch: Any) -> None:
    lab.call(lambda c: c.request("PATCH", path, patch, "application/merge-patch+json"))


def answers(lab: Lab, source: str, address: str) -> bool:
    return bool(lab.probe(source, "tcp", address, TCP, "--timeout", "300")["result"] == "ok")


def seconds_until_answers(lab: Lab, source: str, target: str) -> float:
    began = time.monotonic()
    for address in lab.addresses(target):
        lab.wait(f"{address} answers", lambda a=address: answers(lab, source, a))  # type: ignore[misc]
    return time.monotonic() - began


@contextmanager
def streaming(lab: Lab, source: str, *targets: str) -> Iterator[dict[str, dict[str, Any]]]:
    """Long connections while the body runs; afterwards what is yielded has their outcomes by target."""
    options = ("--interval", "20000", "--stall", "1000", "--timeout", "20000")
    found: dict[str, dict[str, Any]] = {}
    running = {
        t: lab.start(source, kernel.binary("labtool"), "stream", "tcp", t, str(TCP), *options) for t in targets
    }
    for process in running.values():
        assert process.stdout is not None and json.loads(process.stdout.readline())["event"] == "connected"
    try:
        yield found
    finally:
        for process in running.values():
            process.terminate()
        for target, process in running.items():
            found[target] = json.loads(process.communicate(timeout=40)[0].splitlines()[-1])


def reported_node(lab: Lab, name: str) -> str:
    report = lab.request("GET", f"/apis/cilium.io/v2/namespaces/default/ciliumendpoints/{name}")
    return str(report["status"]["networking"]["node"])


def internal(lab: Lab, node: str) -> set[str]:
    spec = lab.request("GET", f"{CILIUM_NODES}/{node}")["spec"]
    return {a["ip"] for a in spec["addresses"] if a["type"] == "InternalIP"}


def test_a_nodes_address_changes_while_it_runs(lab: Lab) -> None:
    """The old address is gone at once, then kubelet reports the new one. Pods' connections live on: local ones notice
    nothing, those across nodes wait; the world gets answers from the new address."""
    member = lab.spec.node("node2")
    lab.apply(pod("beside", "node2", "beside"))
    lab.wait_ready(["beside"])
    old = member.ipv4, member.ipv6
    new = old[0].rsplit(".", 1)[0] + ".77", old[1].rsplit("::", 1)[0] + "::77"
    for before, after in ((old, new), (new, old)):
        far = lab.addresses("far")
        with streaming(lab, "client", *far) as across, streaming(lab, "beside", *far) as local:
            time.sleep(0.5)
            readdress(lab, member, before, after)
            time.sleep(1)
            report_addresses(lab, "node2", *after)
            took = seconds_until_answers(lab, "client", "far")
            time.sleep(1)
        print(f"{after[0]}: traffic to the node's pods came back {took:.2f} s after it was reported")
        assert took < 10
        assert all(o["ok"] for o in local.values()), local
        assert all(o["ended"] == "by us" and not o["lost"] for o in across.values()), across
        assert internal(lab, "node2") == set(after)
        world = lab.spec.world
        for source in ("far", "node/node2"):
            assert {lab.probe(source, "icmp", a)["result"] for a in (world.ipv4, world.ipv6)} == {"ok"}
        lab.wait("the reports follow", lambda a=after: reported_node(lab, "far") == a[0])  # type: ignore[misc]
        wait_settled(lab)
        with Traffic(lab):
            time.sleep(1)
    lab.delete(pod("beside", "node2"))
