"""Services for clients outside the node: to every kind of backend and back, errors and refusals included."""

import struct
from collections.abc import Iterator

import pytest
from datapath import (
    ENFORCE_INGRESS,
    REDIRECT,
    SHOT,
    TCX_NEXT,
    WORLD,
    Datapath,
    addr,
)  # fmt: skip
from lab import Space
from record import (
    B_ID,
    NATIVE,
    OVERLAY,
    Build,
    Prepare,
    Record,
    Wire,
    case_id,
    cases,
    check,
    syn,
    udp,
)  # fmt: skip
from scapy.layers.inet import TCP as TcpHeader
from scapy.packet import Packet, Raw
from test_policy import enforce, rule

from fimbria.model import rows

TCP, UDP, SCTP = 6, 17, 132
TCP_PORT, UDP_PORT = 30080, 30053
NODE_PORT, CLUSTER_IP, RANGES, DENY, SILENT = 2, 1, 32, 64, 1024
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
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def dp() -> Iterator[Datapath]:
    loaded = Datapath(OVERLAY)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def native() -> Iterator[Datapath]:
    loaded = Datapath(NATIVE)
    yield loaded
    loaded.close()


def nodeport(*backends: str, flags: int = NODE_PORT, port: int = 8080) -> Prepare:
    """Node port 30080 for TCP and SCTP, 30053 for UDP, at `port` of the backends; `front` 80 and 53 lead to the same."""

    def prepare(dp: Datapath, w: Wire) -> None:
        every = addr("0.0.0.0" if w.family == 4 else "::")
        for number, proto, front, outside in ((7, TCP, 80, TCP_PORT), (8, UDP, 53, UDP_PORT), (9, SCTP, 80, TCP_PORT)):
            dp.service(number, w.addr("front"), front, proto, [(w.addr(b), port) for b in backends])
            row = rows.Frontend(number, len(backends), flags)
            dp.put("frontends", rows.FrontendKey(every, outside, proto), row)
            dp.put("frontends", rows.FrontendKey(w.packed("front"), front, proto), row)

    return prepare


def call(dst: str = "node", payload: Packet | None = None, **kw: int) -> Build:
    return lambda w: w.routed("world", dst, syn(CLIENT, TCP_PORT) if payload is None else payload, **kw)


def ask(dst: str = "node", sport: int = CLIENT, dport: int = UDP_PORT) -> Build:
    return lambda w: w.routed("world", dst, udp(sport, dport))


def from_b(payload: Packet, ttl: int = 64) -> Build:
    """As pod b answers. Test runs take place on pod a's device, so b answers through the stack's program there."""
    return lambda w: w.sent("world", payload, ttl=ttl)


CALL = ("from_network", call())
ASK = ("from_network", ask())


def entry_names_frontend(dp: Datapath, w: Wire) -> None:
    (found,) = (e for k, e in dp.items("conntrack") if k.local == w.packed("a") and k.scope == 0)
    assert (found.service, found.frontend, found.frontend_port) == (7, w.packed("node"), TCP_PORT)


LOCAL = [
    Record("a call goes to the pod, the client kept", CALL[1], REDIRECT, program="from_network", rows=nodeport("a"),
           gives=lambda w: w.delivered("a", "world", syn(CLIENT, 8080)), then=entry_names_frontend),
    Record("UDP likewise", ASK[1], REDIRECT, program="from_network", rows=nodeport("a"),
           gives=lambda w: w.delivered("a", "world", udp(CLIENT, 8080))),
    Record("an address that no device has, too", call("front", syn(CLIENT, 80)), REDIRECT, program="from_network",
           rows=nodeport("a"), gives=lambda w: w.delivered("a", "world", syn(CLIENT, 8080))),
    Record("the pod answers as the frontend", lambda w: w.sent("world", syn(8080, CLIENT, "SA")), REDIRECT,
           rows=nodeport("a"), before=[CALL], mark=ANSWER,
           gives=lambda w: w.sent("world", syn(TCP_PORT, CLIENT, "SA"), src="node", ttl=63)),
    Record("UDP answers likewise", lambda w: w.sent("world", udp(8080, CLIENT)), REDIRECT, rows=nodeport("a"),
           before=[ASK], gives=lambda w: w.sent("world", udp(UDP_PORT, CLIENT), src="node", ttl=63)),
    Record("what answers for a frontend isn't masqueraded", lambda w: w.routed("node", "world", syn(TCP_PORT, CLIENT,
           "SA")), TCX_NEXT, program="to_network", rows=nodeport("a"), before=[CALL], mark_in=ANSWER,
           gives=lambda w: w.routed("node", "world", syn(TCP_PORT, CLIENT, "SA"))),
]  # fmt: skip


@pytest.mark.parametrize(("record", "family"), cases(LOCAL), ids=case_id)
def test_local_backend(dp: Datapath, space: Space, record: Record, family: int) -> None:
    space.inside(lambda: check(dp, record, family))
