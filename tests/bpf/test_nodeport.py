"""Services for clients outside the node: to every kind of backend and back, errors and refusals included."""

import contextlib
import struct
import time
from collections.abc import Callable, Iterator

import pytest
from datapath import (
    ENFORCE_INGRESS,
    INGRESS,
    LAYOUT,
    REDIRECT,
    SHOT,
    TCX_NEXT,
    WORLD,
    Datapath,
    Setting,
    addr,
)  # fmt: skip
from record import (
    A_IDENTITY,
    OVERLAY,
    Build,
    Prepare,
    Record,
    Wire,
    case_id,
    cases,
    check,
    send,
    syn,
    udp,
)  # fmt: skip
from scapy.layers.inet import TCP as TcpHeader
from scapy.layers.inet import UDP as UdpHeader
from scapy.layers.inet6 import IPv6ExtHdrFragment
from scapy.packet import Packet, Raw
from test_policy import enforce, rule
from test_sctp import sctp

from fimbria.kernel.codec import Codec
from fimbria.model import rows
from lab import Space

TCP, UDP, SCTP = 6, 17, 132
TCP_PORT, UDP_PORT = 30080, 30053
NODE_PORT, CLUSTER_IP, RANGES, DENY, DIRECT, SILENT, ADDRESS = 2, 1, 32, 64, 512, 1024, 4096
ANSWER, TUNNEL_KEY, REPLY = 0xF4, 0xF2, 0xF5
CLIENT = 40000
BOUND = 61000 + CLIENT % 1000  # the port that a binding tries first
SERVICE_SCOPE, NODE_SCOPE = 1, 3


@pytest.fixture(scope="module")
def space() -> Iterator[Space]:
    """Routes for what leaves the node. Test runs take place on its loopback device."""
    made = Space("np")
    try:
        made.sysctl(ipv4__ip_forward=1, ipv6__conf__all__forwarding=1, ipv6__conf__default__accept_dad=0)
        made.ip("link add up0 type veth peer name up1")
        for device in ("up0", "up1"):
            made.ip(f"link set {device} up")
        for address, gateway in (("192.168.1.2/24", "192.168.1.1"), ("fd01:1::2/64", "fd01:1::1")):
            made.ip(f"addr add {address} dev up0" + (" nodad" if ":" in address else ""))
            made.ip(f"route add default via {gateway}")
        for unreachable in ("10.99.0.0/16", "fd99:1::/64"):
            made.ip(f"route add unreachable {unreachable}")
        yield made
    finally:
        made.close()


def nodeport(*backends: str, flags: int = NODE_PORT, port: int = 8080) -> Prepare:
    """Node port 30080 for TCP and SCTP, 30053 for UDP; `front` 80 and 53 lead to the same `port` of the backends."""

    def prepare(dp: Datapath, w: Wire) -> None:
        every = addr("0.0.0.0" if w.family == 4 else "::")
        for number, proto, front, outside in ((7, TCP, 80, TCP_PORT), (8, UDP, 53, UDP_PORT), (9, SCTP, 80, TCP_PORT)):
            dp.service(number, w.addr("front"), front, proto, [(w.addr(b), port) for b in backends])
            row = rows.Frontend(number, len(backends), flags)
            dp.put("frontends", rows.FrontendKey(every, outside, proto), row)
            dp.put("frontends", rows.FrontendKey(w.packed("front"), front, proto), row)

    return prepare


def call(dst: str = "node", payload: Packet | None = None, src: str = "world", ttl: int = 64) -> Build:
    return lambda w: w.routed(src, dst, syn(CLIENT, TCP_PORT) if payload is None else payload, ttl=ttl)


def ask(dst: str = "node", sport: int = CLIENT, dport: int = UDP_PORT) -> Build:
    return lambda w: w.routed("world", dst, udp(sport, dport))


def ranges(name: str, flags: int) -> Prepare:
    """The service's source ranges are this one address."""

    def prepare(dp: Datapath, w: Wire) -> None:
        nodeport("a", flags=NODE_PORT | RANGES | flags)(dp, w)
        row = rows.SourceKey(32 + 128, 7, w.packed(name))
        dp.maps["source_ranges"].update(SOURCE_KEY.encode(row), (1).to_bytes(4, "little"))

    return prepare


def both(*prepares: Prepare) -> Prepare:
    def prepare(dp: Datapath, w: Wire) -> None:
        for step in prepares:
            step(dp, w)

    return prepare


def owned(dp: Datapath, w: Wire) -> None:
    """`front` belongs to services, whatever the port."""
    nodeport("a")(dp, w)
    dp.put("frontends", rows.FrontendKey(w.packed("front"), 0, 0), rows.Frontend(0, 0, ADDRESS))


def lost(dp: Datapath, w: Wire) -> None:
    """Connections were sent to a, whose row is gone; b has come."""
    nodeport("a")(dp, w)
    for _, build in (CALL, ASK):
        send(dp, "from_network", build(w))
    nodeport("b")(dp, w)
    for number in (7, 8):
        assert dp.maps["backends"].delete((number * 100).to_bytes(4, "little"))
        dp.put("backends", number * 100 + 50, rows.Backend(w.packed("b"), 8080, TCP if number == 7 else UDP))
        dp.put("service_slots", rows.SlotKey(number, 0), number * 100 + 50)


def moved(dp: Datapath, w: Wire) -> None:
    """A connection was sent to a; now new ones go to b."""
    nodeport("a")(dp, w)
    send(dp, "from_network", CALL[1](w))
    dp.put("backends", 750, rows.Backend(w.packed("b"), 8080, TCP))
    dp.put("service_slots", rows.SlotKey(7, 0), 750)


def with_proto(packet: Packet, number: int = SCTP) -> Packet:
    setattr(packet.payload, "proto" if packet.payload.version == 4 else "nh", number)
    return packet


def fragment(w: Wire, packet: Packet, offset: int, data: bytes) -> Packet:
    """A part of the datagram 7 with the network header of `packet`; the first one has `offset` 0."""
    ip = packet.payload
    ip.remove_payload()
    if w.family == 4:
        ip.frag, ip.flags, ip.proto = offset // 8, 0 if offset else "MF", UDP
        return packet / Raw(data)
    return packet / IPv6ExtHdrFragment(nh=UDP, offset=offset // 8, m=int(not offset), id=7) / Raw(data)


SOURCE_KEY = Codec(LAYOUT, "struct source_key", rows.SourceKey)


def patched(checksum: int, old: bytes, new: bytes) -> bytes:
    """RFC 1624, equation 3."""
    total = ~checksum & 0xFFFF
    for data, sign in ((old, 0xFFFF), (new, 0)):
        total += sum(int.from_bytes(data[i : i + 2], "big") ^ sign for i in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return (~total & 0xFFFF).to_bytes(2, "big")


DATAGRAM = bytes(UdpHeader(sport=CLIENT, dport=UDP_PORT, len=48, chksum=0x1234) / Raw(b"x" * 16))


def part(offset: int) -> Build:
    return lambda w: fragment(w, w.routed("world", "node", Raw()), offset, b"y" * 16 if offset else DATAGRAM)


def fragmented(w: Wire, offset: int) -> Packet:
    """`part` as the pod gets it: of UDP's header the port has changed, and the checksum by what it covers."""
    start, port = bytearray(DATAGRAM), (8080).to_bytes(2, "big")
    before, after = (w.packed(name)[12 if w.family == 4 else 0 :] for name in ("node", "a"))
    start[6:8] = patched(0x1234, before + DATAGRAM[2:4], after + port)
    start[2:4] = port
    return fragment(w, w.delivered("a", "world", Raw()), offset, b"y" * 16 if offset else bytes(start))


def by_stack(w: Wire, src: str, dst: str, payload: Packet) -> Packet:
    """Our own answer, made of the packet that it answers."""
    packet = w.routed(src, dst, payload)
    if w.family == 4:
        packet.payload.id = 0
    return packet


def head(packet: Packet, w: Wire) -> Raw:
    """What an error of ours quotes."""
    return Raw(bytes(packet.payload)[: 28 if w.family == 4 else 48])


CALL = ("from_network", call())
ASK = ("from_network", ask())
OTHER_CALL = ("from_network", call("front", syn(CLIENT, 80)))
OTHER_ASK = ("from_network", ask("front", dport=53))


def names_frontend(dp: Datapath, w: Wire) -> None:
    (found,) = (e for k, e in dp.items("conntrack") if k.local == w.packed("a") and k.scope == 0)
    assert (found.service, found.frontend, found.frontend_port) == (7, w.packed("node"), TCP_PORT)
    (chosen,) = ((k, e) for k, e in dp.items("conntrack") if k.scope == SERVICE_SCOPE)
    assert (chosen[0].local, chosen[0].remote, chosen[1].endpoint) == (w.packed("world"), w.packed("node"), 0)
    assert not dp.items("nat")


def two_connections(dp: Datapath, w: Wire) -> None:
    fronts = {k.remote_port: e.frontend_port for k, e in dp.items("conntrack") if k.local == w.packed("a")}
    assert fronts == {CLIENT: TCP_PORT, BOUND: 80}


def forgotten(dp: Datapath, w: Wire) -> None:
    nodeport("a")(dp, w)
    for program, build in (CALL, OTHER_CALL):
        send(dp, program, build(w))
    keys = [k for k, _ in dp.items("nat") if k.direction == INGRESS]
    assert len(keys) == 1
    assert dp.maps["nat"].delete(dp.key("nat", keys[0]))


def from_a(payload: Packet, ttl: int = 64) -> Build:
    return lambda w: w.sent("world", payload, ttl=ttl)


def as_front(payload: Packet, src: str = "node") -> Build:
    """What a sent, with the frontend as its source, on its way out."""
    return lambda w: w.sent("world", payload, src=src, ttl=63)


def records_of(prepare: Prepare) -> Callable[..., Record]:
    """Makes records of from_network with these rows, unless a record says otherwise."""
    return lambda says, packet, verdict, **kw: Record(says, packet, verdict, **{"program": "from_network",
                                                      "rows": prepare, **kw})  # fmt: skip


local = records_of(nodeport("a"))
LOCAL = [
    local("a call goes to the pod, the client kept", CALL[1], REDIRECT,
           gives=lambda w: w.delivered("a", "world", syn(CLIENT, 8080)), then=names_frontend),
    local("UDP likewise", ASK[1], REDIRECT, gives=lambda w: w.delivered("a", "world", udp(CLIENT, 8080))),
    local("an address that no device has, too", OTHER_CALL[1], REDIRECT,
           gives=lambda w: w.delivered("a", "world", syn(CLIENT, 8080))),
    local("SCTP with another port", lambda w: with_proto(w.routed("world", "node", Raw(sctp(CLIENT, TCP_PORT,
           bytes(12))))), REDIRECT, gives=lambda w: with_proto(w.delivered("a", "world", Raw(sctp(CLIENT, 8080,
           bytes(12)))))),
    local("the pod answers as the frontend", from_a(syn(8080, CLIENT, "SA")), REDIRECT, program="from_pod",
           before=[CALL], mark=ANSWER, gives=as_front(syn(TCP_PORT, CLIENT, "SA"))),
    local("by UDP likewise", from_a(udp(8080, CLIENT)), REDIRECT, program="from_pod", before=[ASK],
           gives=as_front(udp(UDP_PORT, CLIENT))),
    local("and of the address that was called", from_a(syn(8080, CLIENT, "SA")), REDIRECT, program="from_pod",
           before=[OTHER_CALL], gives=as_front(syn(80, CLIENT, "SA"), "front")),
    local("what is finished passes the device", lambda w: w.routed("node", "world", syn(TCP_PORT, CLIENT, "SA")),
           TCX_NEXT, program="to_network", before=[CALL], mark_in=ANSWER,
           gives=lambda w: w.routed("node", "world", syn(TCP_PORT, CLIENT, "SA"))),
    local("an answer whose time is up is the stack's, as it is", from_a(syn(8080, CLIENT, "SA"), 1), TCX_NEXT,
           program="from_pod", before=[CALL], mark=A_IDENTITY << 8 | REPLY, gives=from_a(syn(8080, CLIENT, "SA"), 1)),
    local("and gets its address when it comes out of it", lambda w: w.routed("a", "world", syn(8080, CLIENT, "SA")),
           TCX_NEXT, program="to_network", before=[CALL], mark_in=A_IDENTITY << 8 | REPLY,
           gives=lambda w: w.routed("node", "world", syn(TCP_PORT, CLIENT, "SA"))),
    local("the pod's error comes from the frontend", lambda w: w.sent("world", w.unreachable(w.ip("world", "a") /
           udp(CLIENT, 8080))), REDIRECT, program="from_pod", before=[ASK],
           gives=lambda w: w.sent("world", w.unreachable(w.ip("world", "node") / udp(CLIENT, UDP_PORT)), src="node",
           ttl=63)),
    local("the stack's error about what it couldn't deliver, too", lambda w: w.routed("node", "world", w.too_big(
           w.ip("world", "a") / udp(CLIENT, 8080))), TCX_NEXT, program="to_network", before=[ASK],
           gives=lambda w: w.routed("node", "world", w.too_big(w.ip("world", "node") / udp(CLIENT, UDP_PORT)))),
    local("an error about an answer goes to the pod", lambda w: w.routed("hop", "node", w.time_exceeded(
           w.ip("node", "world", 1) / syn(TCP_PORT, CLIENT, "SA"))), REDIRECT,
           before=[CALL, ("from_pod", from_a(syn(8080, CLIENT, "SA")))], gives=lambda w: w.delivered("a", "hop",
           w.time_exceeded(w.ip("a", "world", 1) / syn(8080, CLIENT, "SA")))),
    local("an error about nothing of ours is the node's", lambda w: w.routed("hop", "node", w.time_exceeded(
           w.ip("node", "world", 1) / syn(TCP_PORT, 1234, "SA"))), TCX_NEXT, before=[CALL],
           gives=lambda w: w.routed("hop", "node", w.time_exceeded(w.ip("node", "world", 1) /
           syn(TCP_PORT, 1234, "SA")))),
    local("policy sees the client", CALL[1], SHOT, rows=both(nodeport("a"), enforce(a=ENFORCE_INGRESS)),
           drop="DROP_POLICY_DENIED"),
    local("and the backend's port", CALL[1], REDIRECT, rows=both(nodeport("a"), enforce(rule(WORLD, INGRESS, proto=TCP,
           port=8080), a=ENFORCE_INGRESS))),
    local("a connection keeps its backend", call(payload=syn(CLIENT, TCP_PORT, "A")), REDIRECT, rows=moved,
           gives=lambda w: w.delivered("a", "world", syn(CLIENT, 8080, "A"))),
    local("a new one after its end chooses anew", CALL[1], REDIRECT, rows=moved,
           before=[("from_network", call(payload=syn(CLIENT, TCP_PORT, "FA")))],
           gives=lambda w: w.delivered("b", "world", syn(CLIENT, 8080))),
    local("data of a connection that has lost its backend is reset", call(payload=syn(CLIENT, TCP_PORT, "A")), REDIRECT,
           rows=lost, drop="DROP_SERVICE_NO_BACKEND", gives=lambda w: by_stack(w, "node", "world", TcpHeader(
           sport=TCP_PORT, dport=CLIENT, flags="R", seq=0, window=0))),
    local("a datagram goes to another", ASK[1], REDIRECT, rows=lost,
           gives=lambda w: w.delivered("b", "world", udp(CLIENT, 8080))),
    local("a first fragment", part(0), REDIRECT, gives=lambda w: fragmented(w, 0)),
    local("the fragments after it have no ports", part(24), REDIRECT, before=[("from_network", part(0))],
           gives=lambda w: fragmented(w, 24)),
    local("a fragment without its first isn't known", part(24), TCX_NEXT, gives=lambda w: part(24)(w)),
    local("a packet whose time is up is answered", call(ttl=1), REDIRECT, drop="DROP_TTL_EXCEEDED", mark=ANSWER,
           gives=lambda w: by_stack(w, "node", "world", w.time_exceeded(head(call(ttl=1)(w), w)))),
    local("a port that is no service's is the node's", call(payload=syn(CLIENT, 30081)), TCX_NEXT,
           gives=call(payload=syn(CLIENT, 30081))),
    local("another node's port is left to it", call("other"), TCX_NEXT, gives=call("other")),
    local("an echo to a service's address is no service's", lambda w: w.routed("world", "front", w.echo()), TCX_NEXT,
           gives=lambda w: w.routed("world", "front", w.echo())),
    local("cluster IPs aren't for the outside", OTHER_CALL[1], TCX_NEXT, rows=nodeport("a", flags=CLUSTER_IP),
           gives=OTHER_CALL[1]),
    local("nobody outside is a pod of ours", call(src="b"), SHOT, drop="DROP_INVALID_SOURCE_IP"),
    local("nor this node", call("front", syn(CLIENT, 80), "node"), SHOT, drop="DROP_INVALID_SOURCE_IP"),
    local("a pod of another node comes by its tunnel", call(src="c"), SHOT, drop="DROP_INVALID_SOURCE_IP"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "family"), cases(LOCAL), ids=case_id)
def test_local_backend(dp: Datapath, space: Space, record: Record, family: int) -> None:
    space.inside(lambda: check(dp, record, family))


SPOKEN = (CALL, ("from_pod", from_a(syn(8080, CLIENT, "SA"))))
COLLISIONS = [
    local("another frontend's connection gets another port", OTHER_CALL[1], REDIRECT, before=[CALL],
          gives=lambda w: w.delivered("a", "world", syn(BOUND, 8080)), then=two_connections),
    local("its next packet the same", call("front", syn(CLIENT, 80, "A")), REDIRECT, before=[CALL, OTHER_CALL],
          gives=lambda w: w.delivered("a", "world", syn(BOUND, 8080, "A"))),
    local("the first keeps its own", call(payload=syn(CLIENT, TCP_PORT, "A")), REDIRECT, before=[CALL, OTHER_CALL],
          gives=lambda w: w.delivered("a", "world", syn(CLIENT, 8080, "A"))),
    local("the second's answer goes to the client's port", from_a(syn(8080, BOUND, "SA")), REDIRECT,
          program="from_pod", before=[CALL, OTHER_CALL], gives=as_front(syn(80, CLIENT, "SA"), "front")),
    local("the first's too", from_a(syn(8080, CLIENT, "SA")), REDIRECT, program="from_pod", before=[CALL, OTHER_CALL],
          gives=as_front(syn(TCP_PORT, CLIENT, "SA"))),
    local("by the stack, too", lambda w: w.routed("a", "world", syn(8080, BOUND, "SA")), TCX_NEXT,
          program="to_network", before=[CALL, OTHER_CALL], mark_in=A_IDENTITY << 8 | REPLY,
          gives=lambda w: w.routed("front", "world", syn(80, CLIENT, "SA"))),
    local("the pod's error about the second names its ends", lambda w: w.sent("world", w.unreachable(
          w.ip("world", "a") / udp(BOUND, 8080))), REDIRECT, program="from_pod", before=[ASK, OTHER_ASK],
          gives=lambda w: w.sent("world", w.unreachable(w.ip("world", "front") / udp(CLIENT, 53)), src="front",
          ttl=63)),
    local("an error about the second's answer names the pod's", lambda w: w.routed("hop", "front", w.time_exceeded(
          w.ip("front", "world", 1) / syn(80, CLIENT, "SA"))), REDIRECT,
          before=[CALL, OTHER_CALL, ("from_pod", from_a(syn(8080, BOUND, "SA")))],
          gives=lambda w: w.delivered("a", "hop", w.time_exceeded(w.ip("a", "world", 1) / syn(8080, BOUND, "SA")))),
    local("an answer whose binding was forgotten is dropped", from_a(syn(8080, BOUND, "SA")), SHOT, program="from_pod",
          rows=forgotten, drop="DROP_NAT_NO_MAPPING"),
    local("a connection that was reset is no collision", OTHER_CALL[1], REDIRECT,
          before=[CALL, ("from_network", call(payload=syn(CLIENT, TCP_PORT, "R")))],
          gives=lambda w: w.delivered("a", "world", syn(CLIENT, 8080))),
    local("a direct connection is one", CALL[1], REDIRECT, before=[("from_network", call("a", syn(CLIENT, 8080)))],
          gives=lambda w: w.delivered("a", "world", syn(BOUND, 8080))),
    local("the node's own connections are told apart likewise", OTHER_CALL[1], TCX_NEXT, rows=nodeport("node"),
          before=[CALL], gives=lambda w: w.routed("world", "node", syn(BOUND, 8080))),
    local("and its answers", lambda w: w.routed("node", "world", syn(8080, BOUND, "SA")), TCX_NEXT,
          program="to_network", rows=nodeport("node"), before=[CALL, OTHER_CALL],
          gives=lambda w: w.routed("front", "world", syn(80, CLIENT, "SA"))),
]  # fmt: skip


@pytest.mark.parametrize(("record", "family"), cases(COLLISIONS), ids=case_id)
def test_one_client_port_by_two_frontends(dp: Datapath, space: Space, record: Record, family: int) -> None:
    space.inside(lambda: check(dp, record, family))


@pytest.mark.parametrize("family", [4, 6])
def test_cluster_ips_from_outside_if_that_is_wanted(space: Space, family: int) -> None:
    record = local("", OTHER_CALL[1], REDIRECT, rows=nodeport("a", flags=CLUSTER_IP),
                   gives=lambda w: w.delivered("a", "world", syn(CLIENT, 8080)))  # fmt: skip
    with contextlib.closing(Datapath({**OVERLAY, "cfg_external_cluster_ip": True})) as wanted:
        space.inside(lambda: check(wanted, record, family))


@pytest.mark.parametrize("family", [4, 6])
def test_by_the_stack_the_pod_is_judged_before_it(space: Space, family: int) -> None:
    """The stack only carries what from_network has let in; what comes out of it isn't asked again."""
    denied = local("", CALL[1], SHOT, rows=both(nodeport("a"), enforce(a=ENFORCE_INGRESS)), drop="DROP_POLICY_DENIED")
    allowed = local("", CALL[1], TCX_NEXT, mark=ANSWER, then=names_frontend,
                    gives=lambda w: w.routed("world", "a", syn(CLIENT, 8080)))  # fmt: skip
    answer = local("", from_a(syn(8080, CLIENT, "SA")), TCX_NEXT, program="from_pod", before=[CALL],
                   mark=A_IDENTITY << 8 | REPLY, gives=from_a(syn(8080, CLIENT, "SA")))  # fmt: skip
    slow: dict[str, Setting] = {**OVERLAY, "cfg_redirect_peer": False, "cfg_redirect_neigh": False}
    with contextlib.closing(Datapath(slow)) as by_stack_only:
        for record in (denied, allowed, answer):
            space.inside(lambda record=record: check(by_stack_only, record, family))  # type: ignore[misc]


def port_error(address: str, backend: str, port: int) -> Build:
    """`address` says that the client's datagram to `backend` found nobody."""
    return lambda w: w.routed(address, "world", w.unreachable(w.ip("world", backend) / udp(CLIENT, port)))


node = records_of(nodeport("node"))
NODE = [
    node("a call goes to the node's own port", CALL[1], TCX_NEXT,
         gives=lambda w: w.routed("world", "node", syn(CLIENT, 8080))),
    node("by any address", OTHER_CALL[1], TCX_NEXT, gives=lambda w: w.routed("world", "node", syn(CLIENT, 8080))),
    node("the node answers as the frontend", lambda w: w.routed("node", "world", syn(8080, CLIENT, "SA")), TCX_NEXT,
         program="to_network", before=[OTHER_CALL], gives=lambda w: w.routed("front", "world", syn(80, CLIENT, "SA"))),
    node("also when it was called directly before", lambda w: w.routed("node", "world", udp(8080, CLIENT)), TCX_NEXT,
         program="to_network", before=[ASK], gives=lambda w: w.routed("node", "world", udp(UDP_PORT, CLIENT))),
    node("its error comes from the frontend", port_error("node", "node", 8080), TCX_NEXT, program="to_network",
         before=[OTHER_ASK], gives=port_error("front", "front", 53)),
    node("an error about its answer is for it", lambda w: w.routed("hop", "front", w.time_exceeded(
         w.ip("front", "world", 1) / syn(80, CLIENT, "SA"))), TCX_NEXT, before=[OTHER_CALL],
         gives=lambda w: w.routed("hop", "node", w.time_exceeded(w.ip("node", "world", 1) / syn(8080, CLIENT, "SA")))),
    node("what else the node sends stays as it is", lambda w: w.routed("node", "world", syn(8080, 1234, "SA")),
         TCX_NEXT, program="to_network", before=[CALL],
         gives=lambda w: w.routed("node", "world", syn(8080, 1234, "SA"))),
    node("also to the client's port", lambda w: w.routed("node", "world", syn(443, CLIENT)), TCX_NEXT,
         program="to_network", before=[CALL], gives=lambda w: w.routed("node", "world", syn(443, CLIENT))),
]  # fmt: skip


@pytest.mark.parametrize(("record", "family"), cases(NODE), ids=case_id)
def test_this_node_as_backend(dp: Datapath, space: Space, record: Record, family: int) -> None:
    space.inside(lambda: check(dp, record, family))


def reset(w: Wire, src: str, port: int) -> Packet:
    return by_stack(w, src, "world", TcpHeader(sport=port, dport=CLIENT, flags="RA", seq=0, ack=1001, window=0))


none = records_of(nodeport())
REFUSALS = [
    none("a call without backends is reset", CALL[1], REDIRECT, drop="DROP_SERVICE_NO_BACKEND", mark=ANSWER,
         gives=lambda w: reset(w, "node", TCP_PORT)),
    none("a reset isn't", call(payload=syn(CLIENT, TCP_PORT, "R")), SHOT, drop="DROP_SERVICE_NO_BACKEND"),
    none("a datagram without backends is answered", ASK[1], REDIRECT, drop="DROP_SERVICE_NO_BACKEND", mark=ANSWER,
         gives=lambda w: by_stack(w, "node", "world", w.unreachable(head(ASK[1](w), w)))),
    none("nobody is told where endpoints are elsewhere", CALL[1], SHOT, drop="DROP_SERVICE_NO_BACKEND",
         rows=nodeport(flags=NODE_PORT | SILENT)),
    none("a port of an address that belongs to services is refused", call("front", syn(CLIENT, 81)), REDIRECT,
         rows=owned, drop="DROP_SERVICE_NO_BACKEND", gives=lambda w: reset(w, "front", 81)),
    none("a client out of the ranges gets nothing", CALL[1], SHOT, rows=ranges("other", 0),
         drop="DROP_SERVICE_SOURCE_RANGE"),
    none("one within them is let in", CALL[1], REDIRECT, rows=ranges("world", 0),
         gives=lambda w: w.delivered("a", "world", syn(CLIENT, 8080))),
    none("unless they are whom it is denied to", CALL[1], SHOT, rows=ranges("world", DENY),
         drop="DROP_SERVICE_SOURCE_RANGE"),
    none("and then others may", CALL[1], REDIRECT, rows=ranges("other", DENY),
         gives=lambda w: w.delivered("a", "world", syn(CLIENT, 8080))),
    none("what answers a client passes the device", lambda w: reset(w, "node", TCP_PORT), TCX_NEXT,
         program="to_network", mark_in=ANSWER, gives=lambda w: reset(w, "node", TCP_PORT)),
]  # fmt: skip


@pytest.mark.parametrize(("record", "family"), cases(REFUSALS), ids=case_id)
def test_refusals(dp: Datapath, space: Space, record: Record, family: int) -> None:
    space.inside(lambda: check(dp, record, family))


def spent(dp: Datapath, w: Wire) -> None:
    """Every CPU has sent as many errors in this second as it may."""
    nodeport()(dp, w)
    sent = struct.pack("=QQ", time.monotonic_ns() - 20_000_000, 1000)  # the kernel looks at a coarse clock
    errors = dp.maps["errors_sent"]
    errors.update(bytes(4), sent * (len(errors.lookup(bytes(4)) or b"") // len(sent)))


LIMITED = [
    none("errors have a limit", ASK[1], SHOT, rows=spent, drop="DROP_SERVICE_NO_BACKEND"),
    none("resets have none, as the stack has none for them", CALL[1], REDIRECT, rows=spent,
         drop="DROP_SERVICE_NO_BACKEND"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "family"), cases(LIMITED), ids=case_id)
def test_errors_to_the_outside_have_a_limit(dp: Datapath, space: Space, record: Record, family: int) -> None:
    try:
        space.inside(lambda: check(dp, record, family))
    finally:
        errors = dp.maps["errors_sent"]
        errors.update(bytes(4), bytes(len(errors.lookup(bytes(4)) or b"")))
