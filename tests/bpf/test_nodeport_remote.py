"""Services for clients outside whose backend is elsewhere: this node calls it, or leaves the answer to its node."""

import socket

import pytest
from datapath import (
    EGRESS,
    INGRESS,
    REDIRECT,
    SHOT,
    TCX_NEXT,
    Datapath,
)  # fmt: skip
from record import (
    Build,
    Prepare,
    Record,
    Wire,
    base_rows,
    case_id,
    cases,
    check,
    send,
    syn,
    udp,
)  # fmt: skip
from scapy.layers.inet import IPOption
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw
from test_nodeport import (
    ANSWER,
    ASK,
    BOUND,
    CALL,
    CLIENT,
    DIRECT,
    NODE_PORT,
    OTHER_CALL,
    TCP,
    TCP_PORT,
    TUNNEL_KEY,
    UDP_PORT,
    by_stack,
    call,
    head,
    nodeport,
    records_of,
    space,
)  # fmt: skip
from test_sctp import sctp

from fimbria.model import rows
from lab import Space

__all__ = ["space"]  # a fixture


def taken(dp: Datapath, w: Wire) -> None:
    """Every port towards the backend is somebody else's."""
    nodeport("c")(dp, w)
    for port in range(61000, 62000):
        key = rows.NatKey(w.packed("c"), w.packed("node"), 8080, port, TCP, INGRESS)
        dp.put("nat", key, rows.NatEntry(w.packed("b"), 1234, 0, 0, 0))


def stolen(dp: Datapath, w: Wire) -> None:
    """The way back was forgotten, and is another client's now."""
    nodeport("c")(dp, w)
    send(dp, "from_network", CALL[1](w))
    key = rows.NatKey(w.packed("c"), w.packed("node"), 8080, BOUND, TCP, INGRESS)
    dp.put("nat", key, rows.NatEntry(w.packed("hop"), CLIENT, 1, 7, 0, w.packed("node"), TCP_PORT))


def half(direction: int) -> Prepare:
    """One row of the binding was forgotten; a port that isn't the first choice shows that the other was found."""

    def prepare(dp: Datapath, w: Wire) -> None:
        nodeport("c")(dp, w)
        if direction == INGRESS:
            key = rows.NatKey(w.packed("c"), w.packed("node"), 8080, BOUND, TCP, INGRESS)
            dp.put("nat", key, rows.NatEntry(w.packed("b"), 1234, 0, 0, 0))
        send(dp, "from_network", CALL[1](w))
        port = ports(dp)[0]
        for key, _ in dp.items("nat"):
            if key.direction == direction and (direction == EGRESS or key.dport == port):
                assert dp.maps["nat"].delete(dp.key("nat", key))
        HALF[w.family] = port

    return prepare


HALF: dict[int, int] = {}


def as_before(dp: Datapath, w: Wire) -> None:
    assert ports(dp) == [HALF[w.family]]
    assert [k.dport for k, e in dp.items("nat") if k.direction == INGRESS and e.addr == w.packed("world")] == ports(dp)


def ports(dp: Datapath) -> list[int]:
    return [e.port for k, e in dp.items("nat") if k.direction == EGRESS]


def two_ways(dp: Datapath, w: Wire) -> None:
    """Each row of the binding finds the other, and the way back knows the frontend."""
    (out,) = ((k, e) for k, e in dp.items("nat") if k.direction == EGRESS)
    (back,) = ((k, e) for k, e in dp.items("nat") if k.direction == INGRESS)
    assert (out[0].saddr, out[0].sport, out[0].daddr, out[0].dport) == (
        w.packed("world"), CLIENT, w.packed("node"), TCP_PORT)  # fmt: skip
    assert (out[1].addr, out[1].port) == (w.packed("node"), BOUND)
    assert (back[0].saddr, back[0].sport, back[0].daddr, back[0].dport) == (
        w.packed("c"), 8080, w.packed("node"), BOUND)  # fmt: skip
    assert (back[1].addr, back[1].port, back[1].flags, back[1].service) == (w.packed("world"), CLIENT, 1, 7)
    assert (back[1].frontend, back[1].frontend_port) == (w.packed("node"), TCP_PORT)


def one_port(dp: Datapath, w: Wire) -> None:
    assert ports(dp) == [BOUND]


def another_port(dp: Datapath, w: Wire) -> None:
    assert len(set(ports(dp))) == 2 and len(ports(dp)) == 2


def new_port(dp: Datapath, w: Wire) -> None:
    assert len(ports(dp)) == 1 and ports(dp) != [BOUND]


def big(size: int, *, whole: bool = True) -> Build:
    """A datagram of this length from the network header on; IPv4's may be cut unless `whole`."""

    def build(w: Wire) -> Packet:
        packet = w.routed("world", "node", udp(CLIENT, UDP_PORT, b"x" * (size - (28 if w.family == 4 else 48))))
        if w.family == 4 and whole:
            packet.payload.flags = "DF"
        return packet

    return build


def nowhere(dp: Datapath, w: Wire) -> None:
    """The backend's address is unreachable."""
    nodeport("10.99.0.1" if w.family == 4 else "fd99:1::1")(dp, w)


def too_big(size: int, mtu: int) -> Build:
    return lambda w: by_stack(w, "node", "world", w.too_big(head(big(size)(w), w), mtu))


def answer(payload: Packet, src: str = "c") -> Build:
    return lambda w: w.routed(src, "node", payload)


def proto(packet: Packet) -> Packet:
    setattr(packet.payload, "proto" if packet.payload.version == 4 else "nh", 132)
    return packet


remote = records_of(nodeport("c"))
CALLED = [
    remote("this node calls the backend", CALL[1], REDIRECT, mark=ANSWER, then=two_ways,
           gives=lambda w: w.routed("node", "c", syn(BOUND, 8080), ttl=63)),
    remote("by UDP likewise", ASK[1], REDIRECT, gives=lambda w: w.routed("node", "c", udp(BOUND, 8080), ttl=63)),
    remote("by SCTP likewise", lambda w: proto(w.routed("world", "node", Raw(sctp(CLIENT, TCP_PORT, bytes(12))))),
           REDIRECT, gives=lambda w: proto(w.routed("node", "c", Raw(sctp(BOUND, 8080, bytes(12))), ttl=63))),
    remote("from the same port as before", call(payload=syn(CLIENT, TCP_PORT, "A")), REDIRECT, before=[CALL],
           gives=lambda w: w.routed("node", "c", syn(BOUND, 8080, "A"), ttl=63), then=one_port),
    remote("a backend out of the cluster, too", CALL[1], REDIRECT, rows=nodeport("hop"),
           gives=lambda w: w.routed("node", "hop", syn(BOUND, 8080), ttl=63)),
    remote("and another node", CALL[1], REDIRECT, rows=nodeport("other"),
           gives=lambda w: w.routed("node", "other", syn(BOUND, 8080), ttl=63)),
    remote("the answer goes to the client as the frontend's", answer(syn(8080, BOUND, "SA")), REDIRECT, before=[CALL],
           mark=ANSWER, gives=lambda w: w.routed("node", "world", syn(TCP_PORT, CLIENT, "SA"), ttl=63)),
    remote("UDP's likewise", answer(udp(8080, BOUND)), REDIRECT, before=[ASK],
           gives=lambda w: w.routed("node", "world", udp(UDP_PORT, CLIENT), ttl=63)),
    remote("of the address that was called", answer(syn(8080, BOUND, "SA")), REDIRECT, before=[OTHER_CALL],
           gives=lambda w: w.routed("front", "world", syn(80, CLIENT, "SA"), ttl=63)),
    remote("an answer from elsewhere is none", answer(syn(8080, BOUND, "SA"), "other"), TCX_NEXT, before=[CALL],
           gives=answer(syn(8080, BOUND, "SA"), "other")),
    remote("an answer whose time is up is answered", lambda w: w.routed("c", "node", udp(8080, BOUND), ttl=1), REDIRECT,
           before=[ASK], drop="DROP_TTL_EXCEEDED", gives=lambda w: by_stack(w, "node", "c", w.time_exceeded(
           head(w.routed("c", "node", udp(8080, BOUND), ttl=1), w)))),
    remote("two frontends with one backend are two connections", OTHER_CALL[1], REDIRECT, before=[CALL],
           then=another_port),
    remote("a stolen way back is replaced", call(payload=syn(CLIENT, TCP_PORT, "A")), REDIRECT, rows=stolen,
           then=new_port),
    remote("a forgotten way back is made again", call(payload=syn(CLIENT, TCP_PORT, "A")), REDIRECT,
           rows=half(INGRESS), then=as_before),
    remote("a forgotten way out too", call(payload=syn(CLIENT, TCP_PORT, "A")), REDIRECT, rows=half(EGRESS),
           then=as_before),
    remote("without a free port it is dropped", CALL[1], SHOT, rows=taken, drop="DROP_NAT_NO_MAPPING"),
    remote("the backend's error comes from the frontend", lambda w: w.routed("c", "node", w.unreachable(
           w.ip("node", "c") / udp(BOUND, 8080))), REDIRECT, before=[ASK],
           gives=lambda w: w.routed("node", "world", w.unreachable(w.ip("world", "node") / udp(CLIENT, UDP_PORT)),
           ttl=63)),
    remote("a router's is about the client's packet", lambda w: w.routed("hop", "node", w.too_big(
           w.ip("node", "c") / udp(BOUND, 8080))), REDIRECT, before=[ASK],
           gives=lambda w: w.routed("hop", "world", w.too_big(w.ip("world", "node") / udp(CLIENT, UDP_PORT)), ttl=63)),
    remote("an error about an answer goes to the backend", lambda w: w.routed("hop", "node", w.too_big(
           w.ip("node", "world") / udp(UDP_PORT, CLIENT))), REDIRECT, before=[ASK],
           gives=lambda w: w.routed("hop", "c", w.too_big(w.ip("c", "node") / udp(8080, BOUND)), ttl=63)),
    remote("a packet whose time is up is answered", call(ttl=1), REDIRECT, drop="DROP_TTL_EXCEEDED",
           gives=lambda w: by_stack(w, "node", "world", w.time_exceeded(head(call(ttl=1)(w), w)))),
    remote("so is one that doesn't fit the way", big(1501), REDIRECT, drop="DROP_FRAGMENTATION_NOT_SUPPORTED",
           gives=too_big(1501, 1500)),
    remote("but not one that might have been cut", big(1501, whole=False), SHOT,
           drop="DROP_FRAGMENTATION_NOT_SUPPORTED", families=(4,)),
    remote("a backend that there is no way to is dropped", CALL[1], SHOT, rows=nowhere,
           drop="DROP_FIB_LOOKUP_FAILED"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "family"), cases(CALLED), ids=case_id)
def test_called_by_this_node(native: Datapath, space: Space, record: Record, family: int) -> None:
    space.inside(lambda: check(native, record, family))


TUNNELLED = [
    remote("no client speaks to a node's overlay through us", ASK[1], SHOT, rows=nodeport("other", port=8472),
           drop="DROP_INVALID_IDENTITY"),
    remote("nor to our own", ASK[1], SHOT, rows=nodeport("node", port=8472), drop="DROP_INVALID_IDENTITY"),
    remote("a pod may serve that port", ASK[1], REDIRECT, rows=nodeport("c", port=8472), mark=TUNNEL_KEY),
    remote("and one that isn't UDP", CALL[1], REDIRECT, rows=nodeport("other", port=8472), mark=ANSWER),
    remote("through the tunnel the router calls", CALL[1], REDIRECT, mark=TUNNEL_KEY,
           gives=lambda w: w.routed("router", "c", syn(BOUND, 8080), ttl=63)),
    remote("another node is called by this one's address", CALL[1], REDIRECT, rows=nodeport("other"), mark=ANSWER,
           gives=lambda w: w.routed("node", "other", syn(BOUND, 8080), ttl=63)),
    remote("what doesn't fit the tunnel is answered", big(1451), REDIRECT, drop="DROP_FRAGMENTATION_NOT_SUPPORTED",
           gives=too_big(1451, 1450)),
    remote("what fits goes", big(1450), REDIRECT, mark=TUNNEL_KEY),
    remote("what may be cut goes, too", big(1451, whole=False), REDIRECT, families=(4,), mark=TUNNEL_KEY),
]  # fmt: skip


@pytest.mark.parametrize(("record", "family"), cases(TUNNELLED), ids=case_id)
def test_called_through_the_tunnel(dp: Datapath, space: Space, record: Record, family: int) -> None:
    space.inside(lambda: check(dp, record, family))


@pytest.mark.parametrize("family", [4, 6])
def test_one_port_serves_any_number_of_backends(native: Datapath, space: Space, family: int) -> None:
    w = Wire(family)

    def run() -> None:
        native.clear()
        base_rows(native)
        for number in range(50):
            backend = f"10.2.1.{number}" if family == 4 else f"fd10:2::1:{number}"
            native.service(100 + number, w.addr("front"), 1000 + number, TCP, [(backend, 8080)])
            key = rows.FrontendKey(w.packed("front"), 1000 + number, TCP)
            native.put("frontends", key, rows.Frontend(100 + number, 1, NODE_PORT))
            assert send(native, "from_network", call("front", syn(CLIENT, 1000 + number))(w))[0] == REDIRECT
        assert ports(native) == [BOUND] * 50

    space.inside(run)


def carrying(packet: Packet, w: Wire, front: str, port: int) -> Packet:
    """The packet with the frontend for its backend's node (RFC 4727 experiment 30)."""
    if w.family == 4:
        packet.payload.options = [IPOption(b"\x9e\x08" + port.to_bytes(2, "big") + socket.inet_aton(w.addr(front)))]
        return packet
    whole = bytes(packet)
    option = bytes((whole[20], 2, 1, 0, 0x1E, 18)) + port.to_bytes(2, "big") + w.packed(front)
    made = Ether(whole[:54]) / Raw(option) / Raw(whole[54:])
    made.payload.nh, made.payload.plen = 60, len(whole) - 54 + 24
    return made


def told(src: str, dst: str, payload: Packet, front: str, port: int, ttl: int = 63) -> Build:
    return lambda w: carrying(w.routed(src, dst, payload, ttl=ttl), w, front, port)


direct = records_of(nodeport("c", flags=NODE_PORT | DIRECT))
SYN_TOLD = told("world", "c", syn(CLIENT, 8080), "node", TCP_PORT)
DIRECTLY = [
    direct("the first packet tells the frontend", CALL[1], REDIRECT, gives=SYN_TOLD),
    direct("those after it needn't", call(payload=syn(CLIENT, TCP_PORT, "A")), REDIRECT, before=[CALL],
           gives=lambda w: w.routed("world", "c", syn(CLIENT, 8080, "A"), ttl=63)),
    direct("each datagram does", ASK[1], REDIRECT, before=[ASK],
           gives=told("world", "c", udp(CLIENT, 8080), "node", UDP_PORT)),
    direct("an address that no device has", OTHER_CALL[1], REDIRECT,
           gives=told("world", "c", syn(CLIENT, 8080), "front", 80)),
    direct("a backend of this node needs nothing of it", CALL[1], REDIRECT,
           rows=nodeport("a", flags=NODE_PORT | DIRECT), gives=lambda w: w.delivered("a", "world", syn(CLIENT, 8080))),
    direct("another node as the backend doesn't know of it", CALL[1], REDIRECT,
           rows=nodeport("other", flags=NODE_PORT | DIRECT),
           gives=lambda w: w.routed("node", "other", syn(BOUND, 8080), ttl=63)),
    direct("nor does one out of the cluster", CALL[1], REDIRECT, rows=nodeport("hop", flags=NODE_PORT | DIRECT),
           gives=lambda w: w.routed("node", "hop", syn(BOUND, 8080), ttl=63)),
    direct("a client that is a node may be the backend's own", lambda w: w.routed("other", "node",
           syn(CLIENT, TCP_PORT)), REDIRECT, gives=lambda w: w.routed("node", "c", syn(BOUND, 8080), ttl=63)),
    direct("what leaves no room for it is answered", big(1495), REDIRECT, drop="DROP_FRAGMENTATION_NOT_SUPPORTED",
           gives=lambda w: too_big(1495, 1500 - (8 if w.family == 4 else 24))(w)),
    direct("an error about an answer goes to the backend", lambda w: w.routed("hop", "node", w.too_big(
           w.ip("node", "world") / udp(UDP_PORT, CLIENT))), REDIRECT, before=[ASK],
           gives=lambda w: w.routed("hop", "c", w.too_big(w.ip("c", "world") / udp(8080, CLIENT)), ttl=63)),
]  # fmt: skip


@pytest.mark.parametrize(("record", "family"), cases(DIRECTLY), ids=case_id)
def test_answered_by_the_backends_node(native: Datapath, space: Space, record: Record, family: int) -> None:
    space.inside(lambda: check(native, record, family))


def names(front: str, port: int) -> Prepare:
    def then(dp: Datapath, w: Wire) -> None:
        found = [e for k, e in dp.items("conntrack") if k.local == w.packed("a") and k.scope == 0]
        assert [(e.service, e.frontend, e.frontend_port) for e in found] == [(7, w.packed(front), port)]

    return then


def three_ports(dp: Datapath, w: Wire) -> None:
    found = {k.remote_port: e.frontend for k, e in dp.items("conntrack") if k.local == w.packed("a") and k.scope == 0}
    assert sorted(found.values()) == sorted(w.packed(name) for name in ("other", "front", "node"))
    assert {CLIENT, BOUND} < set(found)


here = records_of(nodeport("a", flags=NODE_PORT | DIRECT))
ARRIVED = ("from_network", told("world", "a", syn(CLIENT, 8080), "other", TCP_PORT, 62))
ASKED = ("from_network", told("world", "a", udp(CLIENT, 8080), "other", UDP_PORT, 62))
AT_THE_BACKEND = [
    here("the backend's node takes it out", ARRIVED[1], REDIRECT, then=names("other", TCP_PORT),
         gives=lambda w: w.delivered("a", "world", syn(CLIENT, 8080), ttl=61)),
    here("of a datagram, too", ASKED[1], REDIRECT,
         gives=lambda w: w.delivered("a", "world", udp(CLIENT, 8080), ttl=61)),
    here("and answers in its name", lambda w: w.sent("world", syn(8080, CLIENT, "SA")), REDIRECT, program="from_pod",
         before=[ARRIVED], mark=ANSWER,
         gives=lambda w: w.sent("world", syn(TCP_PORT, CLIENT, "SA"), src="other", ttl=63)),
    here("also in an address's that no device has", lambda w: w.sent("world", syn(8080, CLIENT, "SA")), REDIRECT,
         program="from_pod", before=[("from_network", told("world", "a", syn(CLIENT, 8080), "front", 80, 62))],
         gives=lambda w: w.sent("world", syn(80, CLIENT, "SA"), src="front", ttl=63)),
    here("what tells a frontend that is none is dropped", told("world", "a", syn(CLIENT, 8080), "other", 30081, 62),
         SHOT, drop="DROP_INVALID_PACKET"),
    here("or an address of nobody's", told("world", "a", syn(CLIENT, 8080), "hop", TCP_PORT, 62), SHOT,
         drop="DROP_INVALID_PACKET"),
    here("the same client port by another frontend has to wait", told("world", "a", syn(CLIENT, 8080), "front", 80, 62),
         SHOT, before=[ARRIVED], drop="DROP_NAT_NO_MAPPING"),
    here("its datagrams are told apart", told("world", "a", udp(CLIENT, 8080), "front", 53, 62), REDIRECT,
         before=[ASKED], gives=lambda w: w.delivered("a", "world", udp(BOUND, 8080), ttl=61)),
    here("those of a third, too", told("world", "a", udp(CLIENT, 8080), "node", UDP_PORT, 62), REDIRECT,
         then=three_ports, before=[ASKED, ("from_network", told("world", "a", udp(CLIENT, 8080), "front", 53, 62))]),
    here("and so are the answers to them", lambda w: w.sent("world", udp(8080, BOUND)), REDIRECT, program="from_pod",
         before=[ASKED, ("from_network", told("world", "a", udp(CLIENT, 8080), "front", 53, 62))],
         gives=lambda w: w.sent("world", udp(53, CLIENT), src="front", ttl=63)),
]  # fmt: skip


@pytest.mark.parametrize(("record", "family"), cases(AT_THE_BACKEND), ids=case_id)
def test_at_the_backends_node(native: Datapath, space: Space, record: Record, family: int) -> None:
    space.inside(lambda: check(native, record, family))
