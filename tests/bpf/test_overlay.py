"""What may come out of the tunnel: node 1 gets crafted VXLAN packets from node 2 and from a stranger."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
from datapath import DROP, EVENT_DROP, Datapath, addr, prefix
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import ARP, Ether
from scapy.layers.vxlan import VXLAN
from scapy.packet import Packet, Raw

from fimbria.kernel.probe import has_tcx
from lab import IDENTITY, Lab, Mode, Node, Space, lab, ping, tcp_peer
from lab import UDP as UDP_SOCKET


@pytest.fixture(scope="module")
def net() -> Iterator[Lab]:
    with lab(Mode(tcx=has_tcx())) as built:
        # IPv6 takes a moment to settle on fresh links.
        first, second = built.nodes
        assert any(ping(second.space, 6, first.addr[6], timeout=0.5) for _ in range(10))
        yield built


def inner(net: Lab, family: int) -> Packet:
    """From c to a, with a MAC that is nobody's."""
    src, dst = net.pod("c").addr[family], net.pod("a").addr[family]
    ip = IP(src=src, dst=dst) if family == 4 else IPv6(src=src, dst=dst)
    return Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02") / ip / UDP(sport=7, dport=4000) / Raw(b"hello")


def tunnel(sender: Space, node: Node, vni: int, packet: Packet, outer: int = 4) -> None:
    with sender.socket(outer, UDP_SOCKET) as s:
        s.sendto(bytes(VXLAN(vni=vni, flags=8) / packet), (node.addr[outer], 8472))


def received(net: Lab, family: int, sender: Space, vni: int, packet: Packet | None = None, outer: int = 4) -> bool:
    pod = net.pod("a")
    with pod.space.socket(family, UDP_SOCKET) as s:
        s.bind((pod.addr[family], 4000))
        tunnel(sender, net.nodes[0], vni, packet or inner(net, family), outer)
        s.settimeout(0.5)
        try:
            return s.recv(100) == b"hello"
        except TimeoutError:
            return False


def drops(dp: Datapath) -> set[int]:
    return {e.reason for e in dp.events() if e.type == EVENT_DROP}


@pytest.mark.parametrize("outer", [4, 6])
@pytest.mark.parametrize("family", [4, 6])
def test_a_known_node_speaks_for_its_pods(net: Lab, family: int, outer: int) -> None:
    net.nodes[0].dp.events()
    assert received(net, family, net.nodes[1].space, IDENTITY["c"], outer=outer)
    assert drops(net.nodes[0].dp) == set()


@pytest.mark.parametrize("family", [4, 6])
def test_a_stranger_does_not(net: Lab, family: int) -> None:
    net.nodes[0].dp.events()
    assert not received(net, family, net.fabric, IDENTITY["c"])
    assert drops(net.nodes[0].dp) == {DROP["DROP_NO_TUNNEL_ENDPOINT"]}


@pytest.mark.parametrize("vni", [0, 1, 8, 255])
def test_identities_that_nobody_may_claim(net: Lab, vni: int) -> None:
    net.nodes[0].dp.events()
    assert not received(net, 4, net.nodes[1].space, vni)
    assert drops(net.nodes[0].dp) == {DROP["DROP_INVALID_VNI"]}


@pytest.mark.parametrize("vni", [2, 3, 4, 5, 6, 7, 256, (1 << 24) - 1])
def test_identities_that_a_peer_may_claim(net: Lab, vni: int) -> None:
    assert received(net, 4, net.nodes[1].space, vni)


def test_the_identity_is_the_vnis(net: Lab) -> None:
    assert received(net, 4, net.nodes[1].space, 4321)
    entries = net.nodes[0].dp.items("conntrack")
    assert [e.peer for k, e in entries if k.local_port == 4000 and k.local == addr(net.pod("a").addr[4])] == [4321]


def test_other_protocols_are_dropped(net: Lab) -> None:
    tunnel(net.nodes[1].space, net.nodes[0], IDENTITY["c"], Ether() / ARP())
    assert ping(net.pod("a").space, 4, net.pod("c").addr[4])


def test_broken_inner_packet(net: Lab) -> None:
    net.nodes[0].dp.events()
    assert not received(net, 4, net.nodes[1].space, IDENTITY["c"], Ether(bytes(inner(net, 4))[:40]))
    assert drops(net.nodes[0].dp) == {DROP["DROP_INVALID_PACKET"]}


@pytest.mark.parametrize("family", [4, 6])
def test_the_underlay_may_be_ipv6(net: Lab, family: int) -> None:
    first, second = net.nodes
    a, c = net.pod("a"), net.pod("c")
    rows_before = []
    for node, pod, other in ((first, c, second), (second, a, first)):
        key = prefix(f"{pod.addr[family]}/{32 if family == 4 else 128}")
        old = node.dp.get("ipcache", key)
        rows_before.append((node, key, old))
        node.dp.put("ipcache", key, replace(old, tunnel=addr(other.addr[6])))
        # IPv6 takes 20 bytes more.
        pod.space.ip("link set eth0 mtu 1430")
    try:
        assert ping(a.space, family, c.addr[family])
        assert tcp_peer(c.space, a.space, family, c.addr[family]) == a.addr[family]
    finally:
        for node, key, old in rows_before:
            node.dp.put("ipcache", key, old)
        for pod in (a, c):
            pod.space.ip("link set eth0 mtu 1450")
