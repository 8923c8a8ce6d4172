"""Where packets of a pod go, and what is refused before they go anywhere."""

from dataclasses import replace
from typing import Any

import pytest
from datapath import EVENT_TRACE, POINT, REDIRECT, SHOT, TCX_NEXT, Datapath
from record import (
    A_IDENTITY,
    A_IFINDEX,
    B_IFINDEX,
    MACS,
    Record,
    Wire,
    case_id,
    cases,
    check,
    syn,
    udp,
)
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment, IPv6ExtHdrHopByHop, PadN
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Packet, Raw

FROM_A = A_IDENTITY << 8 | 0xF1


def not_ready(dp: Datapath, _w: Wire) -> None:
    dp.put("endpoints", A_IFINDEX, replace(dp.get("endpoints", A_IFINDEX), flags=0))


def receiver_not_ready(dp: Datapath, _w: Wire) -> None:
    dp.put("endpoints", B_IFINDEX, replace(dp.get("endpoints", B_IFINDEX), flags=0))


def no_row(dp: Datapath, _w: Wire) -> None:
    dp.maps["endpoints"].delete(dp.key("endpoints", A_IFINDEX))


def receiver_gone(dp: Datapath, _w: Wire) -> None:
    dp.maps["endpoints"].delete(dp.key("endpoints", B_IFINDEX))


def only_other_family(dp: Datapath, w: Wire) -> None:
    lost = {"addr4": bytes(16)} if w.family == 4 else {"addr6": bytes(16)}
    dp.put("endpoints", A_IFINDEX, replace(dp.get("endpoints", A_IFINDEX), **lost))


def raw_ip(w: Wire, proto: int, payload: bytes = b"x" * 20) -> Packet:
    ip = w.ip("a", "world")
    if w.family == 4:
        ip.proto = proto
    else:
        ip.nh = proto
    return Ether(src=MACS["a"], dst=MACS["a-host"]) / ip / Raw(payload)


def cut(packet: Packet, size: int) -> Packet:
    return Ether(bytes(packet)[:size])


def with_field(packet: Packet, layer: type[Packet], **fields: Any) -> Packet:
    for name, value in fields.items():
        setattr(packet[layer], name, value)
    return packet


def stub(w: Wire, payload: Packet, size: int) -> Packet:
    """A packet of which only so many bytes of the transport header are there."""
    packet, header = w.sent("b", payload), 20 if w.family == 4 else 40
    layer, length = (IP, {"len": header + size}) if w.family == 4 else (IPv6, {"plen": size})
    return cut(with_field(packet, layer, **length), 14 + header + size)


def fragment(w: Wire, dst: str, offset: int, more: bool, payload: bytes, ident: int = 99) -> Packet:
    """A piece of a UDP datagram; `offset` in bytes."""
    ip = w.ip("a", dst)
    ether = Ether(src=MACS["a"], dst=MACS["a-host"])
    if w.family == 4:
        ip.flags, ip.frag, ip.id, ip.proto = ("MF" if more else 0), offset // 8, ident, 17
        return ether / ip / Raw(payload)
    return ether / ip / IPv6ExtHdrFragment(nh=17, offset=offset // 8, m=int(more), id=ident) / Raw(payload)


def first_fragment(w: Wire, dst: str = "b") -> Packet:
    return fragment(w, dst, 0, True, bytes(UDP(sport=40000, dport=53, len=40, chksum=1)) + b"f" * 16)


RECORDS = [
    Record("a packet for a pod of the node is delivered to it", lambda w: w.sent("b", udp()), REDIRECT,
           gives=lambda w: w.delivered("b", "a", udp()), events=[(EVENT_TRACE, POINT["TRACE_TO_ENDPOINT"])], mark=0),
    Record("TCP is delivered likewise", lambda w: w.sent("b", syn()), REDIRECT,
           gives=lambda w: w.delivered("b", "a", syn())),
    Record("an echo request is delivered likewise", lambda w: w.sent("b", w.echo()), REDIRECT,
           gives=lambda w: w.delivered("b", "a", w.echo())),
    Record("a packet for a pod of another node goes to the overlay device", lambda w: w.sent("c", udp()), REDIRECT,
           gives=lambda w: w.sent("c", udp(), ttl=63), mark=0xF2,
           events=[(EVENT_TRACE, POINT["TRACE_TO_OVERLAY"])]),
    Record("a packet that does not fit through the overlay is the stack's",
           lambda w: w.sent("c", udp(data=b"x" * 1430)), TCX_NEXT, mark=FROM_A,
           gives=lambda w: w.sent("c", udp(data=b"x" * 1430))),
    Record("a packet for the node itself is the stack's", lambda w: w.sent("node", udp()), TCX_NEXT, mark=FROM_A,
           gives=lambda w: w.sent("node", udp()), events=[(EVENT_TRACE, POINT["TRACE_TO_HOST"])]),
    Record("a packet for the gateway is the stack's", lambda w: w.sent("router", w.echo()), TCX_NEXT, mark=FROM_A),
    Record("a packet without a route is the stack's", lambda w: w.sent("world", udp()), TCX_NEXT, mark=FROM_A,
           events=[(EVENT_TRACE, POINT["TRACE_TO_STACK"])]),
    Record("the stack answers a packet for the overlay whose time is up", lambda w: w.sent("c", udp(), ttl=1), TCX_NEXT,
           gives=lambda w: w.sent("c", udp(), ttl=1), mark=FROM_A),
    Record("the stack answers a packet for a local pod whose time is up", lambda w: w.sent("b", udp(), ttl=1), TCX_NEXT,
           gives=lambda w: w.sent("b", udp(), ttl=1), mark=FROM_A),
    Record("SCTP is forwarded by its ports", lambda w: raw_ip(w, 132, b"\x9c\x40\x00\x50" + b"\0" * 20), TCX_NEXT),
    Record("an unknown pod's packet is dropped", lambda w: w.sent("b", udp()), SHOT, rows=no_row,
           drop="DROP_EP_NOT_READY"),
    Record("a pod without its policy yet sends nothing", lambda w: w.sent("b", udp()), SHOT, rows=not_ready,
           drop="DROP_EP_NOT_READY"),
    Record("a pod without its policy yet gets nothing", lambda w: w.sent("b", udp()), SHOT, rows=receiver_not_ready,
           drop="DROP_EP_NOT_READY"),
    Record("an address without its endpoint is dropped", lambda w: w.sent("b", udp()), SHOT, rows=receiver_gone,
           drop="DROP_NO_LOCAL_ENDPOINT"),
    Record("a foreign source address is refused", lambda w: w.sent("b", udp(), src="c"), SHOT,
           drop="DROP_INVALID_SOURCE_IP"),
    Record("the node's address as source is refused", lambda w: w.sent("b", udp(), src="node"), SHOT,
           drop="DROP_INVALID_SOURCE_IP"),
    Record("a source of a family that the pod has not is refused", lambda w: w.sent("b", udp()), SHOT,
           rows=only_other_family, drop="DROP_INVALID_SOURCE_IP"),
    Record("a foreign source MAC is refused",
           lambda w: with_field(w.sent("b", udp()), Ether, src=MACS["b"]), SHOT, drop="DROP_INVALID_SOURCE_MAC"),
    Record("a VLAN tag is refused",
           lambda w: Ether(src=MACS["a"], dst=MACS["a-host"]) / Dot1Q(vlan=5) / w.ip("a", "b") / udp(), SHOT,
           drop="DROP_UNSUPPORTED_L2_PROTOCOL"),
    Record("another network protocol is refused",
           lambda w: Ether(src=MACS["a"], dst=MACS["a-host"], type=0x8847) / Raw(b"x" * 40), SHOT, families=(4,),
           drop="DROP_UNSUPPORTED_L2_PROTOCOL"),
    Record("another transport protocol is refused", lambda w: raw_ip(w, 47), SHOT, drop="DROP_CT_UNKNOWN_L4_PROTOCOL"),
    Record("the other family's ICMP is refused", lambda w: raw_ip(w, 58 if w.family == 4 else 1), SHOT,
           drop="DROP_CT_UNKNOWN_L4_PROTOCOL"),
    Record("multicast goes nowhere", lambda w: w.sent("224.0.0.251" if w.family == 4 else "ff02::fb", udp()), SHOT,
           drop="DROP_STALE_OR_UNROUTABLE_IP"),
    Record("group membership is taken in silence", lambda w: raw_ip(w, 2), SHOT, families=(4,), events=[]),
    Record("a cut transport header is refused", lambda w: stub(w, udp(), 4), SHOT, drop="DROP_CT_INVALID_HEADER"),
    Record("a cut TCP header is refused", lambda w: stub(w, syn(), 10), SHOT, drop="DROP_CT_INVALID_HEADER"),
    Record("a TCP header shorter than itself is refused",
           lambda w: with_field(w.sent("b", syn()), TCP, dataofs=4), SHOT,
           drop="DROP_CT_INVALID_HEADER"),
    Record("a header length below the least is refused", lambda w: with_field(w.sent("b", udp()), IP, ihl=4), SHOT,
           families=(4,), drop="DROP_INVALID_PACKET"),
    Record("a total length beyond the frame is refused", lambda w: with_field(w.sent("b", udp()), IP, len=2000), SHOT,
           families=(4,), drop="DROP_INVALID_PACKET"),
    Record("the wrong version is refused",
           lambda w: with_field(w.sent("b", udp()), IP if w.family == 4 else IPv6, version=5), SHOT,
           drop="DROP_INVALID_PACKET"),
    Record("IPv4 options are stepped over",
           lambda w: Ether(src=MACS["a"], dst=MACS["a-host"]) / w.ip("a", "b", options=b"\x01\x01\x01\x00") / udp(),
           REDIRECT, families=(4,)),
    Record("IPv6 extension headers are stepped over",
           lambda w: Ether(src=MACS["a"], dst=MACS["a-host"]) / w.ip("a", "b") / IPv6ExtHdrHopByHop(
               options=[PadN(optdata=b"\0" * 4)]) / IPv6ExtHdrDestOpt(options=[PadN(optdata=b"\0" * 4)]) / udp(),
           REDIRECT, families=(6,)),
    Record("too many IPv6 extension headers are refused",
           lambda w: Ether(src=MACS["a"], dst=MACS["a-host"]) / w.ip("a", "b") / chain(8) / udp(), SHOT,
           families=(6,), drop="DROP_INVALID_IPV6_EXTENSION"),
    Record("a mapped IPv4 address on the wire is refused", lambda w: w.sent("::ffff:10.1.0.11", udp()), SHOT,
           families=(6,), drop="DROP_INVALID_PACKET"),
    Record("the first fragment is delivered", first_fragment, REDIRECT),
    Record("a later fragment follows the first", lambda w: fragment(w, "b", 24, False, b"l" * 16), REDIRECT,
           before=[("from_pod", first_fragment)]),
    Record("a later fragment alone is dropped", lambda w: fragment(w, "b", 24, False, b"l" * 16), SHOT,
           drop="DROP_FRAGMENT_NOT_FOUND"),
    Record("a fragment of another datagram is dropped",
           lambda w: fragment(w, "b", 24, False, b"l" * 16, ident=98), SHOT,
           before=[("from_pod", first_fragment)], drop="DROP_FRAGMENT_NOT_FOUND"),
    Record("to_pod passes what the node sends", lambda w: w.routed("node", "a", udp()), TCX_NEXT, program="to_pod",
           gives=lambda w: w.routed("node", "a", udp()), mark=0, mark_in=0),
    Record("to_pod passes our own answers unjudged", lambda w: w.routed("front", "a", udp()), TCX_NEXT,
           program="to_pod", rows=not_ready, mark_in=0xF4, mark=0, events=[]),
    Record("to_pod stops packets for a pod without its policy", lambda w: w.routed("node", "a", udp()), SHOT,
           program="to_pod", rows=not_ready, drop="DROP_EP_NOT_READY"),
    Record("to_overlay passes what has its tunnel key", lambda w: w.routed("a", "c", udp()), TCX_NEXT,
           program="to_overlay", mark_in=0xF2, mark=0, gives=lambda w: w.routed("a", "c", udp())),
    Record("to_overlay drops what no node is known for", lambda w: w.routed("node", "world", udp()), SHOT,
           program="to_overlay", drop="DROP_NO_TUNNEL_ENDPOINT"),
    Record("from_overlay drops what came without a tunnel", lambda w: w.routed("c", "a", udp()), SHOT,
           program="from_overlay", drop="DROP_NO_TUNNEL_KEY"),
]  # fmt: skip


def chain(n: int) -> Packet:
    headers: Packet = IPv6ExtHdrDestOpt(options=[PadN(optdata=b"\0" * 4)])
    for _ in range(n - 1):
        headers = headers / IPv6ExtHdrDestOpt(options=[PadN(optdata=b"\0" * 4)])
    return headers


@pytest.mark.parametrize(("record", "family"), cases(RECORDS), ids=case_id)
def test_record(dp: Datapath, record: Record, family: int) -> None:
    check(dp, record, family)
