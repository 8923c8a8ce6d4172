"""Masquerading: pods speak to the outside with the node's address."""

import pytest
from datapath import (
    EGRESS,
    ENFORCE_EGRESS,
    ENFORCE_INGRESS,
    INGRESS,
    NO_MASQUERADE,
    REDIRECT,
    SHOT,
    TCX_NEXT,
    WORLD,
    Datapath,
    prefix,
)  # fmt: skip
from record import (
    OVERLAY,
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
from scapy.layers.inet import UDP
from scapy.packet import Packet, Raw
from test_policy import enforce, rule
from test_sctp import sctp as sctp_packet

from fimbria.model import rows

PORT = 61000 + 40000 % 1000  # where source port 40000 goes first
SPORT = 40000
TCP_NUMBER, UDP_NUMBER, SCTP_NUMBER = 6, 17, 132


def out(dst: str, payload: Packet, **kw: int) -> Build:
    return lambda w: w.routed("a", dst, payload, **kw)


def taken(count: int, first: int = PORT) -> Prepare:
    """Somebody else has these ports towards the same server."""

    def prepare(dp: Datapath, w: Wire) -> None:
        for port in range(first, first + count):
            key = rows.NatKey(w.packed("world"), w.packed("node"), 53, port, UDP_NUMBER, INGRESS)
            dp.put("nat", key, rows.NatEntry(w.packed("b"), SPORT, 0, 0, 0))

    return prepare


def stolen(dp: Datapath, w: Wire) -> None:
    """a has a binding, but its way back was forgotten and is b's now."""
    key = rows.NatKey(w.packed("a"), w.packed("world"), SPORT, 53, UDP_NUMBER, EGRESS)
    dp.put("nat", key, rows.NatEntry(w.packed("node"), PORT, 0, 0, 0))
    taken(1)(dp, w)


def not_for(dp: Datapath, w: Wire) -> None:
    dp.put("ipcache", prefix(w.cidr("world")), rows.Remote(WORLD, NO_MASQUERADE))


def opened_by_world(dp: Datapath, w: Wire) -> None:
    send(dp, "to_pod", w.routed("world", "a", udp(53, SPORT)))


def replies_only(dp: Datapath, w: Wire) -> None:
    enforce(rule(WORLD, EGRESS), a=ENFORCE_EGRESS | ENFORCE_INGRESS)(dp, w)


def long_ago(dp: Datapath, w: Wire) -> None:
    """The connection's port is known, from a time when it was in use; the way back was forgotten."""
    key = rows.NatKey(w.packed("a"), w.packed("world"), SPORT, 53, UDP_NUMBER, EGRESS)
    dp.put("nat", key, rows.NatEntry(w.packed("node"), PORT + 1, 0, 0, 0))


def in_use_again(dp: Datapath, w: Wire) -> None:
    found = {(k.direction, k.sport, k.dport, e.port): e.used for k, e in dp.items("nat")}
    assert found.keys() == {(EGRESS, SPORT, 53, PORT + 1), (INGRESS, 53, PORT + 1, SPORT)}
    assert all(found.values()), found


def no_way_back_yet(dp: Datapath, w: Wire) -> None:
    """Two rows: each direction finds the other."""
    found = {(k.direction, k.sport, k.dport, e.port) for k, e in dp.items("nat")}
    assert found == {(EGRESS, SPORT, 53, PORT), (INGRESS, 53, PORT, SPORT)}


def other_port(dp: Datapath, w: Wire) -> None:
    mine = [e.port for k, e in dp.items("nat") if k.direction == EGRESS]
    assert len(mine) == 1 and mine[0] != PORT
    assert 61000 <= mine[0] <= 61999


def sctp(sport: int = SPORT) -> Packet:
    return Raw(sctp_packet(sport, 80, bytes(12)))


def with_proto(packet: Packet, number: int) -> Packet:
    ip = packet.payload
    if ip.version == 4:
        ip.proto = number
    else:
        ip.nh = number
    return packet


QUERY = out("world", udp())
SENT = [("from_pod", lambda w: w.sent("world", udp())), ("to_network", QUERY)]
PINGED = [("from_pod", lambda w: w.sent("world", w.echo())),
          ("to_network", lambda w: w.routed("a", "world", w.echo()))]  # fmt: skip
CALLED = [("from_pod", lambda w: w.sent("world", syn())), ("to_network", out("world", syn()))]
RECORDS = [
    Record("UDP leaves with the node's address and a port of ours", QUERY, TCX_NEXT, program="to_network",
           gives=lambda w: w.routed("node", "world", udp(PORT)), then=no_way_back_yet),
    Record("TCP likewise", out("world", syn()), TCX_NEXT, program="to_network",
           gives=lambda w: w.routed("node", "world", syn(PORT))),
    Record("an echo request likewise, by its identifier", lambda w: w.routed("a", "world", w.echo(SPORT)), TCX_NEXT,
           program="to_network", gives=lambda w: w.routed("node", "world", w.echo(PORT))),
    Record("UDP without a checksum stays without",
           lambda w: w.routed("a", "world", UDP(sport=SPORT, dport=53, chksum=0) / Raw(b"data")), TCX_NEXT,
           program="to_network", families=(4,),
           gives=lambda w: w.routed("node", "world", UDP(sport=PORT, dport=53, chksum=0) / Raw(b"data"))),
    Record("SCTP too", lambda w: with_proto(w.routed("a", "world", sctp()), 132), TCX_NEXT, program="to_network",
           gives=lambda w: with_proto(w.routed("node", "world", sctp(PORT)), 132)),
    Record("the answer comes back to the pod", lambda w: w.routed("world", "node", udp(53, PORT)), REDIRECT,
           program="from_network", before=SENT, gives=lambda w: w.delivered("a", "world", udp(53, SPORT))),
    Record("TCP's likewise", lambda w: w.routed("world", "node", syn(80, PORT, "SA")), REDIRECT, program="from_network",
           before=CALLED, gives=lambda w: w.delivered("a", "world", syn(80, SPORT, "SA"))),
    Record("an echo reply likewise", lambda w: w.routed("world", "node", w.echo_reply(61077)), REDIRECT,
           program="from_network", before=PINGED, gives=lambda w: w.delivered("a", "world", w.echo_reply(77))),
    Record("the answer is a reply to policy", lambda w: w.routed("world", "node", udp(53, PORT)), REDIRECT,
           program="from_network", rows=replies_only, before=SENT),
    Record("from another port it is nobody's", lambda w: w.routed("world", "node", udp(54, PORT)), TCX_NEXT,
           program="from_network", before=SENT, gives=lambda w: w.routed("world", "node", udp(54, PORT)), mark=0),
    Record("from another server it is nobody's", lambda w: w.routed("hop", "node", udp(53, PORT)), TCX_NEXT,
           program="from_network", before=SENT, gives=lambda w: w.routed("hop", "node", udp(53, PORT))),
    Record("a taken port is left to its owner", QUERY, TCX_NEXT, program="to_network", rows=taken(1), then=other_port),
    Record("a port whose way back was lost is left", QUERY, TCX_NEXT, program="to_network", rows=stolen,
           then=other_port),
    Record("a port whose way back was forgotten is in use again, for both ways", QUERY, TCX_NEXT, program="to_network",
           rows=long_ago, gives=lambda w: w.routed("node", "world", udp(PORT + 1)), then=in_use_again),
    Record("when all ports are taken it is dropped", QUERY, SHOT, program="to_network", rows=taken(1000, 61000),
           drop="DROP_NAT_NO_MAPPING"),
    Record("the same connection keeps its port", QUERY, TCX_NEXT, program="to_network", before=SENT,
           gives=lambda w: w.routed("node", "world", udp(PORT)), then=no_way_back_yet),
    Record("towards a pod nothing changes", out("c", udp()), TCX_NEXT, program="to_network",
           gives=out("c", udp())),
    Record("towards an exception nothing changes", QUERY, TCX_NEXT, program="to_network", rows=not_for, gives=QUERY),
    Record("towards a node the overlay doesn't reach it is masqueraded", out("other", udp()), TCX_NEXT,
           program="to_network", gives=lambda w: w.routed("node", "other", udp(PORT))),
    Record("an answer to who called the pod keeps its address", QUERY, TCX_NEXT, program="to_network",
           rows=opened_by_world, gives=QUERY),
    Record("the node's own packets are left alone", lambda w: w.routed("node", "world", udp()), TCX_NEXT,
           program="to_network", gives=lambda w: w.routed("node", "world", udp())),
    Record("the node's own traffic comes in untouched", lambda w: w.routed("world", "node", udp(53, 40000)), TCX_NEXT,
           program="from_network", gives=lambda w: w.routed("world", "node", udp(53, 40000))),
    Record("an error about the connection finds its pod", lambda w: w.routed("hop", "node", w.time_exceeded(
           w.ip("node", "world", 1) / udp(PORT))), REDIRECT, program="from_network", before=SENT,
           gives=lambda w: w.delivered("a", "hop", w.time_exceeded(w.ip("a", "world", 1) / udp()))),
    Record("an error about a TCP connection likewise", lambda w: w.routed("hop", "node", w.too_big(
           w.ip("node", "world") / syn(PORT))), REDIRECT, program="from_network", before=CALLED,
           gives=lambda w: w.delivered("a", "hop", w.too_big(w.ip("a", "world") / syn()))),
    Record("an error about an echo likewise", lambda w: w.routed("hop", "node", w.time_exceeded(
           w.ip("node", "world", 1) / w.echo(61077))), REDIRECT, program="from_network", before=PINGED,
           gives=lambda w: w.delivered("a", "hop", w.time_exceeded(w.ip("a", "world", 1) / w.echo(77)))),
    Record("an error that quotes eight bytes only likewise", lambda w: w.routed("hop", "node", w.time_exceeded(
           Raw(bytes(w.ip("node", "world", 1) / syn(PORT))[: (28 if w.family == 4 else 48)]))), REDIRECT,
           program="from_network", before=CALLED, gives=lambda w: w.delivered("a", "hop", w.time_exceeded(
           Raw(bytes(w.ip("a", "world", 1) / syn())[: (28 if w.family == 4 else 48)])))),
    Record("an error about the node's own connection is the node's", lambda w: w.routed("hop", "node", w.time_exceeded(
           w.ip("node", "world", 1) / udp(5))), TCX_NEXT, program="from_network", before=SENT, mark=0),
    Record("a pod's error about an answer goes out in the node's name", lambda w: w.routed("a", "world", w.unreachable(
           w.ip("world", "a") / udp(53, SPORT))), TCX_NEXT, program="to_network", before=SENT,
           gives=lambda w: w.routed("node", "world", w.unreachable(w.ip("world", "node") / udp(53, PORT)))),
    Record("the node's error about an answer names the node", lambda w: w.routed("node", "world", w.too_big(
           w.ip("world", "a") / udp(53, SPORT))), TCX_NEXT, program="to_network", before=SENT,
           gives=lambda w: w.routed("node", "world", w.too_big(w.ip("world", "node") / udp(53, PORT)))),
    Record("a packet from the network with our address is refused", lambda w: w.routed("node", "a", udp()), SHOT,
           program="from_network", drop="DROP_INVALID_SOURCE_IP"),
    Record("a pod's packet outside its tunnel is refused", lambda w: w.routed("c", "a", udp()), SHOT,
           program="from_network", drop="DROP_INVALID_SOURCE_IP"),
    Record("the world may call a pod", lambda w: w.routed("world", "a", udp()), REDIRECT, program="from_network",
           gives=lambda w: w.delivered("a", "world", udp())),
    Record("unless policy forbids", lambda w: w.routed("world", "a", udp()), SHOT, program="from_network",
           rows=enforce(a=ENFORCE_INGRESS), drop="DROP_POLICY_DENIED"),
    Record("ARP is the stack's", lambda w: with_type(w), TCX_NEXT, program="from_network", families=(4,)),
]  # fmt: skip


def with_type(w: Wire) -> Packet:
    packet = w.routed("world", "a", udp())
    packet.type = 0x0806
    return packet


@pytest.mark.parametrize(("record", "family"), cases(RECORDS), ids=case_id)
def test_record(dp: Datapath, record: Record, family: int) -> None:
    check(dp, record, family)


IN_NATIVE = [
    Record("with native routing nodes see the pod", out("other", udp()), TCX_NEXT, program="to_network",
           gives=out("other", udp())),
    Record("with native routing remote pods come in by the network", lambda w: w.routed("c", "a", udp()), REDIRECT,
           program="from_network", gives=lambda w: w.delivered("a", "c", udp())),
    Record("with native routing the world is still masqueraded", QUERY, TCX_NEXT, program="to_network",
           gives=lambda w: w.routed("node", "world", udp(PORT))),
]  # fmt: skip


@pytest.mark.parametrize(("record", "family"), cases(IN_NATIVE), ids=case_id)
def test_native(native: Datapath, record: Record, family: int) -> None:
    check(native, record, family)


@pytest.mark.parametrize("family", [4, 6])
def test_switched_off(family: int) -> None:
    w = Wire(family)
    off = Datapath({**OVERLAY, "cfg_masquerade4": False, "cfg_masquerade6": False}, ("host",))
    try:
        base_rows(off)
        assert send(off, "to_network", QUERY(w)) == (TCX_NEXT, bytes(QUERY(w)), 0)
    finally:
        off.close()
