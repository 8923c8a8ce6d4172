"""Services by packet: there and back, errors included, and an answer when there is nobody."""

from collections.abc import Iterator

import pytest
from datapath import (
    EGRESS,
    ENFORCE_EGRESS,
    ENFORCE_INGRESS,
    EVENT_DROP,
    REDIRECT,
    SHOT,
    TCX_NEXT,
    Datapath,
)  # fmt: skip
from record import (
    B_IDENTITY,
    C_IDENTITY,
    OVERLAY,
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
from scapy.packet import Packet, Raw
from test_policy import enforce, rule

from fimbria.model import rows

TCP, UDP, SCTP = 6, 17, 132
OUT, IN = ENFORCE_EGRESS, ENFORCE_INGRESS


@pytest.fixture(scope="module")
def dp() -> Iterator[Datapath]:
    loaded = Datapath(OVERLAY)
    yield loaded
    loaded.close()


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


def replaced(dp: Datapath, w: Wire) -> None:
    """Another service has the connection's frontend now."""
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


def sctp(w: Wire, dst: str) -> Packet:
    packet = w.sent(dst, Raw(b"\x9c\x40\x00\x50" + b"\0" * 20))
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


CALL = ("from_pod", lambda w: w.sent("front", syn()))
ASK = ("from_pod", lambda w: w.sent("front", udp()))
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
    Record("another service's frontend in its place ends it too", lambda w: w.sent("front", acked()), REDIRECT,
           rows=replaced, gives=lambda w: answered(w, TcpHeader(sport=80, dport=40000, flags="R", seq=555, window=0),
           "front"), drop="DROP_SERVICE_NO_BACKEND"),
    Record("a new attempt goes to the new service", CALL[1], REDIRECT, rows=replaced,
           gives=lambda w: w.sent("c", syn(dport=8080), ttl=63)),
    Record("a connection ends with its backend", lambda w: w.sent("front", acked()), REDIRECT, rows=dead,
           gives=lambda w: answered(w, TcpHeader(sport=80, dport=40000, flags="R", seq=555, window=0), "front"),
           drop="DROP_SERVICE_NO_BACKEND"),
    Record("a new attempt gets another backend", CALL[1], REDIRECT, rows=dead,
           gives=lambda w: w.sent("c", syn(dport=8080), ttl=63)),
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
