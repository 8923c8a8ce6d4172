"""Services for clients outside, at the device: what XDP sends on, what it leaves to tc, and that the two agree."""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
from datapath import POD, REDIRECT, TUNNEL, WORLD, Datapath, addr, prefix
from record import C_IDENTITY, NATIVE, OVERLAY, Build, Prepare, Wire, base_rows, nothing, send, syn, udp
from scapy.layers.inet import IP, TCP, UDP, IPOption
from scapy.layers.inet6 import IPv6ExtHdrDestOpt, IPv6ExtHdrFragment
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Packet, Raw
from test_dsr import header6, option4
from test_nodeport import BOUND, CLIENT, CLUSTER_IP, NODE_PORT, RANGES, SILENT, TCP_PORT, UDP_PORT, nodeport

from fimbria.kernel.bpf import attach_xdp, prog_test_run
from fimbria.model import rows
from lab import Space, checksum

XDP_PASS, XDP_TX = 2, 3
DIRECT_RETURN = 512  # enum frontend_flag
DRIVER = 4  # XDP_FLAGS_DRV_MODE
GATEWAY_MAC, DEVICE_MAC = "02:00:00:00:0e:01", "02:00:00:00:0e:02"


@dataclass
class Uplink:
    """The node's device, whose one neighbour is the gateway."""

    space: Space
    ifindex: int


@pytest.fixture(scope="module")
def uplink() -> Iterator[Uplink]:
    made = Space("xd")
    try:
        made.sysctl(ipv4__ip_forward=1, ipv6__conf__all__forwarding=1, ipv6__conf__default__accept_dad=0)
        made.ip("link add up0 type veth peer name up1")
        made.ip(f"link set up0 address {DEVICE_MAC} up")
        made.ip("link set up1 up")
        for address, gateway, odd in (("192.168.1.2/24", "192.168.1.1", "192.168.1.77"),
                                      ("fd01:1::2/64", "fd01:1::1", "fd01:1::77")):  # fmt: skip
            made.ip(f"addr add {address} dev up0" + (" nodad" if ":" in address else ""))
            made.ip(f"route add default via {gateway}")
            made.ip(f"neigh add {gateway} lladdr {GATEWAY_MAC} dev up0 nud permanent")
            made.ip(f"route add {ELSEWHERE[':' in odd]} dev lo")
        yield Uplink(made, made.ifindex("up0"))
    finally:
        made.close()


ELSEWHERE = ("198.51.100.0/24", "fd98::/64")  # by another device: where `hop` is


@pytest.fixture(scope="module")
def native(uplink: Uplink) -> Iterator[Datapath]:
    dp = Datapath(NATIVE, ("host", "xdp"))
    # A test run takes the device's receive queue, which a veth has while any program is attached.
    link = uplink.space.inside(lambda: attach_xdp(dp.programs["from_device"], uplink.ifindex, DRIVER))
    yield dp
    link.close()
    dp.close()


@pytest.fixture(scope="module")
def overlay(native: Datapath) -> Iterator[Datapath]:
    dp = Datapath(OVERLAY, ("host", "xdp"))
    yield dp
    dp.close()


def came(w: Wire, src: str, dst: str, payload: Packet, ttl: int = 64) -> Packet:
    return frame(w.ip(src, dst, ttl), payload)


def left(w: Wire, src: str, dst: str, payload: Packet, ttl: int = 63) -> Packet:
    return Ether(src=DEVICE_MAC, dst=GATEWAY_MAC) / w.ip(src, dst, ttl) / payload


def run(dp: Datapath, uplink: Uplink, packet: Packet | bytes) -> tuple[int, bytes]:
    """Verdict and packet as if it had come by the uplink."""
    raw = bytes(packet)
    context = struct.pack("=IIIIII", 0, len(raw), 0, uplink.ifindex, 0, 0)
    program = dp.programs["from_device"].fd
    done = uplink.space.inside(lambda: prog_test_run(program, raw, context))
    return done.retval, done.data_out


@dataclass(frozen=True)
class Case:
    """`packet` after `before`, all by XDP. `gives`: sent on like this; otherwise it is left as it is."""

    says: str
    packet: Build
    gives: Build | None = None
    rows: Prepare = nothing
    before: Sequence[Build] = ()
    then: Prepare = nothing
    families: tuple[int, ...] = (4, 6)

    def __str__(self) -> str:
        return self.says.replace(" ", "-")


def cases(found: Sequence[Case]) -> pytest.MarkDecorator:
    flat = [(c, family) for c in found for family in c.families]
    return pytest.mark.parametrize(("case", "family"), flat, ids=lambda v: f"v{v}" if isinstance(v, int) else str(v))


def learned(dp: Datapath) -> set[Any]:
    """Connections and bindings, whatever the time."""
    kept = dp.items("conntrack")
    found: set[Any] = {(k, e.service, e.backend, e.flags, e.frontend, e.frontend_port) for k, e in kept}
    return found | {(k, e.addr, e.port, e.flags, e.service, e.frontend, e.frontend_port) for k, e in dp.items("nat")}


def prepare(dp: Datapath, case: Case, w: Wire) -> None:
    dp.clear()
    base_rows(dp)
    case.rows(dp, w)


def check(dp: Datapath, uplink: Uplink, case: Case, family: int) -> None:
    w = Wire(family)
    prepare(dp, case, w)
    for build in case.before:
        assert run(dp, uplink, build(w))[0] == XDP_TX
    before, packet = learned(dp), bytes(case.packet(w))
    verdict, out = run(dp, uplink, packet)
    if case.gives is None:
        assert (verdict, out) == (XDP_PASS, packet)
        assert learned(dp) == before, "what is left to tc must leave nothing behind"
    else:
        want = Ether(bytes(case.gives(w)))
        assert (verdict, Ether(out).show(dump=True)) == (XDP_TX, want.show(dump=True))
        assert out == bytes(want)
    case.then(dp, w)


def reported(dp: Datapath) -> list[Any]:
    """Events, whatever the time and the device."""
    return [replace(e, time=0, ifindex=0) for e in dp.events()]


def check_like_tc(dp: Datapath, uplink: Uplink, case: Case, family: int) -> None:
    """tc makes the same of it, remembers and reports the same; also when the two take turns."""
    w = Wire(family)
    outcomes = []
    for by_tc in (set(), {0}, {1}, {0, 1}):
        prepare(dp, case, w)
        outs = []
        for at, build in enumerate((*case.before, case.packet)):
            if at in by_tc:
                verdict, out, _ = uplink.space.inside(partial(send, dp, "from_network", build(w)))
                assert verdict == REDIRECT
            else:
                verdict, out = run(dp, uplink, build(w))
                assert verdict == XDP_TX
            outs.append(out[14:])
        outcomes.append((outs, learned(dp), reported(dp)))
    assert outcomes[0][2], "a new connection is reported"
    assert all(o == outcomes[0] for o in outcomes)


def frame(*layers: Packet, dst: str = DEVICE_MAC) -> Packet:
    packet = Ether(src=GATEWAY_MAC, dst=dst)
    for layer in layers:
        packet = packet / layer
    return packet


def data(sport: int, dport: int) -> Packet:
    return TCP(sport=sport, dport=dport, flags="PA", seq=1001, ack=5) / Raw(b"x" * 999)


def with_options(sport: int, dport: int) -> Packet:
    return TCP(sport=sport, dport=dport, flags="S", options=[("MSS", 1460), ("SAckOK", b"")])


def unsummed(sport: int, dport: int) -> Packet:
    return UDP(sport=sport, dport=dport, chksum=0) / Raw(b"data")


def direct(dp: Datapath, w: Wire) -> None:
    """The backend's node is to answer the client itself."""
    nodeport("c", flags=NODE_PORT | DIRECT_RETURN)(dp, w)


def told(w: Wire, payload: Packet, port: int = TCP_PORT, front: str = "node") -> Packet:
    """From the client to pod c, with the frontend as bpf/lib/dsr.h writes it."""
    plain = left(w, "world", "c", payload)
    if w.family == 4:
        ip = w.ip("world", "c", 63, options=[option4(port, w.addr(front))])
        return Ether(src=DEVICE_MAC, dst=GATEWAY_MAC) / ip / payload
    whole = bytes(plain)
    packet = Ether(whole[:54]) / header6(whole[20], port, w.addr(front)) / Raw(whole[54:])
    packet.payload.nh, packet.payload.plen = 60, len(whole) - 54 + 24
    return packet


def filling(w: Wire, more: int, dport: int = UDP_PORT, most: int = 1500) -> Packet:
    """A datagram for which, with what it is told, `most` bytes are enough; or too few by `more`."""
    room = most - (28 + 8 if w.family == 4 else 48 + 24) + more
    return came(w, "world", "node", udp(CLIENT, dport, b"x" * room))


def unfinished(w: Wire, payload: Packet, src: str = "world", dst: str = "node") -> Packet:
    """The checksum as a sender leaves it to his device: addresses, protocol and length are summed up."""
    number = payload.overload_fields[IP]["proto"]
    pseudo = w.packed(src)[-16:] + w.packed(dst)[-16:] + struct.pack(">II", len(payload), number)
    if w.family == 4:
        pseudo = w.packed(src)[12:] + w.packed(dst)[12:] + struct.pack(">BBH", 0, number, len(payload))
    payload.chksum = 0xFFFF - checksum(pseudo)
    return payload


def call(dst: str = "node", sport: int = CLIENT, **kw: int) -> Build:
    return lambda w: came(w, "world", dst, syn(sport, TCP_PORT), **kw)


def ask(dst: str = "node", data: bytes = b"data") -> Build:
    return lambda w: came(w, "world", dst, udp(CLIENT, UDP_PORT, data))


def answer(w: Wire) -> Packet:
    return came(w, "c", "node", syn(8080, BOUND, "SA"))


def other(dp: Datapath, w: Wire) -> None:
    """The other node itself is the backend."""
    nodeport("other")(dp, w)


def with_flags(flags: int, *backends: str) -> Prepare:
    return nodeport(*backends, flags=NODE_PORT | flags)


def out_of_range(dp: Datapath, w: Wire) -> None:
    with_flags(RANGES, "c")(dp, w)


def through_tunnel(dp: Datapath, w: Wire, node: str, flags: int = NODE_PORT) -> None:
    """Pod c is the backend, by the tunnel to `node`."""
    nodeport("c", flags=flags)(dp, w)
    dp.put("ipcache", prefix(w.cidr("c")), rows.Remote(C_IDENTITY, POD | TUNNEL, addr(node)))


def unknown_neighbour(w: Wire) -> str:
    return {4: "192.168.1.99", 6: "fd01:1::99"}[w.family]


def masqueraded(dp: Datapath, w: Wire) -> None:
    """A pod of this node asked the world, and a service happens to have that port."""
    key = rows.NatKey(w.packed("world"), w.packed("node"), 53, BOUND, 17, 0)
    dp.put("nat", key, rows.NatEntry(w.packed("a"), CLIENT, 0, 0, 0))
    dp.service(7, w.addr("node"), BOUND, 17, [(w.addr("c"), 8080)])
    dp.put("frontends", rows.FrontendKey(w.packed("node"), BOUND, 17), rows.Frontend(7, 1, 0))


SENT = [
    Case("a call goes on to the backend as this node's", call(),
         lambda w: left(w, "node", "c", syn(BOUND, 8080)), nodeport("c")),
    Case("UDP likewise", ask(), lambda w: left(w, "node", "c", udp(BOUND, 8080)), nodeport("c")),
    Case("an odd number of bytes", ask(data=b"odd"), lambda w: left(w, "node", "c", udp(BOUND, 8080, b"odd")),
         nodeport("c")),
    Case("no data at all", ask(data=b""), lambda w: left(w, "node", "c", udp(BOUND, 8080, b"")), nodeport("c")),
    Case("UDP without a checksum stays without", lambda w: came(w, "world", "node", unsummed(CLIENT, UDP_PORT)),
         lambda w: left(w, "node", "c", unsummed(BOUND, 8080)), nodeport("c"), families=(4,)),
    Case("an address that no device has", lambda w: came(w, "world", "front", syn(CLIENT, 80)),
         lambda w: left(w, "node", "c", syn(BOUND, 8080)), nodeport("c")),
    Case("another node as the backend", call(), lambda w: left(w, "node", "other", syn(BOUND, 8080)), other),
    Case("what follows goes the same way", lambda w: came(w, "world", "node", data(CLIENT, TCP_PORT)),
         lambda w: left(w, "node", "c", data(BOUND, 8080)), nodeport("c"), before=[call()]),
    Case("the answer comes from the frontend", answer, lambda w: left(w, "node", "world", syn(TCP_PORT, CLIENT, "SA")),
         nodeport("c"), before=[call()]),
    Case("an answer by UDP likewise", lambda w: came(w, "c", "node", udp(8080, BOUND)),
         lambda w: left(w, "node", "world", udp(UDP_PORT, CLIENT)), nodeport("c"), before=[ask()]),
    Case("an answer for an address that no device has", answer,
         lambda w: left(w, "front", "world", syn(80, CLIENT, "SA")), nodeport("c"),
         before=[lambda w: came(w, "world", "front", syn(CLIENT, 80))]),
    Case("TCP options stay", lambda w: came(w, "world", "node", with_options(CLIENT, TCP_PORT)),
         lambda w: left(w, "node", "c", with_options(BOUND, 8080)), nodeport("c")),
]  # fmt: skip
DIRECT = [
    Case("the backend's node is told by the first packet", call(), lambda w: told(w, syn(CLIENT, 8080)), direct),
    Case("what follows only changes its destination", lambda w: came(w, "world", "node", data(CLIENT, TCP_PORT)),
         lambda w: left(w, "world", "c", data(CLIENT, 8080)), direct, before=[call()]),
    Case("it is told by each datagram", ask(), lambda w: told(w, udp(CLIENT, 8080), UDP_PORT), direct, before=[ask()]),
    Case("another frontend's name", lambda w: came(w, "world", "front", syn(CLIENT, 80)),
         lambda w: told(w, syn(CLIENT, 8080), 80, "front"), direct),
    Case("a datagram that just fits", lambda w: filling(w, 0), lambda w: told(w, filling(w, 0, 8080).payload.payload,
         UDP_PORT), direct),
]  # fmt: skip
LEFT = [
    Case("a service's pod of this node", call(), rows=nodeport("a")),
    Case("this node as the backend", call(), rows=nodeport("node")),
    Case("no backends", call(), rows=nodeport()),
    Case("no backends, silently", call(), rows=nodeport(flags=NODE_PORT | SILENT)),
    Case("a client that the ranges don't admit", call(), rows=out_of_range),
    Case("a cluster IP", call(), rows=nodeport("c", flags=NODE_PORT | CLUSTER_IP)),
    Case("no service's", lambda w: came(w, "world", "node", syn(CLIENT, 22)), rows=nodeport("c")),
    Case("for a pod", lambda w: came(w, "world", "a", syn(CLIENT, TCP_PORT)), rows=nodeport("c")),
    Case("a call in the name of this node", lambda w: came(w, "node", "node", syn(CLIENT, TCP_PORT)),
         rows=nodeport("c")),
    Case("a call in the name of a pod of this node", lambda w: came(w, "a", "node", syn(CLIENT, TCP_PORT)),
         rows=nodeport("c")),
    Case("a call whose time is up", call(ttl=1), rows=nodeport("c")),
    Case("an answer whose time is up", lambda w: came(w, "c", "node", syn(8080, BOUND, "SA"), 1), rows=nodeport("c"),
         before=[call()]),
    Case("a backend whose neighbour isn't known", call(),
         rows=lambda dp, w: nodeport(unknown_neighbour(w))(dp, w)),
    Case("a backend behind another device", call(), rows=nodeport("hop")),
    Case("an answer to nobody", answer, rows=nodeport("c")),
    Case("an answer from another port", lambda w: came(w, "c", "node", syn(8081, BOUND, "SA")), rows=nodeport("c"),
         before=[call()]),
    Case("an answer to a pod's masqueraded packet", lambda w: came(w, "world", "node", udp(53, BOUND)),
         rows=masqueraded),
    Case("more than the way takes", lambda w: came(w, "world", "node", udp(CLIENT, UDP_PORT, b"x" * 1500)),
         rows=nodeport("c")),
    Case("what the backend's node is told makes it too large", lambda w: filling(w, 1), rows=direct),
    Case("TCP whose checksum is left to a device", lambda w: came(w, "world", "node", unfinished(w, data(
         CLIENT, TCP_PORT))), rows=nodeport("c")),
    Case("UDP whose checksum is left to a device", lambda w: came(w, "world", "node", unfinished(w, udp(
         CLIENT, UDP_PORT, b"odd"))), rows=nodeport("c")),
    Case("an answer whose checksum is left to a device", lambda w: came(w, "c", "node", unfinished(w, syn(
         8080, BOUND, "SA"), "c")), rows=nodeport("c"), before=[call()]),
    Case("an echo", lambda w: came(w, "world", "node", w.echo()), rows=nodeport("c")),
    Case("an error", lambda w: came(w, "c", "node", w.unreachable(w.ip("node", "c") / syn(BOUND, 8080))),
         rows=nodeport("c"), before=[call()]),
    Case("SCTP", lambda w: sctp(w), rows=nodeport("c")),
    Case("IPv4 options", lambda w: frame(w.ip("world", "node", options=[IPOption(b"\x94\x04\x00\x00")]),
         syn(CLIENT, TCP_PORT)), rows=nodeport("c"), families=(4,)),
    Case("a first fragment", lambda w: frame(w.ip("world", "node", flags="MF"), udp(CLIENT, UDP_PORT)),
         rows=nodeport("c"), families=(4,)),
    Case("a later fragment", lambda w: frame(w.ip("world", "node", frag=5), udp(CLIENT, UDP_PORT)),
         rows=nodeport("c"), families=(4,)),
    Case("an IPv6 fragment", lambda w: came(w, "world", "node", IPv6ExtHdrFragment(nh=17, m=1) / udp(CLIENT, UDP_PORT)),
         rows=nodeport("c"), families=(6,)),
    Case("an extension header", lambda w: came(w, "world", "node", IPv6ExtHdrDestOpt() / udp(CLIENT, UDP_PORT)),
         rows=nodeport("c"), families=(6,)),
    Case("a mapped address", lambda w: came(w, "::ffff:203.0.113.9", "node", udp(CLIENT, UDP_PORT)),
         rows=nodeport("c"), families=(6,)),
    Case("a frame for everybody", lambda w: frame(w.ip("world", "node"), udp(CLIENT, UDP_PORT),
         dst="ff:ff:ff:ff:ff:ff"), rows=nodeport("c")),
    Case("a VLAN's frame", lambda w: frame(Dot1Q(vlan=5), w.ip("world", "node"), udp(CLIENT, UDP_PORT)),
         rows=nodeport("c")),
    Case("ARP", lambda w: frame(ARP()), rows=nodeport("c"), families=(4,)),
    Case("an IP header that says more than there is", lambda w: longer(w), rows=nodeport("c")),
    Case("a TCP header that says less than there must be", lambda w: came(w, "world", "node", TCP(sport=CLIENT,
         dport=TCP_PORT, dataofs=4)), rows=nodeport("c")),
]  # fmt: skip
TUNNELLED = [
    Case("more than the tunnel takes is left", ask(data=b"x" * 1440), rows=nodeport("c")),
    Case("what the backend's node is told makes it too large", lambda w: filling(w, 1, most=1450), rows=direct),
    Case("an unknown neighbour on the tunnel's way is left", call(),
         rows=lambda dp, w: through_tunnel(dp, w, unknown_neighbour(w))),
    Case("the tunnel's own packets are left", lambda w: came(w, "other", "node", udp(5555, 8472)),
         rows=nodeport("c")),
    Case("a pod's packet outside its tunnel is left", lambda w: came(w, "c", "node", syn(CLIENT, TCP_PORT)),
         rows=other),
    Case("a node as the backend isn't behind it", call(), lambda w: left(w, "node", "other", syn(BOUND, 8080)), other),
]  # fmt: skip


def sctp(w: Wire) -> Packet:
    packet = came(w, "world", "node", Raw(struct.pack(">HH", CLIENT, TCP_PORT) + bytes(24)))
    if w.family == 4:
        packet.payload.proto = 132
    else:
        packet.payload.nh = 132
    return packet


def longer(w: Wire) -> Packet:
    packet = came(w, "world", "node", udp(CLIENT, UDP_PORT))
    if w.family == 4:
        packet.payload.len = 200
    else:
        packet.payload.plen = 200
    return packet


@cases(SENT)
def test_sent_on(native: Datapath, uplink: Uplink, case: Case, family: int) -> None:
    check(native, uplink, case, family)


@cases(DIRECT)
def test_direct_return(native: Datapath, uplink: Uplink, case: Case, family: int) -> None:
    check(native, uplink, case, family)


@cases([*SENT, *DIRECT])
def test_as_tc_does_it(native: Datapath, uplink: Uplink, case: Case, family: int) -> None:
    check_like_tc(native, uplink, case, family)


@cases(LEFT)
def test_left_to_tc(native: Datapath, uplink: Uplink, case: Case, family: int) -> None:
    check(native, uplink, case, family)


@cases(TUNNELLED)
def test_with_an_overlay(overlay: Datapath, uplink: Uplink, case: Case, family: int) -> None:
    check(overlay, uplink, case, family)


OUTER = {4: 50, 6: 70}


def opened(raw: bytes, underlay: int) -> bytes:
    """The frame in a tunnel's packet, whose headers must be right."""
    w, outer = Wire(underlay), Ether(raw[: OUTER[underlay]])
    assert (outer.src, outer.dst) == (DEVICE_MAC, GATEWAY_MAC)
    ip, datagram, vxlan = outer.payload, outer[UDP], raw[OUTER[underlay] - 8 : OUTER[underlay]]
    assert (ip.src, ip.dst) == (w.addr("node"), w.addr("other"))
    if underlay == 4:
        plain = ip.copy()
        del plain.chksum
        assert (ip.len, ip.ttl, ip.proto, ip.ihl, ip.flags) == (len(raw) - 14, 64, 17, 5, 0)
        assert IP(bytes(plain)).chksum == ip.chksum
    else:
        assert (ip.plen, ip.hlim, ip.nh, ip.fl) == (len(raw) - 54, 64, 17, 0)
    assert (datagram.dport, datagram.chksum, datagram.len) == (8472, 0, len(raw) - OUTER[underlay] + 16)
    assert datagram.sport >= 49152 and vxlan == struct.pack(">II", 0x08000000, WORLD << 8)
    return raw[OUTER[underlay] :]


def largest(w: Wire) -> bytes:
    return bytes(1500 - OUTER[6] - (28 if w.family == 4 else 48))


TUNNEL_CASES = [
    Case("a call", call(), lambda w: left(w, "router", "c", syn(BOUND, 8080))),
    Case("UDP", ask(), lambda w: left(w, "router", "c", udp(BOUND, 8080))),
    Case("as much as every tunnel takes", lambda w: ask(data=largest(w))(w),
         lambda w: left(w, "router", "c", udp(BOUND, 8080, largest(w)))),
    Case("what follows", lambda w: came(w, "world", "node", data(CLIENT, TCP_PORT)),
         lambda w: left(w, "router", "c", data(BOUND, 8080)), before=[call()]),
]  # fmt: skip
TOLD_CASES = [
    Case("a call with direct return", call(), lambda w: told(w, syn(CLIENT, 8080))),
    Case("a datagram with direct return", ask(), lambda w: told(w, udp(CLIENT, 8080), UDP_PORT)),
]


@pytest.mark.parametrize("underlay", [4, 6])
@cases([*TUNNEL_CASES, *TOLD_CASES])
def test_into_the_tunnel(overlay: Datapath, uplink: Uplink, case: Case, family: int, underlay: int) -> None:
    """And tc puts the same into it, remembers and reports the same."""
    w = Wire(family)
    flags = NODE_PORT | (DIRECT_RETURN if case in TOLD_CASES else 0)
    outcomes = []
    for by_tc in (False, True):
        prepare(overlay, case, w)
        through_tunnel(overlay, w, Wire(underlay).addr("other"), flags)
        for build in (*case.before, case.packet):
            if by_tc:
                verdict, out, _ = uplink.space.inside(partial(send, overlay, "from_network", build(w)))
                assert verdict == REDIRECT
            else:
                verdict, raw = run(overlay, uplink, build(w))
                assert verdict == XDP_TX
                out = opened(raw, underlay)
        assert case.gives and out[14:] == bytes(case.gives(w))[14:]
        outcomes.append((learned(overlay), reported(overlay)))
    assert outcomes[0] == outcomes[1]


def tunnelled(inner: Packet, underlay: int = 4, vni: int = C_IDENTITY, src: str = "other", **fields: int) -> Packet:
    """As a node sends it. `fields` are those of the outer headers."""
    ip = Wire(underlay).ip(src, "node")
    ecn = fields.pop("ecn", 0)
    setattr(ip, "tos" if underlay == 4 else "tc", ecn)
    vxlan = struct.pack(">II", fields.pop("flags", 0x08000000), vni << 8)
    payload = Raw(vxlan + bytes(Ether(src="02:00:00:00:0c:01", dst="02:00:00:00:0c:02") / inner))
    return frame(ip, UDP(sport=55555, dport=8472, chksum=fields.pop("chksum", 0)) / payload)


def reply(w: Wire, ttl: int = 62, port: int = 8080, to: str = "router") -> Packet:
    return w.ip("c", to, ttl) / syn(port, BOUND, "SA")


FROM_TUNNEL = [
    Case("an answer by the tunnel", lambda w: tunnelled(reply(w)), lambda w: left(w, "node", "world", syn(
         TCP_PORT, CLIENT, "SA"), 61), nodeport("c"), before=[call()]),
    Case("by another kind of tunnel", lambda w: tunnelled(reply(w), 6), lambda w: left(w, "node", "world", syn(
         TCP_PORT, CLIENT, "SA"), 61), nodeport("c"), before=[call()]),
    Case("of a datagram", lambda w: tunnelled(w.ip("c", "router", 62) / udp(8080, BOUND, b"")),
         lambda w: left(w, "node", "world", udp(UDP_PORT, CLIENT, b""), 61), nodeport("c"), before=[ask()]),
    Case("nobody asked", lambda w: tunnelled(reply(w)), rows=nodeport("c")),
    Case("another port answers", lambda w: tunnelled(reply(w, port=8081)), rows=nodeport("c"), before=[call()]),
    Case("an answer to a pod", lambda w: tunnelled(reply(w, to="a")), rows=nodeport("c"), before=[call()]),
    Case("an answer to the node", lambda w: tunnelled(reply(w, to="node")), rows=nodeport("c"), before=[call()]),
    Case("its time is up", lambda w: tunnelled(reply(w, ttl=1)), rows=nodeport("c"), before=[call()]),
    Case("the sender isn't a node", lambda w: tunnelled(reply(w), src="world"), rows=nodeport("c"), before=[call()]),
    Case("the sender is this node", lambda w: tunnelled(reply(w), src="node"), rows=nodeport("c"), before=[call()]),
    Case("it claims to be a node's own", lambda w: tunnelled(reply(w), vni=1), rows=nodeport("c"), before=[call()]),
    Case("no identity", lambda w: tunnelled(reply(w), vni=0), rows=nodeport("c"), before=[call()]),
    Case("no VNI", lambda w: tunnelled(reply(w), flags=0), rows=nodeport("c"), before=[call()]),
    Case("congestion was met", lambda w: tunnelled(reply(w), ecn=3), rows=nodeport("c"), before=[call()]),
    Case("the tunnel's packet is summed up", lambda w: tunnelled(reply(w), chksum=77), rows=nodeport("c"),
         before=[call()]),
    Case("its checksum is left to a device", lambda w: tunnelled(w.ip("c", "router", 62) / unfinished(w, syn(
         8080, BOUND, "SA"), "c", "router")), rows=nodeport("c"), before=[call()]),
    Case("ARP in the tunnel", lambda w: tunnelled(ARP()), rows=nodeport("c"), before=[call()]),
]  # fmt: skip


@cases(FROM_TUNNEL)
def test_out_of_the_tunnel(overlay: Datapath, uplink: Uplink, case: Case, family: int) -> None:
    check(overlay, uplink, case, family)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("underlay", [4, 6])
def test_cut_frames_in_the_tunnel(overlay: Datapath, uplink: Uplink, family: int, underlay: int) -> None:
    w = Wire(family)
    prepare(overlay, Case("", call(), rows=nodeport("c")), w)
    assert run(overlay, uplink, call()(w))[0] == XDP_TX
    inner = bytes(Ether(src=GATEWAY_MAC, dst=DEVICE_MAC) / reply(w))
    for length in range(0, len(inner), 3):
        outer = Wire(underlay).ip("other", "node") / UDP(sport=5, dport=8472, chksum=0)
        packet = bytes(frame(outer / Raw(struct.pack(">II", 0x08000000, C_IDENTITY << 8) + inner[:length])))
        assert run(overlay, uplink, packet) == (XDP_PASS, packet)


@pytest.mark.parametrize(("inner", "outer"), [(0, 0), (1, 1), (2, 2), (3, 2)])
@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("underlay", [4, 6])
def test_congestion_is_seen_outside(
    overlay: Datapath, uplink: Uplink, family: int, underlay: int, inner: int, outer: int
) -> None:
    w = Wire(family)
    prepare(overlay, Case("", call()), w)
    through_tunnel(overlay, w, Wire(underlay).addr("other"))
    packet = call()(w)
    setattr(packet.payload, "tos" if family == 4 else "tc", 0xB8 | inner)
    raw = run(overlay, uplink, packet)[1]
    ip, kept = Ether(raw).payload, Ether(raw[OUTER[underlay] :]).payload
    assert (ip.tos if underlay == 4 else ip.tc) == outer
    assert (kept.tos if family == 4 else kept.tc) == 0xB8 | inner


@pytest.mark.parametrize("family", [4, 6])
def test_a_padded_frame_stays_padded(native: Datapath, uplink: Uplink, family: int) -> None:
    w = Wire(family)
    prepare(native, Case("", call(), rows=nodeport("c")), w)
    verdict, out = run(native, uplink, bytes(ask(data=b"x")(w)) + b"\xa5" * 20)
    assert (verdict, out) == (XDP_TX, bytes(left(w, "node", "c", udp(BOUND, 8080, b"x"))) + b"\xa5" * 20)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("length", range(14, 75, 4))
def test_a_cut_frame_is_left(native: Datapath, uplink: Uplink, family: int, length: int) -> None:
    w = Wire(family)
    prepare(native, Case("", call(), rows=nodeport("c")), w)
    whole = bytes(call()(w))
    if length < len(whole):
        assert run(native, uplink, whole[:length]) == (XDP_PASS, whole[:length])


@pytest.mark.parametrize("family", [4, 6])
def test_metrics(native: Datapath, uplink: Uplink, family: int) -> None:
    w = Wire(family)
    prepare(native, Case("", call(), rows=nodeport("c")), w)
    before = native.metric(0, 0)
    run(native, uplink, call()(w))
    assert native.metric(0, 0) == before + 1


@pytest.mark.parametrize("family", [4, 6])
def test_what_only_another_version_knows(native: Datapath, uplink: Uplink, family: int) -> None:
    """Its programs run at other devices, with tables of their own: the service's choice and the binding are found."""
    w = Wire(family)
    former = Datapath(NATIVE, ("host", "xdp"), {"conntrack": 1024, "nat": 512}, beside=native)
    try:
        native.clear()
        base_rows(native)
        nodeport("c")(native, w)
        assert run(former, uplink, call()(w))[0] == XDP_TX
        native.put("backends", 750, rows.Backend(w.packed("other"), 8080, 6))
        native.put("service_slots", rows.SlotKey(7, 0), 750)
        assert run(native, uplink, answer(w)) == (XDP_PASS, bytes(answer(w))), "an answer to nobody"
        native.look_into(former, native)
        assert run(native, uplink, answer(w)) == (XDP_TX, bytes(left(w, "node", "world", syn(TCP_PORT, CLIENT, "SA"))))
        more = run(native, uplink, came(w, "world", "node", data(CLIENT, TCP_PORT)))
        assert more == (XDP_TX, bytes(left(w, "node", "c", data(BOUND, 8080))))
        assert learned(native) == learned(former)
    finally:
        native.look_into()
        former.close()
