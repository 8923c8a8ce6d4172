"""The settings of Services, one after the other on a running lab: how connections from outside are spread and
forwarded, where they are translated, and that clients get the same answers whatever is set.

Servers are `near` (node1) and `far` (node2); node3 has none, and is in node1's zone. The fabric lets nodes send from
each other's addresses, as direct server return through node ports needs it.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle

import pytest
from balance import (
    EXTERNAL,
    FAMILIES,
    TCP,
    UDP,
    Clients,
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
from cards import far_ends
from traffic import pod, set_options, wait_settled

from fimbria.lab import kernel
from fimbria.lab.handle import Lab

PROTOCOLS = {"tcp": TCP, "udp": UDP}
PLACES = {"near": "node1", "far": "node2"}
MANIFESTS = (
    pod("client", "node1", sleeps=True)
    + server("near", "node1")
    + server("far", "node2")
    + service("both", type="LoadBalancer", externalIPs=list(EXTERNAL.values()))
    + service("by-zone", type="NodePort", trafficDistribution="PreferSameZone")
    + service("by-node", type="NodePort", trafficDistribution="PreferSameNode")
    + service("direct", type="NodePort", annotations={"service.cilium.io/forwarding-mode": "dsr"})
)
# name -> options, and the protocols whose clients are seen by servers on other nodes too
SETTINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "defaults": ((), ()),
    "dsr": (("forwarding=dsr",), ("tcp", "udp")),
    "hybrid": (("forwarding=hybrid",), ("tcp",)),
    "maglev": (("load-balancing=maglev",), ()),
    "maglev-dsr": (("load-balancing=maglev", "forwarding=dsr", "maglev-table-size=1021"), ("tcp", "udp")),
    "xdp": (("xdp=generic",), ()),
    "xdp-native": (("xdp=native",), ()),
    "xdp-dsr": (("xdp=generic", "forwarding=dsr"), ("tcp", "udp")),
    "pods-by-packet": (("socket-services=host",), ()),
    "all-by-packet": (("socket-services=off",), ()),
    "clsact": (("attach=clsact",), ()),
    "through-the-stack": (("no-fast-path",), ()),
}
# What depends on the way between the nodes.
ROUTED = ["dsr", "xdp", "xdp-native", "xdp-dsr", "clsact"]


@pytest.fixture(scope="module", params=["overlay", "native"])
def lab(request: pytest.FixtureRequest, make_lab: Callable[..., Lab]) -> Iterator[Lab]:
    lab = make_lab(nodes=3, routing=request.param, source_check=False, zones=("a", "b"))
    lab.apply(MANIFESTS)
    lab.wait_ready(["client", "near", "far"])
    for node in lab.spec.node_names:
        # What comes from network cards has whole checksums.
        assert lab.run("node/fabric", "ethtool", "-K", node, "tx", "off").returncode == 0
    enter_by(lab, "node3")
    for family in FAMILIES:
        where = node_address(lab, "node3", family), Front(lab, "both").node_port(TCP)
        wait_answers(lab, "node/world", *where, names=("near", "far"))
    with far_ends(lab, *(("fabric", node) for node in lab.spec.node_names)):
        yield lab


once = pytest.mark.parametrize("lab", ["overlay"], indirect=True, scope="module")


def enter_by(lab: Lab, node: str) -> None:
    """Routes the external addresses to a node."""
    for family, address in EXTERNAL.items():
        done = lab.run("node/fabric", "ip", "route", "replace", address, "via", node_address(lab, node, family))
        assert done.returncode == 0, done.stderr


def restart(lab: Lab, options: tuple[str, ...]) -> None:
    set_options(lab, *options)
    for node in lab.spec.node_names:
        lab.kill(f"{node}/agent")
        lab.restart(f"{node}/agent")
    wait_settled(lab)


@once
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_serves_everybody(lab: Lab, setting: str) -> None:
    serves_everybody(lab, *SETTINGS[setting])


@pytest.mark.parametrize("lab", ["native"], indirect=True, scope="module")
@pytest.mark.parametrize("setting", ROUTED)
def test_settings_with_native_routing(lab: Lab, setting: str) -> None:
    serves_everybody(lab, *SETTINGS[setting])


def serves_everybody(lab: Lab, options: tuple[str, ...], kept: tuple[str, ...]) -> None:
    restart(lab, options)
    fresh_ports(lab)
    front = Front(lab, "both")
    nodes = {n: node_addresses(lab, n) for n in lab.spec.node_names}
    for family in FAMILIES:
        world = {world_address(lab, family)}
        for proto, port in PROTOCOLS.items():
            for entry in ("node1", "node3"):
                host = node_address(lab, entry, family)
                got = ask(lab, "node/world", proto, host, front.node_port(port))
                assert got.ok and set(got.names) == {"near", "far"}, (family, proto, entry, got)
                for name, place in PLACES.items():
                    expected = world if place == entry or proto in kept else nodes[entry]
                    assert got.seen(name) <= expected, (family, proto, entry, name, got)
            for host in (front.balancer(family), EXTERNAL[family]):
                got = ask(lab, "node/world", proto, host, port)
                assert got.ok and set(got.names) == {"near", "far"}, (family, proto, host, got)
            # A node's own processes need the socket: by packet only pods and clients outside are served.
            for client in ("client",) if "socket-services=off" in options else ("client", "node/node1"):
                ways = [(front.cluster_ip(family), port), (node_address(lab, "node3", family), front.node_port(port))]
                for way in (*ways, (front.balancer(family), port), (EXTERNAL[family], port)):
                    got = ask(lab, client, proto, *way)
                    assert got.ok and set(got.names) == {"near", "far"}, (client, proto, way, got)


def fresh_ports(lab: Lab) -> None:
    """Clients outside use no port that one had under other settings: a datagram of such a flow goes where it went."""
    first = next(_ports)
    use_ports(lab, first, first + PORTS - 1)


def use_ports(lab: Lab, first: int, last: int) -> None:
    """The ports that the kernel gives to clients outside."""
    work = partial(kernel.write_sysctls, {"net/ipv4/ip_local_port_range": f"{first} {last}"})
    kernel.in_netns(lab.paths.netns("world"), work)


PORTS = 4000
# No client is given these by the kernel, whatever the setting.
UNUSED = 62000
FIRST = 10000
_ports = cycle(range(FIRST, UNUSED, PORTS))


@once
@pytest.mark.parametrize("family", FAMILIES)
def test_direct_return_for_one_service_by_annotation(lab: Lab, family: int) -> None:
    restart(lab, ())
    for proto, port in PROTOCOLS.items():
        got = ask(lab, "node/world", proto, node_address(lab, "node3", family), Front(lab, "direct").node_port(port))
        assert got.ok and set(got.peers) == {world_address(lab, family)}, got


LARGE = """
import json, os, socket, sys
host, port = sys.argv[1], int(sys.argv[2])
done = 0
for _ in range(4):
    s = socket.create_connection((host, port), 5)
    data = os.urandom(200_000).replace(b"w", b"W")  # the server answers "who" otherwise than by an echo
    sent = got = b""
    s.setblocking(False)
    import selectors, time
    view, back, end = memoryview(data), bytearray(), time.monotonic() + 5
    with selectors.DefaultSelector() as chosen:
        chosen.register(s, selectors.EVENT_READ | selectors.EVENT_WRITE)
        while len(back) < len(data) and time.monotonic() < end:
            for _, events in chosen.select(1):
                if events & selectors.EVENT_WRITE and view:
                    view = view[s.send(view[:1024]):]
                    if not view:
                        chosen.modify(s, selectors.EVENT_READ)
                if events & selectors.EVENT_READ:
                    back += s.recv(65536)
    done += bytes(back) == data
    s.close()
print(json.dumps(done))
"""


@pytest.mark.parametrize("options", [("forwarding=dsr",), ("xdp=generic", "forwarding=dsr"), ("xdp=generic",)])
def test_full_packets_get_through(lab: Lab, options: tuple[str, ...]) -> None:
    """What is added to packets on the way to the backend's node must fit into the MTU."""
    restart(lab, options)
    port = Front(lab, "both").node_port(TCP)
    for family in FAMILIES:
        assert script(lab, "node/world", LARGE, node_address(lab, "node3", family), port) == [4], family


CHOICES = """
import json, socket, sys
host, port, first = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
family = socket.AF_INET6 if ":" in host else socket.AF_INET
found = {}
for source in range(first, first + 60):
    s = socket.socket(family, socket.SOCK_DGRAM)
    s.settimeout(2)
    s.bind(("", source))
    s.connect((host, port))
    s.send(b"who")
    found[source] = json.loads(s.recv(500))["name"]
    s.close()
print(json.dumps(found))
"""


@once
@pytest.mark.parametrize("family", FAMILIES)
def test_maglev_chooses_the_same_on_every_node(lab: Lab, family: int) -> None:
    """A client that comes in by another node meets the backend of before."""
    restart(lab, ("load-balancing=maglev",))
    enter_by(lab, "node3")
    (before,) = script(lab, "node/world", CHOICES, EXTERNAL[family], UDP, UNUSED)
    assert set(before.values()) == {"near", "far"}
    enter_by(lab, "node2")
    assert script(lab, "node/world", CHOICES, EXTERNAL[family], UDP, UNUSED) == [before]
    enter_by(lab, "node3")


@once
def test_cluster_ips_for_the_world(lab: Lab) -> None:
    restart(lab, ("external-cluster-ip",))
    for family in FAMILIES:
        address = Front(lab, "both").cluster_ip(family)
        gateway = lab.spec.world.gateway4 if family == 4 else lab.spec.world.gateway6
        lab.run("node/world", "ip", "route", "add", address, "via", gateway)
        lab.run("node/fabric", "ip", "route", "add", address, "via", node_address(lab, "node3", family))
        try:
            got = ask(lab, "node/world", "tcp", address, TCP)
            assert got.ok and set(got.names) == {"near", "far"}, got
        finally:
            lab.run("node/world", "ip", "route", "del", address)
            lab.run("node/fabric", "ip", "route", "del", address)


@once
def test_settings_change_under_traffic(lab: Lab) -> None:
    """New connections don't notice which way packets take; nor do those through a node with its own backend."""
    restart(lab, ())
    use_ports(lab, FIRST, UNUSED - 1)  # a port rests for a minute after its connection: thousands are needed
    front = Front(lab, "both")
    ways = {
        "pod": ("client", "tcp", front.cluster_ip(4), TCP),
        "world": ("node/world", "tcp", node_address(lab, "node3", 4), front.node_port(TCP)),
        "world, IPv6": ("node/world", "tcp", node_address(lab, "node1", 6), front.node_port(TCP)),
    }
    with Clients(lab, ways, {"pod": ways["pod"]}):
        for options in (("load-balancing=maglev",), ("xdp=generic", "load-balancing=maglev"), ("xdp=generic",), ()):
            restart(lab, options)


@once
@pytest.mark.parametrize("name", ["by-zone", "by-node"])
def test_traffic_distribution(lab: Lab, name: str) -> None:
    """By the hints of the slices: of its own zone (or node), and of all once nobody is left there."""
    restart(lab, ())
    front = Front(lab, name)
    for client, wanted in (("client", "near"), ("node/node1", "near"), ("node/node2", "far"), ("node/node3", "near")):
        for family in FAMILIES:
            assert set(ask(lab, client, "tcp", front.cluster_ip(family), TCP).names) == {wanted}, client
    for node, wanted in (("node1", "near"), ("node2", "far"), ("node3", "near")):
        host, port = node_address(lab, node, 4), front.node_port(TCP)
        assert set(ask(lab, "node/world", "tcp", host, port).names) == {wanted}, node
    lab.delete(server("near", "node1"))
    for client in ("client", "node/node3"):
        lab.wait(f"{client} goes to the other zone", lambda c=client: others(lab, c, front) == {"far"})  # type: ignore[misc]
    lab.apply(server("near", "node1"))
    lab.wait_ready(["near"])
    lab.wait("back to its own zone", lambda: others(lab, "client", front) == {"near"})


def others(lab: Lab, client: str, front: Front) -> set[str]:
    return set(ask(lab, client, "tcp", front.cluster_ip(4), TCP, timeout=300).names)
