"""Packet tests as records: rows in maps and packets before, one packet in; verdict, packet and events out.

Every record runs for IPv4 and IPv6. Names stand for addresses: `a` and `b` are pods of this node, `c` is a pod of
another one (reached through the overlay), `node` and `other` are nodes, `world` is outside.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from datapath import (
    DROP,
    EVENT_DROP,
    HOST,
    NODE,
    POD,
    READY,
    REMOTE_NODE,
    SHOT,
    TUNNEL,
    Datapath,
    Setting,
    addr,
    mac,
    prefix,
)
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
    ICMPv6PacketTooBig,
    ICMPv6TimeExceeded,
    IPv6,
)  # fmt: skip
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from fimbria.kernel.bpf import prog_test_run
from fimbria.model import rows

A_IFINDEX, B_IFINDEX, OVERLAY_IFINDEX = 1, 4242, 4243  # the first is lo, where test runs take place
A_ID, B_ID = 11, 12
A_IDENTITY, B_IDENTITY, C_IDENTITY = 1001, 1002, 1003
MACS = {"a": "02:00:00:00:0a:01", "a-host": "02:00:00:00:0a:02", "b": "02:00:00:00:0b:01",
        "b-host": "02:00:00:00:0b:02", "net": "02:00:00:00:0e:01"}  # fmt: skip
ADDRS = {
    4: {"a": "10.1.0.10", "b": "10.1.0.11", "c": "10.2.0.10", "router": "10.1.0.1", "node": "192.168.1.2",
        "other": "192.168.2.2", "world": "203.0.113.9", "hop": "198.51.100.1", "front": "10.96.0.10",
        "empty": "10.96.0.11", "twin": "10.96.0.12"},
    6: {"a": "fd10:1::10", "b": "fd10:1::11", "c": "fd10:2::10", "router": "fd10:1::1", "node": "fd01:1::2",
        "other": "fd01:2::2", "world": "fd99::9", "hop": "fd98::1", "front": "fd96::10", "empty": "fd96::11",
        "twin": "fd96::12"},
}  # fmt: skip
OVERLAY: dict[str, Setting] = {"cfg_overlay_ifindex": OVERLAY_IFINDEX, "cfg_node_addr4": addr(ADDRS[4]["node"]),
           "cfg_node_addr6": addr(ADDRS[6]["node"]), "cfg_router_addr4": addr(ADDRS[4]["router"]),
           "cfg_router_addr6": addr(ADDRS[6]["router"]), "cfg_nat_port_min": 61000,
           "cfg_nat_port_max": 61000 + 999}  # fmt: skip
NATIVE: dict[str, Setting] = {**OVERLAY, "cfg_overlay_ifindex": 0}


@dataclass(frozen=True)
class Wire:
    """Builds packets of one family."""

    family: int

    def addr(self, name: str) -> str:
        return ADDRS[self.family].get(name, name)

    def packed(self, name: str) -> bytes:
        return addr(self.addr(name))

    def cidr(self, name: str) -> str:
        return f"{self.addr(name)}/{32 if self.family == 4 else 128}"

    def ip(self, src: str, dst: str, ttl: int = 64, **fields: Any) -> Packet:
        if self.family == 4:
            return IP(src=self.addr(src), dst=self.addr(dst), ttl=ttl, id=7, **fields)
        return IPv6(src=self.addr(src), dst=self.addr(dst), hlim=ttl)

    def sent(self, dst: str, payload: Packet, *, src: str = "a", ttl: int = 64) -> Packet:
        """As pod a sends it."""
        return Ether(src=MACS["a"], dst=MACS["a-host"]) / self.ip(src, dst, ttl) / payload

    def delivered(self, to: str, src: str, payload: Packet, *, ttl: int = 63) -> Packet:
        """As pod `to` gets it."""
        return Ether(src=MACS[f"{to}-host"], dst=MACS[to]) / self.ip(src, to, ttl) / payload

    def routed(self, src: str, dst: str, payload: Packet, *, ttl: int = 64) -> Packet:
        """As it passes a device of the node."""
        return Ether(src=MACS["net"], dst=MACS["net"]) / self.ip(src, dst, ttl) / payload

    @property
    def icmp(self) -> int:
        return 1 if self.family == 4 else 58

    @property
    def echo_type(self) -> int:
        return 8 if self.family == 4 else 128

    def echo(self, ident: int = 77, data: bytes = b"ping") -> Packet:
        kind = ICMP(type=8, id=ident, seq=1) if self.family == 4 else ICMPv6EchoRequest(id=ident, seq=1)
        return kind / Raw(data)

    def echo_reply(self, ident: int = 77, data: bytes = b"ping") -> Packet:
        kind = ICMP(type=0, id=ident, seq=1) if self.family == 4 else ICMPv6EchoReply(id=ident, seq=1)
        return kind / Raw(data)

    def unreachable(self, about: Packet) -> Packet:
        """Port unreachable, quoting `about` (from its network header on)."""
        return (ICMP(type=3, code=3) if self.family == 4 else ICMPv6DestUnreach(code=4)) / Raw(bytes(about))

    def too_big(self, about: Packet, mtu: int = 1400) -> Packet:
        kind = ICMP(type=3, code=4, nexthopmtu=mtu) if self.family == 4 else ICMPv6PacketTooBig(mtu=mtu)
        return kind / Raw(bytes(about))

    def time_exceeded(self, about: Packet) -> Packet:
        return (ICMP(type=11) if self.family == 4 else ICMPv6TimeExceeded()) / Raw(bytes(about))


def syn(sport: int = 40000, dport: int = 80, flags: str = "S") -> Packet:
    return TCP(sport=sport, dport=dport, flags=flags, seq=1000)


def udp(sport: int = 40000, dport: int = 53, data: bytes = b"data") -> Packet:
    return UDP(sport=sport, dport=dport) / Raw(data)


Build = Callable[[Wire], Packet]
Prepare = Callable[[Datapath, Wire], None]


def nothing(_dp: Datapath, _w: Wire) -> None: ...


@dataclass(frozen=True)
class Record:
    """`program` gets `packet` after `before`; `gives` is what comes out (not looked at when None)."""

    says: str
    packet: Build
    verdict: int
    program: str = "from_pod"
    rows: Prepare = nothing
    before: Sequence[tuple[str, Build]] = ()
    gives: Build | None = None
    drop: str = ""
    mark_in: int = 0
    mark: int | None = None
    events: Sequence[tuple[int, int]] | None = None  # (type, reason) of those the packet caused
    families: tuple[int, ...] = (4, 6)
    then: Prepare = nothing

    def __str__(self) -> str:
        return self.says.replace(" ", "-")


def base_rows(dp: Datapath, flags_a: int = READY, flags_b: int = READY) -> None:
    """Two local pods, a remote one, two nodes."""
    for name, ifindex, number, identity, flags in (
        ("a", A_IFINDEX, A_ID, A_IDENTITY, flags_a), ("b", B_IFINDEX, B_ID, B_IDENTITY, flags_b),
    ):  # fmt: skip
        row = rows.Endpoint(number, identity, number, flags, addr(ADDRS[4][name]), addr(ADDRS[6][name]),
                            mac(MACS[name]), mac(MACS[f"{name}-host"]))  # fmt: skip
        dp.endpoint(ifindex, row)
    for family in (4, 6):
        w, via = Wire(family), addr(ADDRS[4]["other"])
        for name, remote in {
            "a": rows.Remote(A_IDENTITY, POD), "b": rows.Remote(B_IDENTITY, POD),
            "c": rows.Remote(C_IDENTITY, POD | TUNNEL, via), "node": rows.Remote(HOST, NODE),
            "router": rows.Remote(HOST, NODE), "other": rows.Remote(REMOTE_NODE, NODE),
        }.items():  # fmt: skip
            dp.put("ipcache", prefix(w.cidr(name)), remote)


def context(mark: int = 0) -> bytes:
    """struct __sk_buff for a test run; only the mark and the context's other inputs are taken from it."""
    return struct.pack("=III", 0, 0, mark) + bytes(192 - 12)


def send(dp: Datapath, program: str, packet: Packet | bytes, mark: int = 0) -> tuple[int, bytes, int]:
    """Verdict, packet and mark after one program."""
    done = prog_test_run(dp.programs[program].fd, bytes(packet), context(mark))
    return done.retval, done.data_out, struct.unpack_from("=I", done.ctx_out, 8)[0]


def check(dp: Datapath, record: Record, family: int) -> None:
    """Runs a record. The maps are emptied first."""
    w = Wire(family)
    dp.clear()
    base_rows(dp)
    record.rows(dp, w)
    for program, build in record.before:
        verdict, _, _ = send(dp, program, build(w))
        assert verdict != SHOT, f"{program} dropped an earlier packet: {dp.events()}"
    dp.events()
    drops = dp.metric(DROP[record.drop], 0) + dp.metric(DROP[record.drop], 1) if record.drop else 0
    verdict, out, mark = send(dp, record.program, record.packet(w), record.mark_in)
    seen = dp.events()
    reasons = [name for name, n in DROP.items() if n in {e.reason for e in seen if e.type == EVENT_DROP}]
    assert (verdict, reasons) == (record.verdict, [record.drop] if record.drop else [])
    if record.drop:
        assert dp.metric(DROP[record.drop], 0) + dp.metric(DROP[record.drop], 1) == drops + 1
    if record.gives:
        want = Ether(bytes(record.gives(w)))
        assert Ether(out).show(dump=True) == want.show(dump=True)
        assert out == bytes(want)
    if record.mark is not None:
        assert mark == record.mark
    if record.events is not None:
        assert [(e.type, e.reason) for e in seen] == list(record.events)
    record.then(dp, w)


def cases(records: Sequence[Record]) -> list[tuple[Record, int]]:
    """For pytest.mark.parametrize, in both families."""
    return [(r, family) for r in records for family in r.families]


def case_id(value: object) -> str:
    return f"v{value}" if isinstance(value, int) else str(value)
