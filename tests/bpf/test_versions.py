"""While programs of two versions run, each with its own tables: a connection goes on whoever sees its next packet."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
from datapath import EGRESS, INGRESS, REDIRECT, TCX_NEXT, Datapath
from record import A_ID, OVERLAY, Wire, base_rows, send, syn, udp
from scapy.layers.l2 import Ether
from scapy.packet import Packet
from test_conntrack import entry, flow
from test_nodeport import BOUND, CLIENT, TCP_PORT, nodeport
from test_translate import service

from fimbria.model import rows

PORT = 61000  # where source port 40000 goes first
TCP, UDP = 6, 17
Versions = tuple[Datapath, Datapath]
# Who sees a connection's first packet and who the next one: 0 is the former version.
ORDERS = pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first-to-former", "first-to-new"])
FAMILIES = pytest.mark.parametrize("family", [4, 6])
PROTOCOLS = pytest.mark.parametrize("proto", [TCP, UDP], ids=["TCP", "UDP"])


@pytest.fixture(scope="module")
def both() -> Iterator[Versions]:
    former = Datapath(OVERLAY)
    new = Datapath(OVERLAY, sizes={"conntrack": 1024, "nat": 512}, beside=former)
    yield former, new
    new.close()
    former.close()


@pytest.fixture
def versions(both: Versions) -> Iterator[Versions]:
    """Former and new, which look into each other's tables."""
    for dp in both:
        dp.clear()
    base_rows(both[0])
    both[1].look_into(*both)
    yield both
    both[1].look_into()


def first(proto: int, port: int = 40000) -> Packet:
    return syn(port) if proto == TCP else udp(port)


def following(proto: int, port: int = 40000) -> Packet:
    return syn(port, flags="A") if proto == TCP else udp(port)


def answer(proto: int, port: int = 40000, *, service_port: int = 0) -> Packet:
    return syn(service_port or 80, port, "SA") if proto == TCP else udp(service_port or 53, port)


def passed(dp: Datapath, program: str, packet: Packet, verdict: int = REDIRECT) -> Packet:
    """What comes out."""
    got, out, _ = send(dp, program, packet)
    assert got == verdict, dp.events()
    return Ether(out)


def now_only(dp: Datapath, w: Wire, backend: str) -> None:
    """The service would choose another backend for whoever isn't known."""
    for number, proto in ((7, TCP), (8, UDP)):
        dp.put("backends", number * 100 + 50, rows.Backend(w.packed(backend), 8080, proto))
        dp.put("service_slots", rows.SlotKey(number, 0), number * 100 + 50)


def to(packet: Packet) -> str:
    found: str = packet.payload.dst
    return found


@ORDERS
@PROTOCOLS
@FAMILIES
def test_a_service_keeps_its_backend(versions: Versions, family: int, proto: int, order: tuple[int, int]) -> None:
    w, (one, next_one) = Wire(family), (versions[i] for i in order)
    service("b")(one, w)
    assert to(passed(one, "from_pod", w.sent("front", first(proto)))) == w.addr("b")
    now_only(one, w, "c")
    assert to(passed(next_one, "from_pod", w.sent("front", following(proto)))) == w.addr("b")
    back = passed(next_one, "to_pod", w.routed("b", "a", answer(proto, service_port=8080)), TCX_NEXT)
    assert back.payload.src == w.addr("front")
    kept = [e.backend for k, e in next_one.items("conntrack") if k.scope == 1]
    assert kept == [(700 if proto == TCP else 800)], "it is the version's own now"


@ORDERS
@PROTOCOLS
@FAMILIES
def test_an_answer_comes_back_to_its_pod(versions: Versions, family: int, proto: int, order: tuple[int, int]) -> None:
    w, (one, next_one) = Wire(family), (versions[i] for i in order)
    passed(one, "from_pod", w.sent("world", first(proto)), TCX_NEXT)
    out = passed(one, "to_network", w.routed("a", "world", first(proto)), TCX_NEXT)
    got = passed(next_one, "from_network", w.routed("world", "node", answer(proto, PORT)))
    assert got.payload.payload.sport == (80 if proto == TCP else 53)
    assert (to(got), got.payload.payload.dport) == (w.addr("a"), 40000)
    again = passed(next_one, "to_network", w.routed("a", "world", following(proto)), TCX_NEXT)
    assert again.payload.payload.sport == out.payload.payload.sport == PORT, "the other side knows no other port"


@ORDERS
@FAMILIES
def test_an_error_finds_its_pod(versions: Versions, family: int, order: tuple[int, int]) -> None:
    w, (one, next_one) = Wire(family), (versions[i] for i in order)
    passed(one, "from_pod", w.sent("world", udp()), TCX_NEXT)
    passed(one, "to_network", w.routed("a", "world", udp()), TCX_NEXT)
    about = w.time_exceeded(w.ip("node", "world", 1) / udp(PORT))
    assert to(passed(next_one, "from_network", w.routed("hop", "node", about))) == w.addr("a")


@ORDERS
@FAMILIES
def test_a_client_outside_keeps_its_backend(versions: Versions, family: int, order: tuple[int, int]) -> None:
    """The backend is on another node, which answers through this one."""
    w, (one, next_one) = Wire(family), (versions[i] for i in order)
    nodeport("c")(one, w)
    sent = passed(one, "from_network", w.routed("world", "node", syn(CLIENT, TCP_PORT)))
    now_only(one, w, "other")
    again = passed(next_one, "from_network", w.routed("world", "node", syn(CLIENT, TCP_PORT, "A")))
    assert to(again) == to(sent) == w.addr("c")
    assert again.payload.payload.sport == sent.payload.payload.sport == BOUND
    for dp in (one, next_one):
        keys, _ = dp.maps["conntrack"].dump()
        assert len(keys) == dp.maps["conntrack"].key_size, "one connection"


@PROTOCOLS
@FAMILIES
def test_without_another_version_it_is_unknown(versions: Versions, family: int, proto: int) -> None:
    w, (former, new) = Wire(family), versions
    new.look_into()
    service("b")(former, w)
    passed(former, "from_pod", w.sent("front", first(proto)))
    passed(former, "from_pod", w.sent("world", first(proto)), TCX_NEXT)
    passed(former, "to_network", w.routed("a", "world", first(proto)), TCX_NEXT)
    now_only(former, w, "c")
    assert new.items("conntrack") == new.items("nat") == []
    passed(new, "from_network", w.routed("world", "node", answer(proto, PORT)), TCX_NEXT)
    assert to(passed(new, "from_pod", w.sent("front", following(proto)))) == w.addr("c")


def put_former(former: Datapath, w: Wire, **fields: int) -> None:
    """a reached the service through another backend than it would now."""
    service("c")(former, w)
    former.put("backends", 799, rows.Backend(w.packed("b"), 8080, TCP))
    key = rows.CtKey(w.packed("a"), w.packed("front"), 40000, 80, TCP, 1)
    former.put("conntrack", key, replace(entry(**fields), service=7, backend=799, frontend=w.packed("front"),
                                         frontend_port=80))  # fmt: skip


@pytest.mark.parametrize(("fields", "backend"), [
    pytest.param({}, "b", id="alive"),
    pytest.param({"seconds": -1}, "c", id="expired"),
    pytest.param({"endpoint": A_ID + 1}, "c", id="a former owner of the address"),
])  # fmt: skip
@FAMILIES
def test_only_what_lives_is_found(versions: Versions, family: int, fields: dict[str, int], backend: str) -> None:
    w, (former, new) = Wire(family), versions
    put_former(former, w, **fields)
    assert to(passed(new, "from_pod", w.sent("front", following(TCP)))) == w.addr(backend)


@FAMILIES
def test_what_is_over_here_does_not_come_back(versions: Versions, family: int) -> None:
    """The version's own entry is younger, also when it has expired."""
    w, (former, new) = Wire(family), versions
    put_former(former, w)
    own = flow(w)
    new.put("conntrack", replace(own, remote=w.packed("front"), scope=1), replace(entry(seconds=-1), service=7))
    assert to(passed(new, "from_pod", w.sent("front", following(TCP)))) == w.addr("c")


@ORDERS
@PROTOCOLS
@FAMILIES
def test_a_port_is_taken_in_both(versions: Versions, family: int, proto: int, order: tuple[int, int]) -> None:
    w, (one, next_one) = Wire(family), (versions[i] for i in order)
    server = 80 if proto == TCP else 53
    taken = rows.NatKey(w.packed("world"), w.packed("node"), server, PORT, proto, INGRESS)
    one.put("nat", taken, rows.NatEntry(w.packed("b"), 40000, 0, 0, 0))
    out = passed(next_one, "to_network", w.routed("a", "world", first(proto)), TCX_NEXT)
    assert out.payload.payload.sport != PORT
    assert {k.direction for k, _ in next_one.items("nat")} == {INGRESS, EGRESS}


@FAMILIES
def test_the_newest_of_several_versions_knows_best(versions: Versions, both: Versions, family: int) -> None:
    w, (former, new) = Wire(family), versions
    dead = Datapath(OVERLAY, beside=former)
    try:
        new.look_into(dead, former, new)
        put_former(former, w)
        assert to(passed(new, "from_pod", w.sent("front", following(TCP)))) == w.addr("b")
        keys, _ = new.maps["conntrack"].dump()
        new.maps["conntrack"].delete_batch(keys, len(keys) // new.maps["conntrack"].key_size)
        key = rows.CtKey(w.packed("a"), w.packed("front"), 40000, 80, TCP, 1)
        former.put("backends", 798, rows.Backend(w.packed("c"), 8080, TCP))
        dead.put("conntrack", key, replace(former.get("conntrack", key), backend=798))
        assert to(passed(new, "from_pod", w.sent("front", following(TCP)))) == w.addr("c")
    finally:
        new.look_into()
        dead.close()
