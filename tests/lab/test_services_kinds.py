"""Every kind of frontend, from everywhere, by both routings and families: who answers, and whom the server sees.

Servers are `near` (node1) and `far` (node2); node3 has none. Clients are the pod `client` (node1), the host node1, and
the outside world.
"""

import json
import signal
from collections.abc import Callable, Iterator
from functools import partial

import pytest
from balance import (
    EXTERNAL,
    FAMILIES,
    TCP,
    UDP,
    Front,
    ask,
    node_address,
    node_addresses,
    script,
    server,
    service,
    wait_answers,
    world_address,
)
from traffic import metric, pod, starved, wait_settled

from fimbria.lab import kernel
from fimbria.lab.handle import Lab

NODES = ("node1", "node2", "node3")
CLIENTS = {"pod": "client", "host": "node/node1", "world": "node/world"}
PROTOCOLS = {"tcp": TCP, "udp": UDP}
TWIN_PORTS = 45017, 55017  # the second is one that nodes use for masquerading
STICKY = 3  # seconds that the Service `sticky` remembers a client
# Last bytes of more addresses of the world: so many that chance doesn't give all of them one backend, or each the same
# one twice (once in billions).
MANY = [198 - n for n in range(34)]


def host_port_pod(name: str, node: str) -> str:
    container = {"name": "main", "image": "fimbria/labtool", "ports": [
        {"containerPort": 9000, "hostPort": 8181}, {"containerPort": 9001, "hostPort": 8181, "protocol": "UDP"},
    ]}  # fmt: skip
    spec = {"nodeName": node, "terminationGracePeriodSeconds": 0, "containers": [container]}
    body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": name}}, "spec": spec}
    return json.dumps(body) + "\n---\n"


MANIFESTS = (
    pod("client", "node1", sleeps=True)
    + pod("client2", "node1", sleeps=True)
    + server("near", "node1")
    + server("far", "node2")
    + server("alone", "node2", "alone")
    + service("both", type="LoadBalancer", externalIPs=list(EXTERNAL.values()))
    + service("local", type="LoadBalancer", externalTrafficPolicy="Local")
    + service("inside", internalTrafficPolicy="Local")
    + service("empty", app="nobody", type="LoadBalancer")
    + service("one", app="alone", type="NodePort")
    + service("two", app="alone", type="NodePort")
    + service("ranged", type="LoadBalancer", loadBalancerSourceRanges=["198.51.100.10/32", "2001:db8::10/128"])
    + service(
        "barred", type="LoadBalancer", loadBalancerSourceRanges=["198.51.100.10/32", "2001:db8::10/128"],
        annotations={"service.cilium.io/src-ranges-policy": "deny"},
    )
    + service(
        "sticky", type="NodePort", sessionAffinity="ClientIP",
        sessionAffinityConfig={"clientIP": {"timeoutSeconds": STICKY}},
    )
    + service("loyal", type="NodePort", sessionAffinity="ClientIP")
)  # fmt: skip


@pytest.fixture(scope="module", params=["overlay", "native"])
def lab(request: pytest.FixtureRequest, make_lab: Callable[..., Lab]) -> Iterator[Lab]:
    lab = make_lab(nodes=3, routing=request.param)
    lab.apply(MANIFESTS)
    lab.wait_ready(["client", "client2", "near", "far", "alone"])
    for family, address in EXTERNAL.items():
        route = ["route", "add", address, "via", node_address(lab, "node3", family)]
        assert lab.run("node/fabric", "ip", *route).returncode == 0
    more = "dev eth0 preferred_lft 0"  # for who asks for it only
    lines = [f"address add 198.51.100.{n}/24 {more}" for n in MANY]
    lines += [f"address add 2001:db8::{n}/64 {more} nodad" for n in MANY]
    done = lab.run("node/world", "ip", "-batch", "-", stdin="\n".join(lines) + "\n")
    assert done.returncode == 0, done.stderr
    # From the beginning: a port can't be bound for a minute after somebody's connection from it.
    reserve = {"net/ipv4/ip_local_reserved_ports": ",".join(f"{p}-{p + 1}" for p in TWIN_PORTS)}
    kernel.in_netns(lab.paths.netns("world"), partial(kernel.write_sysctls, reserve))
    # The Service made last, through every node: then all of them know all.
    front = Front(lab, "loyal")
    for family in FAMILIES:
        for node in NODES:
            wait_answers(lab, "node/world", node_address(lab, node, family), front.node_port(TCP))
    front = Front(lab, "both")
    for client, node in (*(("node/world", n) for n in NODES), ("client", "node3"), ("node/node1", "node3")):
        for family in FAMILIES:
            where = node_address(lab, node, family), front.node_port(TCP)
            wait_answers(lab, client, *where, names=("near", "far"))
    yield lab
    wait_settled(lab)


# What doesn't depend on the way between the nodes.
once = pytest.mark.parametrize("lab", ["overlay"], indirect=True, scope="module")


def frontend(lab: Lab, kind: str, family: int, port: int) -> tuple[str, int]:
    """Address and port of the Service `both` of a kind; of a node port also at which node."""
    front = Front(lab, "both")
    what, _, node = kind.partition("@")
    if what == "ClusterIP":
        return front.cluster_ip(family), port
    if what == "NodePort":
        address = {4: "127.0.0.1", 6: "::1"}[family] if node == "loopback" else node_address(lab, node, family)
        return address, front.node_port(port)
    return (front.balancer(family) if what == "LoadBalancer" else EXTERNAL[family]), port


# Where a connection enters the cluster, if that is known: the node there sees to the translation.
KINDS = ["ClusterIP", "NodePort@node1", "NodePort@node2", "NodePort@node3", "LoadBalancer", "ExternalIP"]
WAYS = [(client, kind) for client in CLIENTS for kind in KINDS if (client, kind) != ("world", "ClusterIP")]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("proto", PROTOCOLS)
@pytest.mark.parametrize(("client", "kind"), WAYS)
def test_every_kind_from_everywhere(lab: Lab, client: str, kind: str, proto: str, family: int) -> None:
    host, port = frontend(lab, kind, family, PROTOCOLS[proto])
    got = ask(lab, CLIENTS[client], proto, host, port)
    assert got.ok, got
    assert set(got.names) == {"near", "far"}, got
    nodes = {n: node_addresses(lab, n) for n in NODES}
    if client == "pod":
        assert set(got.peers) == {lab.addresses("client")[family == 6]}
    elif client == "host":
        assert set(got.peers) <= nodes["node1"], got
    else:
        world = {world_address(lab, family)}
        entry = "node3" if kind == "ExternalIP" else kind.partition("@")[2]
        for name, node in (("near", "node1"), ("far", "node2")):
            if entry == node:
                assert got.seen(name) == world, (name, got)
            elif entry:
                assert got.seen(name) <= nodes[entry], (name, got)
            else:
                assert got.seen(name) <= world.union(*nodes.values()), (name, got)


@once
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("proto", PROTOCOLS)
def test_node_ports_answer_on_the_hosts_loopback_only(lab: Lab, proto: str, family: int) -> None:
    host, port = frontend(lab, "NodePort@loopback", family, PROTOCOLS[proto])
    assert set(ask(lab, "node/node3", proto, host, port).names) == {"near", "far"}
    assert not ask(lab, "client", proto, host, port, count=1, timeout=500).names


@once
@pytest.mark.parametrize("family", FAMILIES)
def test_cluster_ips_are_not_served_to_the_world(lab: Lab, family: int) -> None:
    address = Front(lab, "both").cluster_ip(family)
    gateway = lab.spec.world.gateway4 if family == 4 else lab.spec.world.gateway6
    lab.run("node/world", "ip", "route", "add", address, "via", gateway)
    lab.run("node/fabric", "ip", "route", "add", address, "via", node_address(lab, "node1", family))
    try:
        assert not ask(lab, "node/world", "tcp", address, TCP, count=1, timeout=500).names
    finally:
        lab.run("node/world", "ip", "route", "del", address)
        lab.run("node/fabric", "ip", "route", "del", address)


# --- host ports ----------------------------------------------------------------------------------------------------


@once
def test_host_ports(lab: Lab) -> None:
    """From a pod, the node itself, another node and the world; both protocols; and nothing once the pod is gone."""
    lab.apply(host_port_pod("hosted", "node2"))
    lab.wait_ready(["hosted"])
    for family in FAMILIES:
        address = node_address(lab, "node2", family)
        wait_answers(lab, "node/world", address, 8181)
        for client in (*CLIENTS.values(), "node/node2"):
            for proto in PROTOCOLS:
                got = ask(lab, client, proto, address, 8181, count=2)
                assert got.ok and set(got.names) == {"hosted"}, (client, proto, got)
        assert set(ask(lab, "node/world", "tcp", address, 8181, count=1).peers) == {world_address(lab, family)}
        # Another node has no such port.
        assert not ask(lab, "node/world", "tcp", node_address(lab, "node3", family), 8181, count=1, timeout=300).names
    lab.delete(host_port_pod("hosted", "node2"))

    def gone() -> bool:
        results = ask(lab, "node/world", "tcp", node_address(lab, "node2", 4), 8181, count=1, timeout=500).results
        return results == ("refused",)

    lab.wait("the port is the node's own again", gone)


# --- traffic policies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("proto", PROTOCOLS)
def test_external_traffic_policy_local(lab: Lab, proto: str, family: int) -> None:
    """From outside each node serves its own endpoints and keeps the client's address; from inside its own node serves
    a client from all, and another node only from its own, for which the client is outside."""
    front = Front(lab, "local")
    port = front.node_port(PROTOCOLS[proto])
    for node, name in (("node1", "near"), ("node2", "far")):
        got = ask(lab, "node/world", proto, node_address(lab, node, family), port)
        assert got.ok and set(got.names) == {name} and set(got.peers) == {world_address(lab, family)}, (node, got)
    nothing = ask(lab, "node/world", proto, node_address(lab, "node3", family), port, count=1, timeout=500)
    assert nothing.results == ("timeout",), nothing
    for client in ("client", "node/node1"):
        for node, names in (("node1", {"near", "far"}), ("node2", {"far"})):
            where = node_address(lab, node, family)
            assert set(ask(lab, client, proto, where, port).names) == names, (client, where)
        assert not ask(lab, client, proto, node_address(lab, "node3", family), port, count=1, timeout=300).names
        inside = ask(lab, client, proto, front.balancer(family), PROTOCOLS[proto])
        assert set(inside.names) == {"near", "far"}, (client, inside)
    balanced = ask(lab, "node/world", proto, front.balancer(family), PROTOCOLS[proto])
    assert balanced.ok and set(balanced.peers) == {world_address(lab, family)}, balanced


HEALTH = """
import json, sys, urllib.error, urllib.request
for url in sys.argv[1:]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            code, body = answer.status, answer.read()
    except urllib.error.HTTPError as error:
        code, body = error.code, error.read()
    print(json.dumps([code, json.loads(body)]))
"""


@once
def test_the_health_check_port_tells_which_nodes_have_endpoints(lab: Lab) -> None:
    front = Front(lab, "local")
    urls = [f"http://{node_address(lab, n, 4)}:{front.health_port}/healthz" for n in NODES]
    urls.append(f"http://[{node_address(lab, 'node1', 6)}]:{front.health_port}/")
    answers = script(lab, "node/world", HEALTH, *urls)
    assert [code for code, _ in answers] == [200, 200, 503, 200]
    assert [bool(body["localEndpoints"]) for _, body in answers] == [True, True, False, True]
    assert answers[0][1]["service"] == {"namespace": "default", "name": "local"}


@once
def test_terminating_endpoints_serve_when_nobody_else_does(lab: Lab) -> None:
    """The only endpoint of a node that is told to end: the node answers the world on, and its health check says no."""
    lab.apply(server("lingers", "node3", "lingers", linger=15))
    lab.apply(service("lingering", app="lingers", type="LoadBalancer", externalTrafficPolicy="Local"))
    front = Front(lab, "lingering")
    node, port = node_address(lab, "node3", 4), front.node_port(TCP)
    lab.wait_ready(["lingers"])
    wait_answers(lab, "node/world", node, port)
    lab.request("DELETE", "/api/v1/namespaces/default/pods/lingers")
    url = f"http://{node}:{front.health_port}/"
    lab.wait("the health check says no", lambda: script(lab, "node/world", HEALTH, url)[0][0] == 503, 10)
    got = ask(lab, "node/world", "tcp", node, port, count=20)
    assert got.ok and set(got.peers) == {world_address(lab, 4)}, got
    assert ask(lab, "client", "tcp", front.cluster_ip(4), TCP, count=3).ok
    lab.request("DELETE", "/api/v1/namespaces/default/pods/lingers", {"gracePeriodSeconds": 0})

    def refused() -> bool:
        return ask(lab, "client", "tcp", front.cluster_ip(4), TCP, count=1, timeout=500).results == ("refused",)

    lab.wait("it is gone", refused, 15)
    lab.delete(service("lingering", app="lingers"))


@once
@pytest.mark.parametrize("family", FAMILIES)
def test_internal_traffic_policy_local(lab: Lab, family: int) -> None:
    front = Front(lab, "inside")
    assert set(ask(lab, "client", "tcp", front.cluster_ip(family), TCP).names) == {"near"}
    assert set(ask(lab, "node/node2", "tcp", front.cluster_ip(family), TCP).names) == {"far"}
    nobody = ask(lab, "node/node3", "tcp", front.cluster_ip(family), TCP, count=1)
    assert not nobody.names and nobody.results[0] in ("refused", "prohibited", "timeout"), nobody


# --- session affinity -----------------------------------------------------------------------------------------------


# Who answered three connections from each of some addresses; twice, and once more after a pause. One process, for the
# two rounds must not be as far apart as a Service remembers a client.
BY_SOURCE = """
import json, socket, sys, time
host, port, pause, *sources = sys.argv[1:]

def ask(source):
    with socket.create_connection((host, int(port)), 5, (source, 0)) as s:
        s.send(b"who\\n")
        return json.loads(s.recv(500))["name"]

for wait in (0, 0, float(pause)):
    time.sleep(wait)
    print(json.dumps({source: [ask(source) for _ in range(3)] for source in sources}))
"""


@once
@pytest.mark.parametrize("family", FAMILIES)
def test_session_affinity_outside(lab: Lab, family: int) -> None:
    front = Front(lab, "sticky")
    host, port = node_address(lab, "node3", family), front.node_port(TCP)
    sources = [f"198.51.100.{n}" if family == 4 else f"2001:db8::{n}" for n in MANY]
    first, again, later = script(lab, "node/world", BY_SOURCE, host, port, STICKY + 0.5, *sources)
    assert all(len(names) == 3 and len(set(names)) == 1 for names in first.values()), first
    assert {names[0] for names in first.values()} == {"near", "far"}
    assert again == first
    assert later != first, "no client got another backend after the timeout"


@once
def test_session_affinity_inside(lab: Lab) -> None:
    front = Front(lab, "loyal")
    for client in ("client", "client2", "node/node1", "node/node3"):
        names = set(ask(lab, client, "tcp", front.cluster_ip(4), TCP).names)
        assert len(names) == 1, (client, names)
        # Another frontend of the same port of the Service remembers the same choice.
        assert set(ask(lab, client, "tcp", node_address(lab, "node1", 4), front.node_port(TCP), count=4).names) == names


@once
def test_affinity_ends_with_its_backend(lab: Lab) -> None:
    lab.apply(server("third", "node3", "fading") + server("fourth", "node2", "fading"))
    lab.apply(service("fading", app="fading", type="NodePort", sessionAffinity="ClientIP"))
    lab.wait_ready(["third", "fourth"])
    front = Front(lab, "fading")
    places = {"client": (front.cluster_ip(4), TCP), "node/world": (node_address(lab, "node1", 4), front.node_port(TCP))}
    for client, where in places.items():
        wait_answers(lab, client, *where)
    before = {client: set(ask(lab, client, "tcp", *where).names) for client, where in places.items()}
    assert all(len(names) == 1 for names in before.values()), before
    for client, (name,) in before.items():
        lab.delete(pod(name, ""))
        other = {"third": "fourth", "fourth": "third"}[name]
        lab.apply(server(other, {"third": "node3", "fourth": "node2"}[other], "fading"))
        lab.wait_ready([other])

        def moved(client: str = client, other: str = other) -> bool:
            return set(ask(lab, client, "tcp", *places[client], timeout=300).names) == {other}

        lab.wait(f"{client} is served by {other}", moved)
    lab.delete(server("third", "node3") + server("fourth", "node2") + service("fading"))


# --- nobody there ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("proto", PROTOCOLS)
def test_without_backends_connections_are_refused_at_once(lab: Lab, proto: str, family: int) -> None:
    front, port = Front(lab, "empty"), PROTOCOLS[proto]
    fronts = {
        "ClusterIP": (front.cluster_ip(family), port),
        "NodePort": (node_address(lab, "node2", family), front.node_port(port)),
        "LoadBalancer": (front.balancer(family), port),
    }
    for place, client in CLIENTS.items():
        for kind, where in fronts.items():
            if (place, kind) != ("world", "ClusterIP"):
                got = ask(lab, client, proto, *where, count=2, timeout=900)
                assert got.results == ("refused", "refused"), (place, kind, got)


# An echo of what is sent every 20 ms from one socket. Told (SIGTERM) that there should be none any more, it goes on
# until there was none for a second, or until its patience ends; prints whether it became silent.
FLOW = """
import json, signal, socket, sys, time
host, port, patience, connected = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4] == "connected"
told = None

def tell(*_):
    global told
    told = time.monotonic()

signal.signal(signal.SIGTERM, tell)
family = socket.AF_INET6 if ":" in host else socket.AF_INET
s = socket.socket(family, socket.SOCK_DGRAM)
s.settimeout(0.02)
if connected:
    s.connect((host, port))
last, errors, begun = None, [], False
while told is None or time.monotonic() < min(max(last, told) + 1, told + patience):
    try:
        s.send(b"x") if connected else s.sendto(b"x", (host, port))
        s.recv(100)
        last = time.monotonic()
        if not begun:
            print(json.dumps("begun"), flush=True)
            begun = True
    except TimeoutError:
        pass
    except OSError as e:
        if not errors or errors[-1] != e.errno:
            errors.append(e.errno)
    time.sleep(0.02)
print(json.dumps({"silent": time.monotonic() >= last + 1, "errors": errors}))
"""


@once
def test_a_deleted_service_stops_answering_also_those_who_talked_to_it(lab: Lab) -> None:
    """UDP sockets and packet flows of before: from a pod and the host (connected or not), and from the world."""
    text = service("doomed", type="LoadBalancer")
    lab.apply(text)
    front = Front(lab, "doomed")
    node, port = node_address(lab, "node3", 4), front.node_port(UDP)
    wait_answers(lab, "client", front.cluster_ip(4), UDP, "udp")
    wait_answers(lab, "node/world", node, port, "udp")
    places = {
        ("client", "connected"): (front.cluster_ip(4), UDP),
        ("client", "loose"): (front.cluster_ip(6), UDP),
        ("node/node1", "connected"): (node, port),
        ("node/node1", "loose"): (front.cluster_ip(4), UDP),
        ("node/world", "connected"): (node, port),
        ("node/world", "loose"): (node_address(lab, "node1", 6), port),
    }
    running = {
        key: lab.start(key[0], "python3", "-c", FLOW, where[0], str(where[1]), "15", key[1])
        for key, where in places.items()
    }
    try:
        for key, process in running.items():
            assert process.stdout is not None and json.loads(process.stdout.readline()) == "begun", key
        lab.delete(text)
        for process in running.values():
            process.send_signal(signal.SIGTERM)
        outcomes = {key: json.loads(p.communicate(timeout=40)[0].splitlines()[-1]) for key, p in running.items()}
    finally:
        for process in running.values():
            process.kill()
    late = {key: o for key, o in outcomes.items() if not o["silent"]}
    assert not late, f"answers went on after the Service was deleted: {late}"


# --- hairpin ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pod_reaches_itself_through_its_own_service(lab: Lab, family: int) -> None:
    """`alone` is the only backend of the Service `one`."""
    front = Front(lab, "one")
    for proto, port in PROTOCOLS.items():
        for where in (
            (front.cluster_ip(family), port),
            (node_address(lab, "node2", family), front.node_port(port)),
            (node_address(lab, "node1", family), front.node_port(port)),
        ):
            got = ask(lab, "alone", proto, *where, count=3)
            assert got.ok and set(got.names) == {"alone"}, (proto, where, got)


# --- source ranges ---------------------------------------------------------------------------------------------------


@once
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["ranged", "barred"])
def test_source_ranges(lab: Lab, name: str, family: int) -> None:
    front = Front(lab, name)
    listed = world_address(lab, family)
    other = f"198.51.100.{MANY[0]}" if family == 4 else f"2001:db8::{MANY[0]}"
    welcome, unwelcome = (listed, other) if name == "ranged" else (other, listed)
    for proto, port in PROTOCOLS.items():
        where = (front.balancer(family), port)
        assert ask(lab, "node/world", proto, *where, count=4, options=("--source", welcome)).ok
        dropped = ask(lab, "node/world", proto, *where, count=1, timeout=400, options=("--source", unwelcome))
        assert dropped.results == ("timeout",), dropped
        # Node ports aren't restricted.
        by_node = ask(lab, "node/world", proto, node_address(lab, "node3", family), front.node_port(port), count=2)
        assert by_node.ok, by_node
        inside = {c: ask(lab, c, proto, *where, count=1, timeout=400).results for c in ("client", "node/node1")}
        expected = ("timeout",), ("prohibited",)
        assert tuple(inside.values()) == (expected if name == "ranged" else (("ok",), ("ok",))), inside


def out_of_range(lab: Lab) -> float:
    return metric(lab, "node1", "fimbria_drop_count_total", reason="SERVICE_SOURCE_RANGE", direction="egress")


def fenced(*clients: str) -> str:
    """A Service whose load balancer's address is for these clients; inside, other endpoints than outside."""
    ranges = [f"{address}/{128 if ':' in address else 32}" for address in clients]
    return service("fenced", type="LoadBalancer", externalTrafficPolicy="Local", loadBalancerSourceRanges=ranges)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("proto", PROTOCOLS)
def test_source_ranges_inside(lab: Lab, proto: str, family: int) -> None:
    """Pods are held to them by packet, nodes by socket, and both at the load balancer's address alone."""
    pods = {name: lab.addresses(name) for name in ("client", "client2")}
    nodes = {name: [node_address(lab, name, f) for f in FAMILIES] for name in ("node1", "node3")}
    lab.apply(fenced(*pods["client"], *nodes["node1"]))
    front, port = Front(lab, "fenced"), PROTOCOLS[proto]
    where, before = (front.balancer(family), port), out_of_range(lab)

    def outcome(client: str) -> str:
        return ask(lab, client, proto, *where, count=1, timeout=400).results[0]

    try:
        for client in ("client", "node/node1"):
            wait_answers(lab, client, *where, proto, names=("near", "far"))
        assert set(ask(lab, "client", proto, *where, count=2).peers) == {pods["client"][family == 6]}
        # Another node hears of it by itself.
        wait_answers(lab, "node/node3", front.cluster_ip(family), port, proto, names=("near", "far"))
        lab.wait("node3 is out", lambda: outcome("node/node3") == "prohibited")
        for client, result in (("client2", "timeout"), ("node/node3", "prohibited")):
            assert outcome(client) == result, client
            assert ask(lab, client, proto, front.cluster_ip(family), port, count=2).ok, client
        assert ask(lab, "client2", proto, node_address(lab, "node1", family), front.node_port(port), count=2).ok
        assert out_of_range(lab) > before
        # Somebody else's turn.
        lab.apply(fenced(*pods["client2"], *nodes["node3"]))
        for client in ("client2", "node/node3"):
            wait_answers(lab, client, *where, proto, names=("near", "far"))
        for client, result in (("client", "timeout"), ("node/node1", "prohibited")):
            lab.wait(f"{client} is out", lambda c=client, r=result: outcome(c) == r)  # type: ignore[misc]
    finally:
        lab.delete(fenced())


# --- one client port, two Services, one backend --------------------------------------------------------------------

TWINS = """
import json, socket, sys
kind, port, *rest = sys.argv[1:]
targets, port, socks = [(rest[n], int(rest[n + 1])) for n in range(0, len(rest), 2)], int(port), []
family = socket.AF_INET6 if ":" in targets[0][0] else socket.AF_INET
for target in targets:
    s = socket.socket(family, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.bind(("", port))
    s.settimeout(3)
    s.connect(target)
    socks.append(s)
for round in range(20):
    for n, s in enumerate(socks):
        s.send(b"%d.%d" % (n, round))
    for n, s in enumerate(socks):
        got = s.recv(100)
        assert got == b"%d.%d" % (n, round), (n, round, got)
print(json.dumps(port))
"""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("proto", PROTOCOLS)
@pytest.mark.parametrize("client_port", TWIN_PORTS)
def test_two_services_with_one_backend_from_one_client_port(
    lab: Lab, client_port: int, proto: str, family: int
) -> None:
    one, two, port = Front(lab, "one"), Front(lab, "two"), PROTOCOLS[proto]
    for node in ("node1", "node2"):  # the backend is on another node, and on the same one
        host = node_address(lab, node, family)
        script(lab, "node/world", TWINS, proto, client_port, host, one.node_port(port), host, two.node_port(port))
    # Through two nodes: what comes to the backend differs by the node at most.
    here, there = (node_address(lab, node, family) for node in ("node1", "node3"))
    ways = here, one.node_port(port), there, one.node_port(port)
    script(lab, "node/world", TWINS, proto, client_port + 1, *ways)
    # A pod's bound socket is left to packets, which can tell two connections apart. Its port is odd: as long as there
    # are even ones Linux gives those to connecting sockets, so none of this pod's has had it.
    ways = one.cluster_ip(family), port, two.cluster_ip(family), port
    script(lab, "client", TWINS, proto, client_port, *ways)


# --- UDP whose backend goes ----------------------------------------------------------------------------------------

# Told (SIGTERM) that only one server is left, it goes on until that one answers.
RESOLVER = """
import json, signal, socket, sys, time
host, port, wanted = sys.argv[1], int(sys.argv[2]), sys.argv[3]
family = socket.AF_INET6 if ":" in host else socket.AF_INET
told = False

def tell(*_):
    global told
    told = True

signal.signal(signal.SIGTERM, tell)
longest, names, s, last = 0.0, [], None, time.monotonic()
while not told or names[-1] != wanted:
    try:
        if s is None:
            s = socket.socket(family, socket.SOCK_DGRAM)
            s.settimeout(60)  # far beyond what is allowed: only an error can end the wait in time
            s.connect((host, port))
        s.send(b"who")
        name = json.loads(s.recv(500))["name"]
        if not names:
            print(json.dumps("begun"), flush=True)
        if not names or names[-1] != name:
            names.append(name)
        longest, last = max(longest, time.monotonic() - last), time.monotonic()
    except OSError as e:
        names.append(e.errno)
        s.close()
        s = None
    time.sleep(0.01)
print(json.dumps({"longest": longest, "names": names}))
"""


@once
@pytest.mark.parametrize("client", ["client", "node/node1"])
def test_a_connected_udp_client_does_not_hang_on_a_removed_backend(lab: Lab, client: str) -> None:
    """As a resolver that keeps its socket: the answer that never comes is an error at once."""
    manifest = server("dns1", "node2", "dns") + server("dns2", "node3", "dns")
    lab.apply(manifest + service("dns", app="dns"))
    lab.wait_ready(["dns1", "dns2"])
    front = Front(lab, "dns")
    wait_answers(lab, client, front.cluster_ip(4), UDP, "udp", names=("dns1", "dns2"))
    running = [
        lab.start(client, "python3", "-c", RESOLVER, front.cluster_ip(family), str(UDP), "dns2")
        for family in (4, 6) for _ in range(4)
    ]  # fmt: skip
    try:
        for process in running:
            assert process.stdout is not None and json.loads(process.stdout.readline()) == "begun"
        excused = starved(lab)
        lab.delete(server("dns1", "node2", "dns"))
        for process in running:
            process.send_signal(signal.SIGTERM)
        outcomes = [json.loads(p.communicate(timeout=90)[0].splitlines()[-1]) for p in running]
        excused = max(starved(lab) - excused, 0.0)  # the machine's fault
    finally:
        for process in running:
            process.kill()
    lab.delete(server("dns2", "node3", "dns") + service("dns", app="dns"))
    assert all(o["longest"] - excused < 2.0 and o["names"][-1] == "dns2" for o in outcomes), (outcomes, excused)


# --- fragments -------------------------------------------------------------------------------------------------------

LARGE = """
import errno, json, os, socket, sys
host, port = sys.argv[1], int(sys.argv[2])
family = socket.AF_INET6 if ":" in host else socket.AF_INET

def exchange(size):
    # The first datagrams may be lost to learning the path's MTU: the sender is told, or an answer doesn't come.
    for attempt in range(4):
        with socket.socket(family, socket.SOCK_DGRAM) as s:
            s.settimeout(0.7)
            s.connect((host, port))
            data = os.urandom(size)
            try:
                s.send(data)
                if s.recv(65536) == data:
                    return attempt
            except TimeoutError:
                pass
            except OSError as e:
                if e.errno != errno.EMSGSIZE:
                    raise
    return None

for size in (1400, 2000, 4000, 9000):
    print(json.dumps([size, [exchange(size) for _ in range(4)]]))
"""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("entry", NODES)
def test_fragments_through_node_ports(lab: Lab, entry: str, family: int) -> None:
    """Datagrams larger than the MTU, both ways, from the world, wherever the backend is."""
    port = Front(lab, "both").node_port(UDP)
    found = script(lab, "node/world", LARGE, node_address(lab, entry, family), port)
    lost = [attempt for _, attempts in found for attempt in attempts]
    assert None not in lost and sum(lost) <= 3, found
