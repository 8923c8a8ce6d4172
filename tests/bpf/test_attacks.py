"""What a hostile pod, or a hostile network, sends to get past policy."""

import pytest
from datapath import REDIRECT, SHOT, TCX_NEXT, Datapath
from record import ADDRS, B_IDENTITY, MACS, Record, Wire, base_rows, case_id, cases, check, udp
from scapy.layers.inet6 import ICMPv6ND_NA, ICMPv6NDOptDstLLAddr, IPv6
from scapy.layers.l2 import Ether
from scapy.layers.vxlan import VXLAN
from scapy.packet import Packet, Raw

READY, ENFORCE_INGRESS = 1, 2
SIX = (6,)


def forged_tunnel(w: Wire) -> Packet:
    """Vouches for pod b's identity."""
    return udp(5555, 8472, b"") / VXLAN(flags=8, vni=B_IDENTITY) / Ether() / w.ip("b", "c") / udp()


def advert(dst: str, hops: int = 255) -> Packet:
    """A true advertisement, with a message for `dst` behind it."""
    return (
        Ether(src=MACS["a"], dst=MACS["a-host"]) / IPv6(src=ADDRS[6]["a"], dst=ADDRS[6].get(dst, dst), hlim=hops)
        / ICMPv6ND_NA(tgt=ADDRS[6]["a"], R=0, S=1, O=1) / ICMPv6NDOptDstLLAddr(lladdr=MACS["a"]) / Raw(b"secret")
    )  # fmt: skip


def closed_a(dp: Datapath, _w: Wire) -> None:
    base_rows(dp, flags_a=READY | ENFORCE_INGRESS)


RECORDS = [
    *(
        Record(f"a pod's own tunnel packet to {who} is refused", lambda w, d=d: w.sent(d, forged_tunnel(w)), SHOT,
               drop="DROP_INVALID_IDENTITY")
        for d, who in (("other", "another node"), ("node", "its node"), ("world", "an address nobody knows"))
    ),
    Record("the port is free between pods", lambda w: w.sent("b", udp(5555, 8472)), REDIRECT),
    *(
        Record(f"an advertisement carries nothing to {d}", lambda w, d=d: advert(d), SHOT, families=SIX, events=[])
        for d in ("b", "c", "world", "other", "ff02::1")
    ),
    Record("an advertisement for the stack goes there", lambda w: advert("fe80::1"), TCX_NEXT, families=SIX, events=[]),
    Record("a forwarded advertisement has policy", lambda w: Ether() / IPv6(src=ADDRS[6]["c"], dst=ADDRS[6]["a"],
           hlim=254) / ICMPv6ND_NA(tgt=ADDRS[6]["c"]), SHOT, program="to_pod", families=SIX, rows=closed_a,
           drop="DROP_POLICY_DENIED"),
    Record("the node's link-local addresses are out of reach", lambda w: w.sent("fe80::1", udp()), SHOT, families=SIX,
           drop="DROP_STALE_OR_UNROUTABLE_IP"),
    Record("an error about another pod's connection is refused", lambda w: w.sent("b", w.unreachable(
           w.ip("b", "c") / udp())), SHOT, drop="DROP_INVALID_SOURCE_IP"),
    Record("nobody outside has a local pod's address", lambda w: w.routed("a", "b", udp()), SHOT,
           program="from_network", drop="DROP_INVALID_SOURCE_IP"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "family"), cases(RECORDS), ids=case_id)
def test_record(dp: Datapath, record: Record, family: int) -> None:
    check(dp, record, family)


NATIVE_RECORDS = [
    Record("without an overlay its port is a port", lambda w: w.sent("node", udp(5555, 8472)), TCX_NEXT),
    Record("nobody outside has a local pod's address", lambda w: w.routed("a", "b", udp()), SHOT,
           program="from_network", drop="DROP_INVALID_SOURCE_IP"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "family"), cases(NATIVE_RECORDS), ids=case_id)
def test_native(native: Datapath, record: Record, family: int) -> None:
    check(native, record, family)
