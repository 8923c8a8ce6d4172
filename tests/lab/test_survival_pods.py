"""Pods come and go while agents die, namespaces vanish and maps are full: nothing leaks, everybody becomes Ready."""

import json
import random
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest
from traffic import agent, metric, node_root, pod, ready, set_options, wait_settled

from fimbria.lab.handle import Lab


@pytest.fixture(scope="module")
def lab(make_lab: Callable[..., Lab]) -> Lab:
    return make_lab(nodes=2)


@pytest.fixture(autouse=True)
def _nothing_left(lab: Lab) -> Iterator[None]:
    yield
    wait_settled(lab)
    for node in lab.spec.node_names:
        lab.wait(f"nothing is left on {node}", lambda n=node: leftovers(lab, n) == [])  # type: ignore[misc]


def leftovers(lab: Lab, node: str) -> list[str]:
    """What a node has that belongs to no pod of its agent, in all places where ADD leaves something."""
    known = agent(lab, node, "endpoints")
    names = {e["interface"] for e in known}
    shown = json.loads(lab.run(f"node/{node}", "ip", "-j", "link", "show", "type", "veth").stdout or "[]")
    found = [d["ifname"] for d in shown if d["ifname"].startswith("fim") and d["ifname"] not in names | NODE_DEVICES]
    files = {p.stem for p in (node_root(lab, node) / "run/fimbria/state/endpoints").iterdir()}
    found += [f"journal {name}" for name in files ^ {str(e["id"]) for e in known}]
    status = agent(lab, node, "status")
    for family in ("ipv4", "ipv6"):
        used = status["ipam"][family]["used"]
        if used != len(known):
            found.append(f"{used} {family} addresses of {len(known)} endpoints")
    rows = status["rows"]
    if rows["endpoints"] != len(known) or rows["local_addrs"] != 2 * len(known):
        found.append(f"rows {rows}")
    return found


NODE_DEVICES = {"fimbria_host", "fimbria_net", "fimbria_vxlan"}


def cni(lab: Lab, command: str, container: str, netns: str = "", pod_name: str = "") -> list[str]:
    """The command line of a CNI request of our own on node1."""
    args = f"IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME={pod_name}" if pod_name else ""
    env = {"COMMAND": command, "CONTAINERID": container, "NETNS": netns, "IFNAME": "eth0", "PATH": "/x", "ARGS": args}
    config = '{"cniVersion":"1.1.0","name":"fimbria","type":"fimbria-cni"}'
    quoted = [f"CNI_{k}={v}" for k, v in env.items() if v]
    # The plugin reads its standard input to the end.
    script = 'printf %s "$1" | /opt/cni/bin/fimbria-cni'
    return lab.argv("node/node1", "env", *quoted, "sh", "-c", script, "sh", config)


def request(lab: Lab, command: str, container: str, netns: str = "") -> tuple[int, dict[str, object]]:
    done = subprocess.run(cni(lab, command, container, netns), capture_output=True, text=True, check=False)
    return done.returncode, json.loads(done.stdout) if done.stdout else {}


def netns(lab: Lab, name: str) -> str:
    assert lab.run("node/node1", "ip", "netns", "add", name).returncode == 0
    return f"/run/netns/{name}"


def test_add_repeated_and_del_of_anything(lab: Lab) -> None:
    path = netns(lab, "fimsurv1")
    code, result = request(lab, "ADD", "surv1", path)
    assert code == 0 and len(result["ips"]) == 2, result  # type: ignore[arg-type]
    code, result = request(lab, "ADD", "surv1", path)
    assert code != 0 and "exists already" in str(result["msg"])
    for _ in range(2):
        assert request(lab, "DEL", "surv1", path) == (0, {})
    assert request(lab, "DEL", "surv-unknown", "/run/netns/nowhere") == (0, {})
    assert request(lab, "DEL", "surv-unknown") == (0, {})
    # The namespace goes first, then DEL.
    assert request(lab, "ADD", "surv1", path)[0] == 0
    lab.run("node/node1", "ip", "netns", "delete", "fimsurv1")
    lab.wait("its endpoint is gone", lambda: agent(lab, "node1", "status")["endpoints"] == 0)
    assert "without a CNI DEL" in lab.process_log("node1/agent")
    assert request(lab, "DEL", "surv1", path) == (0, {})


def test_the_namespace_vanishes_during_add(lab: Lab) -> None:
    chance = random.Random(7)
    for n in range(12):
        path = netns(lab, f"fimgone{n}")
        add = subprocess.Popen(cni(lab, "ADD", f"gone{n}", path), stdout=subprocess.PIPE, text=True)
        time.sleep(chance.uniform(0.0, 0.06))
        lab.run("node/node1", "ip", "netns", "delete", f"fimgone{n}")
        out, _ = add.communicate(timeout=20)
        assert json.loads(out), "a result or an error, never nothing"
    # No DEL at all: as if the runtime had died with it.
    lab.wait("nothing is left", lambda: leftovers(lab, "node1") == [])


def test_a_storm_of_pods_while_agents_die(lab: Lab) -> None:
    names = [f"storm{i}" for i in range(24)]
    manifest = "".join(pod(n, f"node{i % 2 + 1}", sleeps=True) for i, n in enumerate(names))
    chance = random.Random(11)
    lab.apply(manifest)
    for _ in range(5):
        node = chance.choice(lab.spec.node_names)
        time.sleep(chance.uniform(0.02, 0.4))
        lab.kill(f"{node}/agent")
        lab.restart(f"{node}/agent")
        lab.wait("its socket is there", lambda n=node: ready(lab, n))  # type: ignore[misc]
    lab.wait_ready(names, 120)
    assert len({a for n in names for a in lab.addresses(n)}) == 2 * len(names)
    wait_settled(lab)
    for node in lab.spec.node_names:  # interfaces of an ADD that failed are removed in the background
        lab.wait(f"nothing is left on {node}", lambda n=node: leftovers(lab, n) == [])  # type: ignore[misc]
    lab.delete(manifest)
    for _ in range(3):
        time.sleep(chance.uniform(0.02, 0.3))
        lab.kill("node1/agent")
        lab.restart("node1/agent")
        lab.wait("its socket is there", lambda: ready(lab, "node1"))
    lab.wait("all are gone", lambda: not any(agent(lab, n, "endpoints") for n in lab.spec.node_names), 30)


def test_pods_deleted_and_agent_restarted_while_the_api_server_is_away(lab: Lab) -> None:
    lab.apply("".join(pod(n, "node1", app="server") for n in ("stays", "goes")) + pod("other", "node2", sleeps=True))
    lab.wait_ready(["stays", "goes", "other"])
    stays, goes = lab.addresses("stays"), lab.addresses("goes")
    argv = {n: lab.argv(n, *probe(lab, stays[0])) for n in ("other",)}
    lab.kill("control/apiserver")
    lab.kill("node1/agent")
    lab.restart("node1/agent")
    deadline = time.monotonic() + 4
    while time.monotonic() < deadline:
        done = subprocess.run(argv["other"], capture_output=True, text=True, check=False)
        assert json.loads(done.stdout.splitlines()[0])["result"] == "ok", done
        time.sleep(0.2)
    assert not ready(lab, "node1")
    lab.restart("control/apiserver")
    wait_settled(lab)
    lab.delete(pod("goes", "node1"))
    lab.wait("it is gone", lambda: len(agent(lab, "node1", "endpoints")) == 1)
    assert all(lab.probe("other", "tcp", a, 9000)["result"] == "ok" for a in stays)
    assert all(lab.probe("other", "tcp", a, 9000, "--timeout", "300")["result"] != "ok" for a in goes)
    lab.delete(pod("stays", "node1") + pod("other", "node2"))
    lab.wait("all are gone", lambda: not any(agent(lab, n, "endpoints") for n in lab.spec.node_names), 30)


def probe(lab: Lab, address: str) -> tuple[str, ...]:
    from fimbria.lab import kernel

    return kernel.binary("labtool"), "probe", "tcp", address, "9000"


def test_a_full_map(lab: Lab) -> None:
    """The error names the map and the prefix, what is enforced stays, and room heals it."""
    lab.apply("".join(pod(n, "node1", app="server") for n in ("first", "second")) + pod("other", "node2", sleeps=True))
    lab.wait_ready(["first", "second", "other"])
    # Pods of other nodes come a moment later, and those of former tests go a moment later.
    pods = {a for name in ("first", "second", "other") for a in lab.addresses(name)}
    lab.wait("node1 knows these pods and no others", lambda: known_pods(lab, "node1") == pods)
    wanted = agent(lab, "node1", "status")["rows"]["ipcache"]
    set_options(lab, f"ipcache-entries={wanted}")  # exactly full
    lab.kill("node1/agent")
    lab.restart("node1/agent")
    wait_settled(lab)
    set_options(lab)
    lab.apply(pod("third", "node1"))

    def message() -> str:
        states = lab.pod("third")["status"].get("containerStatuses", ())
        return next((m for c in states if "full" in (m := c["state"].get("waiting", {}).get("message", ""))), "")

    said = lab.wait("the CNI error says so", message)
    assert f"map ipcache is full ({wanted} entries): no room for prefix" in said, said
    assert "map ipcache is full" in lab.process_log("node1/agent")
    assert all(lab.probe("other", "tcp", a, 9000)["result"] == "ok" for a in lab.addresses("first"))
    # Another node's pod has no room either: that is nobody's ADD, so it shows in the status and as a metric.
    lab.apply(pod("fourth", "node2", sleeps=True))
    lab.wait_ready(["fourth"])
    lab.wait("it fails", lambda: agent(lab, "node1", "status")["failures"].get("ipcache"))
    assert metric(lab, "node1", "fimbria_failed_rows", target="ipcache") > 0
    assert metric(lab, "node1", "fimbria_bpf_map_pressure", map_name="ipcache") >= 1
    lab.delete(pod("fourth", "node2"))
    lab.delete(pod("second", "node1"))
    lab.wait_ready(["third"], 60)
    lab.delete("".join(pod(n, "node1") for n in ("first", "third", "other")))
    lab.wait("all are gone", lambda: not any(agent(lab, n, "endpoints") for n in lab.spec.node_names), 30)


def known_pods(lab: Lab, node: str) -> set[str]:
    """Addresses that a node's kernel knows as a pod's."""
    rows = agent(lab, node, "maps/ipcache")
    return {r["key"]["prefix"].partition("/")[0] for r in rows if r["value"]["identity"] > 255}


def closed(name: str) -> str:
    """A policy that lets only the node in."""
    return f"""
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: {name}}}
spec:
  podSelector: {{matchLabels: {{app: {name}}}}}
  ingress: [{{from: [{{podSelector: {{matchLabels: {{friend-of: {name}}}}}}}]}}]
---
"""


def test_no_room_for_another_set_of_rules(lab: Lab) -> None:
    """A pod whose policy doesn't fit is not opened, and its ADD says why; the others' policies stay in force."""
    set_options(lab, "policy-sets=1")
    lab.kill("node1/agent")
    lab.restart("node1/agent")
    wait_settled(lab)
    set_options(lab)
    lab.apply(closed("held") + pod("held", "node1") + pod("asks", "node1", sleeps=True))
    lab.wait_ready(["held", "asks"])
    lab.apply(closed("late"))
    lab.wait("both policies are known", lambda: agent(lab, "node1", "status")["policies"] == 2)
    lab.apply(pod("late", "node1"))

    def message() -> str:
        states = lab.pod("late")["status"].get("containerStatuses", ())
        return next((m for c in states if "full" in (m := c["state"].get("waiting", {}).get("message", ""))), "")

    said = lab.wait("the CNI error says so", message)
    assert "policy set" in said, said
    assert "apply: policy set" in lab.process_log("node1/agent")
    held = lab.addresses("held")[0]
    assert lab.probe("asks", "tcp", held, 9000, "--timeout", "300")["result"] != "ok"
    lab.delete(pod("held", "node1"))
    lab.wait_ready(["late"], 60)
    assert lab.probe("asks", "tcp", lab.addresses("late")[0], 9000, "--timeout", "300")["result"] != "ok"
    lab.delete(closed("held") + closed("late") + pod("late", "node1") + pod("asks", "node1"))
    lab.wait("all are gone", lambda: not any(agent(lab, n, "endpoints") for n in lab.spec.node_names), 30)
