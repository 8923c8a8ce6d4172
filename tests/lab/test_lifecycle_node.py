"""Nodes come, go, and change: their address, their boot, their API server. What pods notice of it, and for how long."""

import json
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from traffic import TCP, Traffic, agent, cni, pod, ready, start_pods, wait_settled, wait_soon

from fimbria.lab import components, kernel
from fimbria.lab.handle import Lab
from fimbria.lab.layout import Member
from fimbria.sources.k8s.errors import NotFound

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


def echoes(lab: Lab, source: str, address: str) -> bool:
    return bool(lab.probe(source, "icmp", address, 0, "--timeout", "300")["result"] == "ok")


def wait_answers(lab: Lab, source: str, target: str, limit: float = 20.0) -> float:
    """Until a pod answers at all its addresses, within `limit` seconds. Returns how many it took."""
    addresses = lab.addresses(target)
    return wait_soon(lab, f"{target} answers", lambda: all(answers(lab, source, a) for a in addresses), limit)


@contextmanager
def streaming(lab: Lab, source: str, *targets: str) -> Iterator[dict[str, dict[str, Any]]]:
    """Long connections while the body runs; afterwards what is yielded has their outcomes by target."""
    options = ("--interval", "20000", "--stall", "1000", "--timeout", "20000")
    found: dict[str, dict[str, Any]] = {}
    running = {t: lab.start(source, kernel.binary("labtool"), "stream", "tcp", t, str(TCP), *options) for t in targets}
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
            took = wait_answers(lab, "client", "far", 10)
            time.sleep(1)
        print(f"{after[0]}: traffic to the node's pods came back {took:.2f} s after it was reported")
        assert all(o["ok"] for o in local.values()), local
        assert all(o["ended"] == "by us" and not o["lost"] for o in across.values()), across
        assert internal(lab, "node2") == set(after)
        world = lab.spec.world
        for source in ("far", "node/node2"):
            for target in (world.ipv4, world.ipv6):
                lab.wait("the world answers", lambda s=source, t=target: echoes(lab, s, t))  # type: ignore[misc]
        lab.wait("the reports follow", lambda a=after: reported_node(lab, "far") == a[0])  # type: ignore[misc]
        wait_settled(lab)
        with Traffic(lab):
            time.sleep(1)
    lab.delete(pod("beside", "node2"))


def test_a_reboot(lab: Lab) -> None:
    """Journal, links, maps and routes are gone; pods come back by themselves, and at no moment are two said to have one
    address; their host ports, and the Services they serve, work again."""
    names = [f"boot{n}" for n in range(4)]
    lab.apply("".join(pod(n, "node2", "boot", sleeps=True) for n in names) + HOST_PORT)
    lab.wait_ready([*names, "port"])
    before = {n: set(lab.addresses(n)) for n in (*names, "port", "far")}
    node4 = lab.spec.node("node2").ipv4
    assert lab.probe("client", "tcp", node4, 8099)["result"] == "ok"
    with streaming(lab, "client", *lab.addresses("near")) as elsewhere:
        lab.kill("node2/init")
        time.sleep(1)
        began = time.monotonic()
        lab.restart("node2/init")
        lab.wait("its agent is ready", lambda: is_ready(lab, "node2"), 120)
        agent_took = time.monotonic() - began
        twice: set[str] = set()

        def all_moved() -> bool:
            twice.update(said_twice(lab))
            return all(moved(lab, n, a) for n, a in before.items())

        lab.wait("its pods have other addresses", all_moved, 120)
        lab.wait_ready([*names, "port", "far"], 120)
        took = time.monotonic() - began
    print(f"reboot: agent ready after {agent_took:.1f} s, all pods Ready after {took:.1f} s")
    assert all(o["ok"] for o in elsewhere.values()), elsewhere
    assert twice == set()
    lab.wait("the host port answers", lambda: lab.probe("client", "tcp", node4, 8099)["result"] == "ok")
    for name in before:
        lab.wait("its report follows", lambda n=name: reported_addresses(lab, n) == set(lab.addresses(n)))  # type: ignore[misc]
    wait_settled(lab)
    with Traffic(lab):
        time.sleep(1)
    lab.delete("".join(pod(n, "node2") for n in names) + HOST_PORT)


HOST_PORT = """
apiVersion: v1
kind: Pod
metadata: {name: port}
spec:
  nodeName: node2
  terminationGracePeriodSeconds: 0
  containers: [{name: main, image: fimbria/labtool, ports: [{containerPort: 9000, hostPort: 8099}]}]
---
"""


def is_ready(lab: Lab, node: str) -> bool:
    """Of a node that may be switched off."""
    try:
        return ready(lab, node)
    except (AssertionError, OSError):
        return False


def moved(lab: Lab, name: str, former: set[str]) -> bool:
    now = set(lab.addresses(name))
    return bool(now) and now != former


def said_twice(lab: Lab) -> set[str]:
    """Addresses that two reports name."""
    reports = lab.request("GET", "/apis/cilium.io/v2/ciliumendpoints")["items"]
    pairs = [pair for r in reports for pair in r.get("status", {}).get("networking", {}).get("addressing", ())]
    return {a for a, n in Counter(a for pair in pairs for a in pair.values()).items() if n > 1}


def reported_addresses(lab: Lab, name: str) -> set[str]:
    report = lab.request("GET", f"/apis/cilium.io/v2/namespaces/default/ciliumendpoints/{name}")
    return {a for pair in report["status"]["networking"]["addressing"] for a in pair.values()}


def test_a_node_object_deleted_under_a_running_agent(lab: Lab) -> None:
    """With it goes the CiliumNode, as the garbage collector does; both come back, and the pods keep their addresses and
    their connections."""
    before = lab.request("GET", f"{CILIUM_NODES}/node2")["spec"]["ipam"]["podCIDRs"]
    with streaming(lab, "client", *lab.addresses("far")) as across:
        lab.request("DELETE", f"{CILIUM_NODES}/node2")
        lab.wait("it is there again", lambda: has(lab, CILIUM_NODES, "node2"))
        assert lab.request("GET", f"{CILIUM_NODES}/node2")["spec"]["ipam"]["podCIDRs"] == before
        wait_settled(lab)
    assert all(o["ended"] == "by us" and not o["lost"] for o in across.values()), across
    remove(lab, f"{NODES}/node2", f"{CILIUM_NODES}/node2")
    time.sleep(1)
    lab.kill("node2/runner")
    lab.restart("node2/runner")
    lab.wait("both are there again", lambda: has(lab, NODES, "node2") and has(lab, CILIUM_NODES, "node2"), 40)
    owner = lab.request("GET", f"{CILIUM_NODES}/node2")["metadata"]["ownerReferences"][0]
    assert owner["uid"] == lab.request("GET", f"{NODES}/node2")["metadata"]["uid"]
    assert lab.request("GET", f"{CILIUM_NODES}/node2")["spec"]["ipam"]["podCIDRs"] == before
    wait_answers(lab, "client", "far")
    wait_settled(lab)


def remove(lab: Lab, *paths: str) -> None:
    """Deletes objects at once, those that the garbage collector had first included."""
    for path in paths:
        with suppress(NotFound):
            lab.request("DELETE", path, {"gracePeriodSeconds": 0})


def has(lab: Lab, path: str, name: str) -> bool:
    return any(i["metadata"]["name"] == name for i in lab.request("GET", path)["items"])


def test_a_node_goes_for_good_and_its_name_comes_back_with_another_address(make_lab: Callable[..., Lab]) -> None:
    """A third node joins, is lost with its machine, is removed, and another machine takes its name."""
    lab = make_lab(nodes=3)
    start_pods(lab)
    lab.apply(pod("third", "node3"))
    lab.wait_ready(["third"])
    old = lab.addresses("third")
    wait_answers(lab, "client", "third")
    lab.wait("its report", lambda: reported_addresses(lab, "third") == set(old))
    lab.kill("node3/init")
    remove(lab, f"{NODES}/node3", f"{CILIUM_NODES}/node3", "/api/v1/namespaces/default/pods/third")
    others = ("node1", "node2")
    for node in others:
        lab.wait("it is forgotten", lambda n=node: len(agent(lab, n, "nodes")) == 2)  # type: ignore[misc]
    assert all(lab.probe("client", "icmp", a, 0, "--timeout", "300")["result"] != "ok" for a in old)
    with Traffic(lab):
        lab.restart("node3/init")
        lab.kill("node3/agent")
        lab.kill("node3/runner")
        member = lab.spec.node("node3")
        before = member.ipv4, member.ipv6
        after = before[0].rsplit(".", 1)[0] + ".99", before[1].rsplit("::", 1)[0] + "::99"
        remove(lab, f"{NODES}/node3", f"{CILIUM_NODES}/node3")
        readdress(lab, member, before, after)
        argv = components.runner(lab.spec, lab.paths, "node3").argv()
        given = dict(zip(before, after, strict=True))
        runner = lab.start("node/node3", *(given.get(word, word) for word in argv))
        try:
            began = time.monotonic()
            lab.restart("node3/agent")
            lab.wait("it is ready", lambda: is_ready(lab, "node3"), 60)
            lab.apply(pod("third", "node3"))
            lab.wait_ready(["third"])
            wait_answers(lab, "client", "third")
            print(f"joined and serves a pod after {time.monotonic() - began:.1f} s")
            assert internal(lab, "node3") == set(after)
            lab.wait("its report", lambda: reported_node(lab, "third") == after[0])
            wait_settled(lab)
        finally:
            runner.terminate()
            runner.communicate(timeout=20)


def test_the_api_server_is_away(lab: Lab) -> None:
    """Traffic goes on; a sandbox made anew of a known pod gets its network; a pod that nobody told of fails with the
    reason; when the server is back all is as it should be."""
    near = lab.pod("near")["metadata"]
    path = ["/run/netns/fimaway1", "/run/netns/fimaway2"]
    for one in path:
        assert lab.run("node/node1", "ip", "netns", "add", one.rpartition("/")[2]).returncode == 0
    with Traffic(lab):
        lab.kill("control/apiserver")
        lab.wait("the agent notices", lambda: not agent(lab, "node1", "status")["api_server"]["connected"])
        code, result = cni(lab, "ADD", "away1", path[0], "near", near["uid"])
        assert code == 0, result
        known = [e for e in agent(lab, "node1", "endpoints") if e["pod"] == "near"]
        assert len({e["identity"] for e in known}) == 1 and len(known) == 2, known
        code, said = cni(lab, "ADD", "away2", path[1], "stranger", "")
        assert code == 1 and said["code"] == 11, said
        assert "stranger is not known to the API server" in said["msg"] and said["details"], said
        assert ready(lab, "node1")
        lab.restart("control/apiserver")
        began = time.monotonic()
        lab.wait("it is followed again", lambda: connected(lab), 60)
        print(f"followed again {time.monotonic() - began:.1f} s after it was back")
        assert cni(lab, "DEL", "away1", "", "near", near["uid"])[0] == 0
        wait_settled(lab)
    for one in path:
        lab.run("node/node1", "ip", "netns", "delete", one.rpartition("/")[2])
    lab.wait("the report is the pod's own again", lambda: reported_addresses(lab, "near") == set(lab.addresses("near")))


def connected(lab: Lab) -> bool:
    return all(agent(lab, n, "status")["api_server"]["connected"] for n in lab.spec.node_names)


FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")


@pytest.mark.parametrize("shift", ["+5h", "-5h"])
def test_a_clock_that_is_wrong(lab: Lab, shift: str) -> None:
    """An agent whose wall clock is hours ahead, or behind: connections and new pods don't depend on it, for all
    lifetimes are counted by the monotonic clock. A clock before the server's certificate is named as what it is."""
    assert FAKETIME.exists(), "apt-get install libfaketime"
    lab.kill("node2/agent")
    argv = components.agent(lab.spec, lab.paths, "node2").argv()
    settings = [f"LD_PRELOAD={FAKETIME}", f"FAKETIME={shift}", "FAKETIME_DONT_FAKE_MONOTONIC=1"]
    log = lab.paths.logs / "node2-skewed.log"
    with log.open("w") as out:
        skewed = subprocess.Popen(
            lab.argv("node/node2", "env", *settings, *argv), stdout=out, stderr=out, env=components.ENVIRONMENT
        )
    try:
        if shift.startswith("-"):
            lab.wait("it says why", lambda: "certificate is not yet valid" in log.read_text(), 60)
            wait_answers(lab, "client", "far", 5)
            return
        with Traffic(lab):
            lab.wait("it is ready", lambda: ready(lab, "node2"), 60)
            lab.apply(pod("skewed", "node2"))
            lab.wait_ready(["skewed"])
            time.sleep(12)  # more than a walk over the connections
        wait_answers(lab, "client", "skewed")
        wait_settled(lab)
        lab.delete(pod("skewed", "node2"))
        lab.wait("it is gone", lambda: all(e["pod"] != "skewed" for e in agent(lab, "node2", "endpoints")))
    finally:
        skewed.terminate()
        skewed.wait(timeout=20)
        lab.restart("node2/agent")
        wait_settled(lab)
