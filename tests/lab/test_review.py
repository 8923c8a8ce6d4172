"""Attacks with real packets and real objects: a pod that forges tunnel packets and advertisements, objects that claim
what they may not, and junk of every kind."""

import json
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from traffic import UDP, agent, pod, wait_settled

from fimbria.lab import state
from fimbria.lab.handle import Lab

POLICY = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: victims}
spec:
  podSelector: {matchLabels: {app: victim}}
  policyTypes: [Ingress]
  ingress: [{from: [{podSelector: {matchLabels: {app: friend}}}]}]
"""
CILIUM = "/apis/cilium.io/v2"
# Says "ready"; told (SIGTERM) that all has been sent, a second later how many frames with the needle came in.
SNIFF = """
import signal, socket, sys, time
end = None

def tell(*_):
    global end
    end = time.monotonic() + 1

signal.signal(signal.SIGTERM, tell)
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)); s.settimeout(0.1)
print("ready", flush=True)
seen = 0
while True:
    try: data, where = s.recvfrom(65535)
    except TimeoutError:
        if end is not None and time.monotonic() > end: break
        continue
    seen += sys.argv[1].encode() in data and where[2] != 4
print(seen)
"""
SEND = """
import json, sys
from scapy.all import *
conf.verb = 0
a = json.loads(sys.argv[1])
E = Ether(src=get_if_hwaddr("eth0"), dst=a["gateway"])
T = VXLAN(flags=8, vni=a["friend_id"]) / Ether() / IP(src=a["friend"][0], dst=a["far"][0]) / UDP(dport=9001) / b"T-EVIL"
outer = UDP(sport=5555, dport=8472)
A = ICMPv6ND_NA(tgt=a["evil"][1]) / ICMPv6NDOptDstLLAddr(lladdr=get_if_hwaddr("eth0")) / b"A-EVIL"
for packet in (
    IP(src=a["evil"][0], dst=a["node2"][0]) / outer / T, IPv6(src=a["evil"][1], dst=a["node2"][1]) / outer / T,
    *(IPv6(src=a["evil"][1], dst=d, hlim=255) / A for d in (a["near"][1], a["friend"][1])),
    IP(src=a["evil"][0], dst=a["friend"][0]) / UDP(dport=9) / b"C-EVIL",
):
    sendp([E / packet] * 3, iface="eth0")
"""


@pytest.fixture(scope="module")
def lab(make_lab: Callable[..., Lab]) -> Lab:
    lab = make_lab(nodes=2)
    lab.apply(pod("evil", "node1", sleeps=True) + pod("friend", "node1", sleeps=True) + POLICY)
    lab.apply(pod("near", "node1", "victim") + pod("far", "node2", "victim"))
    lab.wait_ready(["evil", "friend", "near", "far"])
    for victim in ("near", "far"):  # another node hears of a pod a moment after it is Ready
        lab.wait(f"{victim} knows its friend", partial(talks, lab, "friend", victim))
    return lab


def talks(lab: Lab, source: str, target: str) -> bool:
    answer = lab.probe(source, "udp", lab.addresses(target)[0], UDP, "--timeout", "500")
    return bool(answer["result"] == "ok")


def friend_identity(lab: Lab) -> tuple[int, dict[str, str]]:
    found = lab.request("GET", f"{CILIUM}/ciliumidentities")["items"]
    one = next(i for i in found if i["security-labels"].get("k8s:app") == "friend")
    return int(one["metadata"]["name"]), one["security-labels"]


def test_forged_packets_reach_nobody(lab: Lab) -> None:
    assert not talks(lab, "evil", "far") and talks(lab, "friend", "far")
    known: dict[str, Any] = {name: lab.addresses(name) for name in ("evil", "friend", "near", "far")}
    nodes = {n["name"]: n["addresses"] for n in agent(lab, "node1", "nodes")}
    hosts = {e["pod"]: e for e in agent(lab, "node1", "endpoints")}
    gateway = lab.run("node/node1", "cat", f"/sys/class/net/{hosts['evil']['interface']}/address").stdout.strip()
    known |= {"node2": nodes["node2"], "gateway": gateway, "friend_id": friend_identity(lab)[0]}
    watched = {("far", "T-EVIL"): 0, ("near", "A-EVIL"): 0, ("friend", "A-EVIL"): 0, ("friend", "C-EVIL"): 3}
    sniffers = {w: lab.start(w[0], sys.executable, "-c", SNIFF, w[1]) for w in watched}
    for sniffer in sniffers.values():
        assert sniffer.stdout is not None and sniffer.stdout.readline() == "ready\n"
    done = lab.run("evil", sys.executable, "-c", SEND, json.dumps(known))
    assert done.returncode == 0, done.stderr
    for sniffer in sniffers.values():
        sniffer.send_signal(signal.SIGTERM)
    seen = {w: int(s.communicate()[0].split()[-1]) for w, s in sniffers.items()}
    assert seen == watched, "only the control packets came through"


@pytest.mark.parametrize("name", ["abc", "0", "2", "16777300"])
def test_an_identity_with_a_strange_name_opens_nothing(lab: Lab, name: str) -> None:
    body = {"apiVersion": "cilium.io/v2", "kind": "CiliumIdentity", "metadata": {"name": name}}
    lab.request("POST", f"{CILIUM}/ciliumidentities", body | {"security-labels": friend_identity(lab)[1]})
    lab.wait("the agent has seen it", lambda: f"the name {name!r} is no identity's" in lab.process_log("node1/agent"))
    time.sleep(0.3)
    assert not talks(lab, "evil", "near") and talks(lab, "friend", "near")
    lab.request("DELETE", f"{CILIUM}/ciliumidentities/{name}")


def test_a_service_with_the_api_servers_address_locks_no_agent_out(lab: Lab) -> None:
    """By `externalIPs` anybody may name any address. An agent that starts then would ask the Service's pods for the
    cluster's state, and never hear that the Service is gone."""
    server, _, port = agent(lab, "node1", "status")["api_server"]["server"].removeprefix("https://").rpartition(":")
    body = {
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "thief"},
        "spec": {
            "selector": {"app": "victim"}, "externalIPs": [server],
            "ports": [{"name": "api", "port": int(port), "targetPort": 9000}],
        },
    }  # fmt: skip
    lab.apply(json.dumps(body))

    def told() -> bool:
        return any(f"port {port} of {server} already" in w for s in services() for w in s["warnings"])

    def services() -> list[dict[str, Any]]:
        return [s for s in agent(lab, "node1", "services") if s["service"] == "default/thief"]

    def ready() -> bool:
        with suppress(OSError):
            return bool(agent(lab, "node1", "status")["ready"])
        return False

    lab.wait("the Service is told", told)
    lab.kill("node1/agent")
    lab.restart("node1/agent")
    lab.wait("the agent is ready again", ready)
    lab.delete(json.dumps(body))
    lab.wait("it hears that the Service is gone", lambda: not services())


def test_junk_takes_no_agent_down(lab: Lab) -> None:
    before = [state.recall(lab.paths, f"node{n}/agent") for n in (1, 2)]
    own = agent(lab, "node1", "nodes")

    def post(path: str, kind: str, name: str, **content: Any) -> None:
        body = {"apiVersion": "cilium.io/v2", "kind": kind, "metadata": {"name": name}, **content}
        lab.request("POST", CILIUM + path, body)

    def node(name: str, addresses: list[str], *blocks: str) -> None:
        spec = {"addresses": [{"type": "InternalIP", "ip": a} for a in addresses], "ipam": {"podCIDRs": list(blocks)}}
        post("/ciliumnodes", "CiliumNode", name, spec=spec)

    node("j-words", ["node.example.com"], "nonsense", "10.300.0.0/33")
    node("j-all", ["172.31.77.1"], "0.0.0.0/0", "::/0")
    node("j-thief", ["172.31.1.10", "172.31.1.10"], "10.244.0.0/24", "10.244.1.0/24")
    node("j-many", ["172.31.78.1"], *(f"10.{100 + n // 256}.{n % 256}.0/24" for n in range(3000)))
    for number, status in enumerate((
        {"identity": {"id": 1}, "networking": {"addressing": [{"ipv4": "10.9.9.9"}], "node": "172.31.2.10"}},
        {"identity": {"id": 300}, "networking": {"addressing": [{"ipv4": "junk"}], "node": "junk"}},
        {"identity": {"id": 300}, "networking": {"addressing": [{"ipv4": "172.31.1.10"}], "node": "172.31.2.10"}},
        {"identity": {"id": -5}, "networking": {"addressing": [{"ipv4": "10.9.9.9"}], "node": "172.31.2.10"}},
    )):  # fmt: skip
        post("/namespaces/default/ciliumendpoints", "CiliumEndpoint", f"j{number}", status=status)
    many = {"cidr": "0.0.0.0/0", "except": [f"9.{n // 256}.{n % 256}.0/24" for n in range(3000)]}
    spec = {"endpointSelector": {"matchLabels": {"app": "evil"}}, "ingress": [{"fromCIDRSet": [many]}]}
    post("/namespaces/default/ciliumnetworkpolicies", "CiliumNetworkPolicy", "j-large", spec=spec)
    post("/namespaces/default/ciliumnetworkpolicies", "CiliumNetworkPolicy", "j-empty", spec={})
    wait_settled(lab, 60)
    assert [state.recall(lab.paths, f"node{n}/agent") for n in (1, 2)] == before
    assert {n["name"] for n in own} <= {n["name"] for n in agent(lab, "node1", "nodes")}
    assert talks(lab, "friend", "near") and talks(lab, "friend", "far") and talks(lab, "node/node1", "near")
    assert not talks(lab, "evil", "near") and not talks(lab, "evil", "far")
