"""Local redirects, pods that see addresses as they are, and Maglev's table over real connections."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from balance import FAMILIES, TCP, UDP, Front, ask, server, service, wait_answers
from traffic import agent, pod, wait_settled

from fimbria.lab.handle import Lab

METADATA = "169.254.169.254"
TARGETS = [{"port": "9000", "protocol": "TCP", "name": "tcp"}, {"port": "9001", "protocol": "UDP", "name": "udp"}]
FRONTS = [{"port": "80", "protocol": "TCP", "name": "tcp"}, {"port": "81", "protocol": "UDP", "name": "udp"}]


def policy(name: str, frontend: dict[str, Any], app: str, targets: list[dict[str, str]] = TARGETS, **more: Any) -> str:
    selector = {"matchLabels": {"app": app}}
    spec = {
        "redirectFrontend": frontend, "redirectBackend": {"localEndpointSelector": selector, "toPorts": targets},
    } | more  # fmt: skip
    body = {"apiVersion": "cilium.io/v2", "kind": "CiliumLocalRedirectPolicy", "metadata": {"name": name}, "spec": spec}
    return json.dumps(body) + "\n---\n"


def valid(lab: Lab, name: str) -> str:
    """The condition Valid, and its message."""
    path = f"/apis/cilium.io/v2/namespaces/default/ciliumlocalredirectpolicies/{name}"
    conditions = (lab.request("GET", path).get("status") or {}).get("conditions") or [{}]
    return f"{conditions[0].get('status', '')} {conditions[0].get('message', '')}"


@pytest.fixture(scope="module")
def lab(make_lab: Callable[..., Lab]) -> Lab:
    lab = make_lab(nodes=2)
    lab.apply(server("cache1", "node1", "cache") + server("far", "node2", "web") + service("web", app="web"))
    mesh = json.loads(pod_json("mesh", "node1"))
    mesh["metadata"]["annotations"] = {"fimbria.io/socket-services": "off"}
    lab.apply(pod("client1", "node1", sleeps=True) + pod("client2", "node2", sleeps=True) + json.dumps(mesh))
    lab.wait_ready(["cache1", "far", "client1", "client2", "mesh"])
    return lab


def pod_json(name: str, node: str) -> str:
    container = {"name": "main", "image": "fimbria/labtool", "command": ["labtool", "sleep"]}
    spec = {"nodeName": node, "terminationGracePeriodSeconds": 0, "containers": [container]}
    return json.dumps({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec})


@pytest.fixture(autouse=True)
def _settled(lab: Lab) -> Iterator[None]:
    yield
    wait_settled(lab)


def names(lab: Lab, source: str, host: str, *, count: int = 4) -> set[str]:
    """Who answers, over both protocols."""
    found = [
        ask(lab, source, proto, host, port, count=count, timeout=700) for proto, port in (("tcp", TCP), ("udp", UDP))
    ]
    return {name for one in found for name in (one.names or ("",))}


def test_a_service_is_served_by_the_local_pod_while_there_is_one(lab: Lab) -> None:
    front = Front(lab, "web")
    wanted = policy("web", {"serviceMatcher": {"serviceName": "web", "namespace": "default"}}, "cache")
    for family in FAMILIES:
        lab.wait("the Service answers", lambda f=family: names(lab, "client1", front.cluster_ip(f)) == {"far"})
    lab.apply(wanted)
    try:
        for family in FAMILIES:
            host = front.cluster_ip(family)
            lab.wait("node1 is redirected", lambda h=host: names(lab, "client1", h) == {"cache1"})
            assert names(lab, "node/node1", host) == {"cache1"}
            assert names(lab, "client2", host) == {"far"}, "node2 has no such pod"
        lab.wait("the status says so", lambda: valid(lab, "web").startswith("True"))
        lab.delete(server("cache1", "node1", "cache"))
        lab.wait("the Service goes on", lambda: names(lab, "client1", front.cluster_ip(4)) == {"far"})
        lab.apply(server("cache1", "node1", "cache"))
        lab.wait("and is redirected again", lambda: names(lab, "client1", front.cluster_ip(4)) == {"cache1"})
    finally:
        lab.delete(wanted)
    lab.wait("the Service is back", lambda: names(lab, "client1", front.cluster_ip(4)) == {"far"})


def test_an_address_is_redirected_but_not_for_the_backend_itself(lab: Lab) -> None:
    frontend = {"addressMatcher": {"ip": METADATA, "toPorts": FRONTS}}
    wanted = policy("metadata", frontend, "cache", skipRedirectFromBackend=True)
    lab.apply(wanted)
    try:
        lab.wait("it is redirected", lambda: names(lab, "client1", METADATA) == {"cache1"})
        assert names(lab, "node/node1", METADATA) == {"cache1"}
        assert names(lab, "cache1", METADATA) == {""}, "the backend sees the address itself, which is nobody's"
        assert names(lab, "client2", METADATA) == {""}
    finally:
        lab.delete(wanted)
    lab.wait("it is gone", lambda: names(lab, "client1", METADATA) == {""})
    lab.wait("no exemption is left", lambda: not agent(lab, "node1", "maps/service_exempt")[1:])


def test_a_policy_that_is_wrong_says_so(lab: Lab) -> None:
    wrong = policy("wrong", {"addressMatcher": {"ip": "nowhere", "toPorts": FRONTS}}, "cache")
    lab.apply(wrong)
    try:
        lab.wait("its status says why", lambda: "'nowhere' is not an IP address" in valid(lab, "wrong"))
    finally:
        lab.delete(wrong)


def test_sockets_of_a_mesh_sidecars_pod_see_the_cluster_ip(lab: Lab) -> None:
    """The pod's traffic is translated by packet: the socket's peer stays the cluster IP, and it works."""
    front = Front(lab, "web")
    wait_answers(lab, "mesh", front.cluster_ip(4), TCP)
    assert names(lab, "mesh", front.cluster_ip(4)) == {"far"}
    assert len(agent(lab, "node1", "maps/service_exempt")) == 1
    assert not agent(lab, "node2", "maps/service_exempt")
    mesh = lab.start("mesh", "labtool", "rr", "tcp", front.cluster_ip(4), str(TCP), "--seconds", "60")
    try:
        packed = bytes(map(int, front.cluster_ip(4).split(".")))[::-1].hex().upper()
        established = "01"  # proc(5), /proc/net/tcp: the peer, then the state
        row = f" {packed}:{TCP:04X} {established} "
        lab.wait("it is connected", lambda: row in lab.run("mesh", "cat", "/proc/net/tcp").stdout)
    finally:
        mesh.kill()
        mesh.wait()


def test_maglev_tables_are_the_same_on_every_node(lab: Lab) -> None:
    lab.apply(server("m1", "node1", "m") + server("m2", "node2", "m"))
    text = service("m", app="m", type="NodePort", annotations={"service.cilium.io/lb-algorithm": "maglev"})
    lab.apply(text)
    lab.wait_ready(["m1", "m2"])
    port = Front(lab, "m").node_port(TCP)

    def tables(node: str) -> dict[str, Any]:
        """By digest of who has which entry: the numbers of services and backends are each node's own."""
        return {t["digest"]: t for t in agent(lab, node, "maps/service_tables")}

    lab.wait("four tables of two backends", lambda: [len(t["backends"]) for t in tables("node1").values()] == [2] * 4)
    lab.wait("node2 has the same", lambda: tables("node2").keys() == tables("node1").keys())
    for table in tables("node1").values():
        assert table["entries"] == 16381
        assert set(table["backends"].values()) == {8190, 8191}
    for node in ("node1", "node2"):
        wait_answers(lab, "node/world", lab.spec.node(node).ipv4, port)
        found = ask(lab, "node/world", "tcp", lab.spec.node(node).ipv4, port)
        assert found.ok and set(found.names) == {"m1", "m2"}
    lab.delete(text + server("m1", "node1", "m") + server("m2", "node2", "m"))
    lab.wait("tables go with their Service", lambda: not tables("node1"))
