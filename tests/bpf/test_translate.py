"""Services by packet: there and back, errors included, and an answer when there is nobody."""

import struct
import time

import pytest
from datapath import (
    EGRESS,
    ENFORCE_EGRESS,
    ENFORCE_INGRESS,
    EVENT_DROP,
    FRONTEND_FLAG,
    LAYOUT,
    REDIRECT,
    SHOT,
    TCX_NEXT,
    Datapath,
    addr,
)  # fmt: skip
from record import (
    A_ID,
    B_IDENTITY,
    C_IDENTITY,
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
from scapy.layers.inet import TCP as TcpHeader
from scapy.layers.inet import UDP as UdpHeader
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw
from test_policy import enforce, rule

from fimbria.kernel.codec import Codec
from fimbria.model import rows

TCP, UDP, SCTP = 6, 17, 132
OUT, IN = ENFORCE_EGRESS, ENFORCE_INGRESS
SOURCE_KEY = Codec(LAYOUT, "source_key", rows.SourceKey)


def service(*backends: str, port: int = 8080) -> Prepare:
    """`front` port 80 for TCP, 53 for UDP; `empty` has no backend."""

    def prepare(dp: Datapath, w: Wire) -> None:
        for number, proto, front in ((7, TCP, 80), (8, UDP, 53), (9, SCTP, 80)):
            dp.service(number, w.addr("front"), front, proto, [(w.addr(b), port) for b in backends])
            dp.service(number + 10, w.addr("empty"), front, proto, [])

    return prepare


def with_policy(*rules: tuple[rows.PolicyKey, rows.PolicyEntry], backend: str = "b") -> Prepare:
    def prepare(dp: Datapath, w: Wire) -> None:
        enforce(*rules, a=OUT | IN)(dp, w)
        service(backend)(dp, w)

    return prepare


def moved(dp: Datapath, w: Wire) -> None:
    """The connection's backend is gone; another one has come."""
    service("b")(dp, w)
    send(dp, "from_pod", w.sent("front", udp()))
    assert dp.maps["backends"].delete((800).to_bytes(4, "little"))
    dp.put("backends", 801, rows.Backend(w.packed("c"), 9000, UDP))
    dp.put("service_slots", rows.SlotKey(8, 0), 801)


def chosen(dp: Datapath, w: Wire) -> None:
    """The connection was sent to b; now the service only has c."""
    service("b")(dp, w)
    send(dp, "from_pod", w.sent("front", syn()))
    dp.put("backends", 701, rows.Backend(w.packed("c"), 8080, TCP))
    dp.put("service_slots", rows.SlotKey(7, 0), 701)


def dead(dp: Datapath, w: Wire) -> None:
    """The connection's backend is gone; another one has come."""
    chosen(dp, w)
    assert dp.maps["backends"].delete((700).to_bytes(4, "little"))


def sctp_dead(dp: Datapath, w: Wire) -> None:
    service("b", port=80)(dp, w)
    send(dp, "from_pod", sctp(w, "front"))
    assert dp.maps["backends"].delete((900).to_bytes(4, "little"))
    dp.put("backends", 901, rows.Backend(w.packed("c"), 80, SCTP))
    dp.put("service_slots", rows.SlotKey(9, 0), 901)


def replaced(dp: Datapath, w: Wire) -> None:
    """The connection's frontend stands for another choice of endpoints now."""
    removed(dp, w)
    dp.service(27, w.addr("front"), 80, TCP, [(w.addr("c"), 8080)])


def removed(dp: Datapath, w: Wire) -> None:
    """The service is gone, its backend still there."""
    service("b")(dp, w)
    send(dp, "from_pod", w.sent("front", syn()))
    assert dp.maps["frontends"].delete(dp.key("frontends", rows.FrontendKey(w.packed("front"), 80, TCP)))


def itself(dp: Datapath, w: Wire) -> None:
    """The pod is its own backend, and may talk to nobody."""
    enforce(a=OUT | IN)(dp, w)
    service("a")(dp, w)


def names_service(dp: Datapath, w: Wire) -> None:
    (found,) = (e for k, e in dp.items("conntrack") if k.local == w.packed("a") and k.scope == 0)
    assert (found.service, found.frontend, found.frontend_port) == (7, w.packed("front"), 80)


def sctp(w: Wire, dst: str, ttl: int = 64) -> Packet:
    packet = w.sent(dst, Raw(b"\x9c\x40\x00\x50" + b"\0" * 20), ttl=ttl)
    packet.payload.proto = SCTP if w.family == 4 else 0
    if w.family == 6:
        packet.payload.nh = SCTP
    return packet


def answered(w: Wire, payload: Packet, by: str = "empty") -> Packet:
    """Our own answer to pod a, in the name of `by`."""
    packet = w.delivered("a", by, payload, ttl=64)
    if w.family == 4:
        packet.payload.id = 0
    return packet


def acked() -> Packet:
    return TcpHeader(sport=40000, dport=80, flags="A", seq=1000, ack=555)


def refused(w: Wire, seq: int, ack: int, flags: str) -> Packet:
    return answered(w, TcpHeader(sport=80, dport=40000, flags=flags, seq=seq, ack=ack, window=0))


def quoted(w: Wire, packet: Packet) -> bytes:
    return bytes(packet.payload)[: (28 if w.family == 4 else 48)]


def silent(dp: Datapath, w: Wire) -> None:
    dp.put("frontends", rows.FrontendKey(w.packed("front"), 80, TCP), rows.Frontend(7, 0, FRONTEND_FLAG["SILENT"]))


def address_only(dp: Datapath, w: Wire) -> None:
    """`front` belongs to services, which serve other ports; and so does `node`, by an external IP."""
    for name in ("front", "node"):
        dp.put("frontends", rows.FrontendKey(w.packed(name), 0, 0), rows.Frontend(0, 0, FRONTEND_FLAG["ADDRESS"]))


def node_port(flags: str = "", inside: str = "") -> Prepare:
    """Port 30080 of every node leads to b; with `inside`, to that one for pods."""

    def prepare(dp: Datapath, w: Wire) -> None:
        any_address = "0.0.0.0" if w.family == 4 else "::"
        dp.service(7, any_address, 30080, TCP, [(w.addr("b"), 8080)])
        bits = sum(FRONTEND_FLAG[name] for name in f"NODE_PORT {flags}".split())
        dp.put("frontends", rows.FrontendKey(addr(any_address), 30080, TCP), rows.Frontend(7, 1, bits))
        if inside:
            dp.put("backends", 801, rows.Backend(w.packed(inside), 8080, TCP))
            dp.put("service_slots", rows.SlotKey(8, 0), 801)
            dp.put("frontends", rows.FrontendKey(addr(any_address), 30080, TCP, 1), rows.Frontend(8, 1, bits))

    return prepare


def exempt(endpoint: int) -> Prepare:
    def prepare(dp: Datapath, w: Wire) -> None:
        service("b")(dp, w)
        dp.put("frontends", rows.FrontendKey(w.packed("front"), 80, TCP), rows.Frontend(7, 1, FRONTEND_FLAG["EXEMPT"]))
        dp.put("service_exempt", rows.ExemptKey(endpoint, 7, 1), 1)

    return prepare


def ranged(name: str, flags: str = "", backend: str = "b") -> Prepare:
    """`front` is for this one client; `twin` is the same service's, for everybody."""

    def prepare(dp: Datapath, w: Wire) -> None:
        service(backend)(dp, w)
        bits = sum(FRONTEND_FLAG[flag] for flag in f"SOURCE_RANGES {flags}".split())
        for number, proto, port in ((7, TCP, 80), (8, UDP, 53), (9, SCTP, 80)):
            for front, limits in (("front", bits), ("twin", 0)):
                dp.put("frontends", rows.FrontendKey(w.packed(front), port, proto), rows.Frontend(number, 1, limits))
            key = SOURCE_KEY.encode(rows.SourceKey(32 + 128, number, w.packed(name)))
            dp.maps["source_ranges"].update(key, (1).to_bytes(4, "little"))

    return prepare


def limited(dp: Datapath, w: Wire) -> None:
    """The pod had its connections before the ranges came."""
    service("b")(dp, w)
    for _, build in (CALL, ASK):
        send(dp, "from_pod", build(w))
    ranged("other")(dp, w)


CALL = ("from_pod", lambda w: w.sent("front", syn()))
ASK = ("from_pod", lambda w: w.sent("front", udp()))
DIRECT = ("from_pod", lambda w: w.sent("b", udp(dport=8080)))
RECORDS = [
    Record("a call goes to the backend", CALL[1], REDIRECT, rows=service("b"),
           gives=lambda w: w.delivered("b", "a", syn(dport=8080)), then=names_service),
    Record("UDP likewise", ASK[1], REDIRECT, rows=service("b"), gives=lambda w: w.delivered("b", "a", udp(dport=8080))),
    Record("the backend may be on another node", CALL[1], REDIRECT, rows=service("c"),
           gives=lambda w: w.sent("c", syn(dport=8080), ttl=63), mark=0xF2),
    Record("the backend may be the node", CALL[1], TCX_NEXT, rows=service("node"),
           gives=lambda w: w.sent("node", syn(dport=8080))),
    Record("the answer comes from the service", lambda w: w.routed("b", "a", syn(8080, 40000, "SA")), TCX_NEXT,
           program="to_pod", rows=service("b"), before=[CALL],
           gives=lambda w: w.routed("front", "a", syn(80, 40000, "SA"))),
    Record("UDP's likewise", lambda w: w.routed("b", "a", udp(8080, 40000)), TCX_NEXT, program="to_pod",
           rows=service("b"), before=[ASK], gives=lambda w: w.routed("front", "a", udp(53, 40000))),
    Record("a direct answer stays as it is", lambda w: w.routed("b", "a", syn(8080, 40000, "SA")), TCX_NEXT,
           program="to_pod", rows=service("b"), before=[("from_pod", lambda w: w.sent("b", syn(dport=8080)))],
           gives=lambda w: w.routed("b", "a", syn(8080, 40000, "SA"))),
    Record("a direct call after one through the service is direct",
           lambda w: w.routed("b", "a", syn(8080, 40000, "SA")),
           TCX_NEXT, program="to_pod", rows=service("b"),
           before=[CALL, ("from_pod", lambda w: w.sent("b", syn(dport=8080)))],
           gives=lambda w: w.routed("b", "a", syn(8080, 40000, "SA"))),
    Record("another port of the address is no service", lambda w: w.sent("front", syn(dport=81)), TCX_NEXT,
           rows=service("b"), gives=lambda w: w.sent("front", syn(dport=81))),
    Record("a connection stays with its backend", lambda w: w.sent("front", syn(flags="A")), REDIRECT, rows=chosen,
           gives=lambda w: w.delivered("b", "a", syn(dport=8080, flags="A"))),
    Record("its repeated attempt too", CALL[1], REDIRECT, rows=chosen,
           gives=lambda w: w.delivered("b", "a", syn(dport=8080))),
    Record("an attempt after its end chooses anew", CALL[1], REDIRECT, rows=chosen,
           before=[("from_pod", lambda w: w.sent("front", syn(flags="FA")))],
           gives=lambda w: w.sent("c", syn(dport=8080), ttl=63)),
    Record("a connection ends with its service", lambda w: w.sent("front", acked()), REDIRECT, rows=removed,
           gives=lambda w: answered(w, TcpHeader(sport=80, dport=40000, flags="R", seq=555, window=0), "front"),
           mark=0xF4, drop="DROP_SERVICE_NO_BACKEND"),
    Record("one with another choice of endpoints in its place doesn't", lambda w: w.sent("front", acked()), REDIRECT,
           rows=replaced,
           gives=lambda w: w.delivered("b", "a", TcpHeader(sport=40000, dport=8080, flags="A", seq=1000, ack=555))),
    Record("a new attempt goes to the new choice", CALL[1], REDIRECT, rows=replaced,
           gives=lambda w: w.sent("c", syn(dport=8080), ttl=63)),
    Record("a connection ends with its backend", lambda w: w.sent("front", acked()), REDIRECT, rows=dead,
           gives=lambda w: answered(w, TcpHeader(sport=80, dport=40000, flags="R", seq=555, window=0), "front"),
           drop="DROP_SERVICE_NO_BACKEND"),
    Record("SCTP goes to another one, which knows nothing of it", lambda w: sctp(w, "front"), REDIRECT, rows=sctp_dead,
           gives=lambda w: sctp(w, "c", ttl=63), mark=0xF2),
    Record("a new attempt gets another backend", CALL[1], REDIRECT, rows=dead,
           gives=lambda w: w.sent("c", syn(dport=8080), ttl=63)),
    Record("a datagram sent directly by a service's port is answered directly", lambda w: w.routed("b", "a",
           udp(8080, 40000)), TCX_NEXT, program="to_pod", rows=service("b"), before=[ASK, DIRECT],
           gives=lambda w: w.routed("b", "a", udp(8080, 40000))),
    Record("and by the service's again afterwards", lambda w: w.routed("b", "a", udp(8080, 40000)), TCX_NEXT,
           program="to_pod", rows=service("b"), before=[ASK, DIRECT, ASK],
           gives=lambda w: w.routed("front", "a", udp(53, 40000))),
    Record("a connection without its backend gets another", ASK[1], REDIRECT, rows=moved,
           gives=lambda w: w.sent("c", udp(dport=9000), ttl=63)),
    Record("policy is about the backend", CALL[1], REDIRECT,
           rows=with_policy(rule(B_IDENTITY, EGRESS, proto=TCP, port=8080))),
    Record("and not about the service's port", CALL[1], SHOT,
           rows=with_policy(rule(B_IDENTITY, EGRESS, proto=TCP, port=80)), drop="DROP_POLICY_DENIED"),
    Record("another backend's identity counts", CALL[1], REDIRECT,
           rows=with_policy(rule(C_IDENTITY, EGRESS), backend="c")),
    Record("SCTP goes to the same port", lambda w: sctp(w, "front"), REDIRECT, rows=service("b", port=80)),
    Record("or to another one", lambda w: sctp(w, "front"), REDIRECT, rows=service("b")),
    Record("the backend's error comes from the service", lambda w: w.routed("b", "a", w.unreachable(
           w.ip("a", "b") / udp(dport=8080))), TCX_NEXT, program="to_pod", rows=service("b"), before=[ASK],
           gives=lambda w: w.routed("front", "a", w.unreachable(w.ip("a", "front") / udp()))),
    Record("a router's error is about the service", lambda w: w.routed("hop", "a", w.time_exceeded(
           w.ip("a", "b") / udp(dport=8080))), TCX_NEXT, program="to_pod", rows=service("b"), before=[ASK],
           gives=lambda w: w.routed("hop", "a", w.time_exceeded(w.ip("a", "front") / udp()))),
    Record("the pod's error goes to the backend", lambda w: w.sent("front", w.unreachable(
           w.ip("front", "a") / udp(53, 40000))), REDIRECT, rows=service("b"), before=[ASK],
           gives=lambda w: w.delivered("b", "a", w.unreachable(w.ip("b", "a") / udp(8080, 40000)))),
    Record("a call without backends is reset", lambda w: w.sent("empty", syn()), REDIRECT, rows=service("b"),
           gives=lambda w: refused(w, 0, 1001, "RA"), mark=0xF4, drop="DROP_SERVICE_NO_BACKEND"),
    Record("data without backends is reset where it stands", lambda w: w.sent("empty", TcpHeader(sport=40000, dport=80,
           flags="A", seq=1000, ack=555) / Raw(b"x" * 100)), REDIRECT, rows=service("b"),
           gives=lambda w: refused(w, 555, 0, "R"), drop="DROP_SERVICE_NO_BACKEND"),
    Record("a reset is not answered", lambda w: w.sent("empty", syn(flags="R")), SHOT, rows=service("b"),
           drop="DROP_SERVICE_NO_BACKEND"),
    Record("a datagram without backends is answered", lambda w: w.sent("empty", udp(data=b"x" * 100)), REDIRECT,
           rows=service("b"), gives=lambda w: answered(w, w.unreachable(Raw(quoted(w, w.sent("empty",
           udp(data=b"x" * 100)))))), mark=0xF4, drop="DROP_SERVICE_NO_BACKEND", events=[(EVENT_DROP, 158)]),
    Record("a pod that is its own backend is called by the gateway", CALL[1], REDIRECT, rows=itself, mark=0xF4,
           gives=lambda w: w.delivered("a", "router", syn(dport=8080), ttl=64)),
    Record("and answers in the service's name", lambda w: w.sent("router", syn(8080, 40000, "SA")), REDIRECT,
           rows=itself, before=[CALL], mark=0xF4,
           gives=lambda w: w.delivered("a", "front", syn(80, 40000, "SA"), ttl=64)),
    Record("what else it sends the gateway is the node's", lambda w: w.sent("router", syn(8081, 40000, "SA")), TCX_NEXT,
           rows=service("a"), before=[CALL], gives=lambda w: w.sent("router", syn(8081, 40000, "SA"))),
    Record("nobody there, and nobody says so", CALL[1], SHOT, rows=silent, drop="DROP_SERVICE_NO_BACKEND"),
    Record("a port that nobody serves is refused", lambda w: w.sent("front", syn(dport=81)), REDIRECT, mark=0xF4,
           rows=address_only, gives=lambda w: answered(w, TcpHeader(sport=81, dport=40000, flags="RA", seq=0, ack=1001,
           window=0), "front"), drop="DROP_SERVICE_NO_BACKEND"),
    Record("a node's other ports are its own", lambda w: w.sent("node", syn(dport=81)), TCX_NEXT, rows=address_only,
           gives=lambda w: w.sent("node", syn(dport=81))),
    Record("a node port of this node", lambda w: w.sent("node", syn(dport=30080)), REDIRECT, rows=node_port(),
           gives=lambda w: w.delivered("b", "a", syn(dport=8080))),
    Record("a node port of another node is translated here", lambda w: w.sent("other", syn(dport=30080)), REDIRECT,
           rows=node_port(), gives=lambda w: w.delivered("b", "a", syn(dport=8080))),
    Record("a pod's address has no node ports", lambda w: w.sent("b", syn(dport=30080)), REDIRECT, rows=node_port(),
           gives=lambda w: w.delivered("b", "a", syn(dport=30080))),
    Record("the world has none either", lambda w: w.sent("world", syn(dport=30080)), TCX_NEXT, rows=node_port(),
           gives=lambda w: w.sent("world", syn(dport=30080))),
    Record("pods use all endpoints of a local node port", lambda w: w.sent("node", syn(dport=30080)), REDIRECT,
           rows=node_port("TWO_SCOPES", "c"), gives=lambda w: w.sent("c", syn(dport=8080), ttl=63), mark=0xF2),
    Record("another node's local node port is left to it", lambda w: w.sent("other", syn(dport=30080)), TCX_NEXT,
           rows=node_port("TWO_SCOPES", "c"), gives=lambda w: w.sent("other", syn(dport=30080))),
    Record("the answer comes from the node port", lambda w: w.routed("b", "a", syn(8080, 40000, "SA")), TCX_NEXT,
           program="to_pod", rows=node_port(), before=[("from_pod", lambda w: w.sent("other", syn(dport=30080)))],
           gives=lambda w: w.routed("other", "a", syn(30080, 40000, "SA"))),
    Record("an exempt pod sees the address as it is", CALL[1], TCX_NEXT, rows=exempt(A_ID), gives=CALL[1]),
    Record("another one doesn't", CALL[1], REDIRECT, rows=exempt(A_ID + 1),
           gives=lambda w: w.delivered("b", "a", syn(dport=8080))),
    Record("a pod out of the ranges gets nothing", CALL[1], SHOT, rows=ranged("other"),
           drop="DROP_SERVICE_SOURCE_RANGE"),
    Record("nor do its datagrams", ASK[1], SHOT, rows=ranged("other"), drop="DROP_SERVICE_SOURCE_RANGE"),
    Record("nor its SCTP", lambda w: sctp(w, "front"), SHOT, rows=ranged("other"), drop="DROP_SERVICE_SOURCE_RANGE"),
    Record("nor its data without a connection", lambda w: w.sent("front", acked()), SHOT, rows=ranged("other"),
           drop="DROP_SERVICE_SOURCE_RANGE"),
    Record("nor does it reach itself", CALL[1], SHOT, rows=ranged("other", backend="a"),
           drop="DROP_SERVICE_SOURCE_RANGE"),
    Record("one within them is let in", CALL[1], REDIRECT, rows=ranged("a"),
           gives=lambda w: w.delivered("b", "a", syn(dport=8080))),
    Record("its datagrams likewise", ASK[1], REDIRECT, rows=ranged("a"),
           gives=lambda w: w.delivered("b", "a", udp(dport=8080))),
    Record("and is answered by the service", lambda w: w.routed("b", "a", syn(8080, 40000, "SA")), TCX_NEXT,
           program="to_pod", rows=ranged("a"), before=[CALL],
           gives=lambda w: w.routed("front", "a", syn(80, 40000, "SA"))),
    Record("by datagrams likewise", lambda w: w.routed("b", "a", udp(8080, 40000)), TCX_NEXT, program="to_pod",
           rows=ranged("a"), before=[ASK], gives=lambda w: w.routed("front", "a", udp(53, 40000))),
    Record("unless it is whom it is denied to", CALL[1], SHOT, rows=ranged("a", "SOURCE_DENY"),
           drop="DROP_SERVICE_SOURCE_RANGE"),
    Record("and then others may", CALL[1], REDIRECT, rows=ranged("other", "SOURCE_DENY"),
           gives=lambda w: w.delivered("b", "a", syn(dport=8080))),
    Record("the service's other addresses are for everybody", lambda w: w.sent("twin", syn()), REDIRECT,
           rows=ranged("other"), gives=lambda w: w.delivered("b", "a", syn(dport=8080))),
    Record("new ranges end a connection", lambda w: w.sent("front", acked()), SHOT, rows=limited,
           drop="DROP_SERVICE_SOURCE_RANGE"),
    Record("and a datagram's", ASK[1], SHOT, rows=limited, drop="DROP_SERVICE_SOURCE_RANGE"),
    Record("an echo to a service's address is no service's", lambda w: w.sent("front", w.echo()), TCX_NEXT,
           rows=service("b"), gives=lambda w: w.sent("front", w.echo())),
]  # fmt: skip


@pytest.mark.parametrize(("record", "family"), cases(RECORDS), ids=case_id)
def test_record(dp: Datapath, record: Record, family: int) -> None:
    check(dp, record, family)


@pytest.mark.parametrize("family", [4, 6])
def test_connections_spread_over_backends(dp: Datapath, family: int) -> None:
    w = Wire(family)
    dp.clear()
    base_rows(dp)
    service("b", "c")(dp, w)
    for sport in range(30000, 30100):
        send(dp, "from_pod", w.sent("front", syn(sport)))
    seen = [k.remote for k, _ in dp.items("conntrack") if k.local == w.packed("a") and k.scope == 0]
    assert 20 < seen.count(w.packed("b")) < 80 and len(seen) == 100


def twins(dp: Datapath, w: Wire, backend: str = "b", proto: int = TCP) -> None:
    """Two services with one backend."""
    dp.clear()
    base_rows(dp)
    for number, name in ((7, "front"), (27, "twin")):
        dp.service(number, w.addr(name), 80, proto, [(w.addr(backend), 8080)])


class Call:
    """Pod a's conversation with a service by one port, as far as the backend's side tells."""

    def __init__(self, dp: Datapath, w: Wire, name: str, proto: int = TCP, backend: str = "b") -> None:
        self.dp, self.w, self.name, self.backend = dp, w, name, backend
        self.layer = TcpHeader if proto == TCP else UdpHeader
        self.port = 0

    def segment(self, sport: int, dport: int, flags: str) -> Packet:
        if self.layer is TcpHeader:
            return syn(sport, dport, flags)
        return udp(sport, dport)

    def send(self, flags: str = "S") -> int:
        """The port that the backend sees."""
        _, out, _ = send(self.dp, "from_pod", self.w.sent(self.name, self.segment(40000, 80, flags)))
        packet = Ether(out)
        assert packet.payload.dst == self.w.addr(self.backend)
        assert packet.payload.src == self.w.addr("router" if self.backend == "a" else "a")
        self.port = packet[self.layer].sport
        source = "router" if self.backend == "a" else "a"
        ttl = 64 if self.backend == "a" else 63
        sent = self.segment(self.port, 8080, flags)
        expected = self.w.delivered(self.backend, source, sent, ttl=ttl)
        assert bytes(packet) == bytes(Ether(bytes(expected)))
        return self.port

    def answered(self, flags: str = "SA") -> None:
        """The backend's answer comes from the service, for the port that the pod has."""
        answer = self.segment(8080, self.port, flags)
        if self.backend == "a":
            program, packet = "from_pod", self.w.sent("router", answer)
            expected = self.w.delivered("a", self.name, self.segment(80, 40000, flags), ttl=64)
        else:
            program, packet = "to_pod", self.w.routed(self.backend, "a", answer)
            expected = self.w.routed(self.name, "a", self.segment(80, 40000, flags))
        _, out, _ = send(self.dp, program, packet)
        assert bytes(out) == bytes(expected), (Ether(out), expected)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("proto", [TCP, UDP])
@pytest.mark.parametrize("backend", ["b", "a"], ids=["another", "itself"])
def test_one_port_and_two_services_with_one_backend(dp: Datapath, family: int, proto: int, backend: str) -> None:
    w = Wire(family)
    twins(dp, w, backend, proto)
    first, second = (Call(dp, w, name, proto, backend) for name in ("front", "twin"))
    assert first.send() == 40000
    assert second.send() != 40000
    port = second.port
    for flags in ("SA", "A"):
        first.answered(flags)
        second.answered(flags)
    for _ in range(2):
        assert (first.send("A"), second.send("A")) == (40000, port)
    first.answered("A")
    second.answered("A")


@pytest.mark.parametrize("family", [4, 6])
def test_one_port_directly_and_through_a_service(dp: Datapath, family: int) -> None:
    w = Wire(family)
    twins(dp, w)
    send(dp, "from_pod", w.sent("b", syn(dport=8080)))
    call = Call(dp, w, "front")
    assert call.send() != 40000
    call.answered()
    _, out, _ = send(dp, "to_pod", w.routed("b", "a", syn(8080, 40000, "SA")))
    assert out == bytes(w.routed("b", "a", syn(8080, 40000, "SA")))


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("backend", ["b", "a"], ids=["another", "itself"])
def test_the_port_is_free_again_after_the_first_connection(dp: Datapath, family: int, backend: str) -> None:
    w = Wire(family)
    twins(dp, w, backend)
    first, second = (Call(dp, w, name, backend=backend) for name in ("front", "twin"))
    first.send()
    first.answered()
    first.send("FA")
    first.answered("FA")
    assert second.send() == 40000


CLOSED_BY = {
    "the-client": ["send FA", "answered FA", "send A"],
    "the-server": ["answered FA", "send FA", "answered A"],
    "half": ["send FA", "answered A", "answered A", "send A"],
}


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("backend", ["b", "a"], ids=["another", "itself"])
@pytest.mark.parametrize("end", CLOSED_BY)
def test_a_closed_connection_is_soon_forgotten(dp: Datapath, family: int, backend: str, end: str) -> None:
    """All that is known of it: else every call through a service would leave a row for eight hours."""
    w = Wire(family)
    twins(dp, w, backend)
    call = Call(dp, w, "front", backend=backend)
    for step in ("send S", "answered SA", "send A", *CLOSED_BY[end]):
        side, flags = step.split()
        (call.send if side == "send" else call.answered)(flags)
    now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    left = {k.scope: (e.expires - now) / 1e9 for k, e in dp.items("conntrack") if k.local == w.packed("a")}
    assert left.keys() == {1, 2 if backend == "a" else 0}
    for seconds in left.values():
        assert 28700 < seconds < 28801 if end == "half" else 8 < seconds < 10.1, left


@pytest.mark.parametrize("family", [4, 6])
def test_errors_about_a_connection_with_another_port(dp: Datapath, family: int) -> None:
    w = Wire(family)
    twins(dp, w, proto=UDP)
    for name in ("front", "twin"):
        call = Call(dp, w, name, UDP)
        call.send()
    about = w.ip("a", "b") / udp(call.port, 8080)
    _, out, _ = send(dp, "to_pod", w.routed("hop", "a", w.time_exceeded(about)))
    assert out == bytes(w.routed("hop", "a", w.time_exceeded(w.ip("a", "twin") / udp(40000, 80))))
    error = w.sent("twin", w.unreachable(w.ip("twin", "a") / udp(80, 40000)))
    _, out, _ = send(dp, "from_pod", error)
    assert out == bytes(w.delivered("b", "a", w.unreachable(w.ip("b", "a") / udp(8080, call.port))))


@pytest.mark.parametrize("family", [4, 6])
def test_affinity_by_packet_is_the_pods(dp: Datapath, family: int) -> None:
    w = Wire(family)
    dp.clear()
    base_rows(dp)
    service("b", "c")(dp, w)
    for backend in (700, 701):
        dp.maps["service_members"].update(struct.pack("=II", 7, backend), struct.pack("=I", 1))
    key = rows.FrontendKey(w.packed("front"), 80, TCP)
    dp.put("frontends", key, rows.Frontend(7, 2, FRONTEND_FLAG["AFFINITY"], 600))
    for sport in range(30000, 30040):
        send(dp, "from_pod", w.sent("front", syn(sport)))
    assert len({k.remote for k, _ in dp.items("conntrack") if k.scope == 0 and k.local == w.packed("a")}) == 1
    assert [k for k, _ in dp.maps["affinity"].items()] == [w.packed("a") + struct.pack("=II", 7, 0)]
