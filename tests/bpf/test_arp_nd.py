"""The pods' gateway exists by its answers only."""

from typing import Any

import pytest
from datapath import REDIRECT, SHOT, TCX_NEXT, Datapath
from record import ADDRS, MACS, Record, base_rows, case_id, cases, check, send, udp
from scapy.layers.inet6 import (
    ICMPv6MLReport2,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RS,
    ICMPv6NDOptDstLLAddr,
    ICMPv6NDOptSrcLLAddr,
    IPv6,
)  # fmt: skip
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet

ROUTER, POD = ADDRS[6]["router"], ADDRS[6]["a"]


def who_has(target: str, **fields: Any) -> Packet:
    question: dict[str, Any] = {"op": 1, "hwsrc": MACS["a"], "psrc": ADDRS[4]["a"], "pdst": target, **fields}
    return Ether(src=MACS["a"], dst="ff:ff:ff:ff:ff:ff") / ARP(**question)


def is_at() -> Packet:
    return Ether(src=MACS["a-host"], dst=MACS["a"]) / ARP(
        op=2, hwsrc=MACS["a-host"], psrc=ADDRS[4]["router"], hwdst=MACS["a"], pdst=ADDRS[4]["a"]
    )


def solicit(target: str = ROUTER, src: str = POD, hlim: int = 255, dst: str = "ff02::1:ff00:1",
            mac: bool = True) -> Packet:  # fmt: skip
    packet = Ether(src=MACS["a"], dst="33:33:ff:00:00:01") / IPv6(src=src, dst=dst, hlim=hlim) / ICMPv6ND_NS(tgt=target)
    return packet / ICMPv6NDOptSrcLLAddr(lladdr=MACS["a"]) if mac else packet


def advertised(to: str = POD) -> Packet:
    return (
        Ether(src=MACS["a-host"], dst=MACS["a"]) / IPv6(src=ROUTER, dst=to, hlim=255)
        / ICMPv6ND_NA(tgt=ROUTER, R=1, S=1, O=1) / ICMPv6NDOptDstLLAddr(lladdr=MACS["a-host"])
    )  # fmt: skip


def own_advert(mac: str = MACS["a"], target: str = POD) -> Packet:
    return (
        Ether(src=MACS["a"], dst=MACS["a-host"]) / IPv6(src=POD, dst=ROUTER, hlim=255)
        / ICMPv6ND_NA(tgt=target, R=0, S=1, O=1) / ICMPv6NDOptDstLLAddr(lladdr=mac)
    )  # fmt: skip


def from_link_local(payload: Packet, dst: str = "ff02::2", src: str = "fe80::1") -> Packet:
    return Ether(src=MACS["a"], dst="33:33:00:00:00:02") / IPv6(src=src, dst=dst, hlim=255) / payload


FOUR, SIX = (4,), (6,)
RECORDS = [
    Record("ARP for the gateway is answered", lambda w: who_has(ADDRS[4]["router"]), REDIRECT, families=FOUR,
           gives=lambda w: is_at(), mark=0xF4),
    Record("ARP for others is not", lambda w: who_has(ADDRS[4]["b"]), SHOT, families=FOUR, events=[]),
    Record("ARP of a foreign MAC is refused", lambda w: with_source(who_has(ADDRS[4]["router"])), SHOT, families=FOUR,
           drop="DROP_INVALID_SOURCE_MAC"),
    Record("the pod's own ARP answer reaches the stack", lambda w: who_has(ADDRS[4]["router"], op=2), TCX_NEXT,
           families=FOUR),
    Record("an ARP answer in another name does not", lambda w: who_has(ADDRS[4]["router"], op=2, psrc=ADDRS[4]["b"]),
           SHOT, families=FOUR),
    Record("an ARP answer with another MAC does not", lambda w: who_has(ADDRS[4]["router"], op=2, hwsrc=MACS["b"]),
           SHOT, families=FOUR),
    Record("cut ARP is dropped", lambda w: Ether(bytes(who_has(ADDRS[4]["router"]))[:30]), SHOT, families=FOUR),
    Record("a solicitation for the gateway is answered", lambda w: solicit(), REDIRECT, families=SIX,
           gives=lambda w: advertised(), mark=0xF4),
    Record("one without a MAC too", lambda w: solicit(mac=False, dst=ROUTER), REDIRECT, families=SIX,
           gives=lambda w: advertised()),
    Record("one from a link-local address too", lambda w: solicit(src="fe80::1"), REDIRECT, families=SIX,
           gives=lambda w: advertised("fe80::1")),
    Record("one for others is not", lambda w: solicit(ADDRS[6]["b"]), SHOT, families=SIX, events=[]),
    Record("one that crossed a router is not", lambda w: solicit(hlim=64), SHOT, families=SIX, events=[]),
    Record("a duplicate check is taken in silence", lambda w: solicit(POD, src="::", mac=False), SHOT, families=SIX,
           events=[]),
    Record("a router solicitation is taken in silence", lambda w: from_link_local(ICMPv6ND_RS()), SHOT, families=SIX,
           events=[]),
    Record("group membership is taken in silence", lambda w: from_link_local(ICMPv6MLReport2(), "ff02::16"), SHOT,
           families=SIX, events=[]),
    Record("the pod's own advertisement reaches the stack", lambda w: own_advert(), TCX_NEXT, families=SIX),
    Record("one with another MAC does not", lambda w: own_advert(mac=MACS["b"]), SHOT, families=SIX, events=[]),
    Record("one for another address does not", lambda w: own_advert(target=ADDRS[6]["b"]), SHOT, families=SIX,
           events=[]),
    Record("other link-local traffic is refused", lambda w: from_link_local(udp(), "fe80::2"), SHOT, families=SIX,
           drop="DROP_INVALID_SOURCE_IP"),
    Record("to_pod lets the stack ask", lambda w: Ether(src=MACS["a-host"], dst=MACS["a"]) / IPv6(
           src=ROUTER, dst=POD, hlim=255) / ICMPv6ND_NS(tgt=POD), TCX_NEXT, program="to_pod", families=SIX, events=[]),
]  # fmt: skip


def with_source(packet: Packet) -> Packet:
    packet.src = MACS["b"]
    return packet


@pytest.mark.parametrize(("record", "family"), cases(RECORDS), ids=case_id)
def test_record(dp: Datapath, record: Record, family: int) -> None:
    check(dp, record, family)


@pytest.mark.parametrize("question", [who_has("10.1.0.1"), solicit()], ids=["arp", "nd"])
def test_without_a_gateway_nothing_is_answered(question: Packet) -> None:
    bare = Datapath(objects=("pod",))
    try:
        base_rows(bare)
        assert send(bare, "from_pod", question)[0] == SHOT
    finally:
        bare.close()
