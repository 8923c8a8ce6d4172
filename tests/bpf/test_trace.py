"""Events say what happened, and what can't be said is counted."""

from collections.abc import Iterator

import pytest
from datapath import (
    DROP,
    EGRESS,
    EVENT_DROP,
    EVENT_TRACE,
    INGRESS,
    POINT,
    SHOT,
    Datapath,
)  # fmt: skip
from record import A_ID, A_IDENTITY, B_ID, B_IDENTITY, C_IDENTITY, OVERLAY, Wire, base_rows, send, syn, udp

FORWARDED, LOST = 0, 1


@pytest.fixture
def dp() -> Iterator[Datapath]:
    loaded = Datapath(OVERLAY, sizes={"events": 4096})
    base_rows(loaded)
    yield loaded
    loaded.close()


@pytest.mark.parametrize("family", [4, 6])
def test_a_new_connection(dp: Datapath, family: int) -> None:
    w = Wire(family)
    packet = w.sent("b", syn())
    send(dp, "from_pod", packet)
    (e,) = dp.events()
    assert (e.type, e.reason, e.direction, e.ct_state) == (EVENT_TRACE, POINT["TRACE_TO_ENDPOINT"], INGRESS, 1)
    assert (e.endpoint, e.source, e.destination) == (B_ID, A_IDENTITY, B_IDENTITY)
    assert (e.saddr, e.daddr, e.sport, e.dport) == (w.packed("a"), w.packed("b"), 40000, 80)
    assert (e.proto, e.tcp_flags, e.packet_len, e.ifindex, e.service) == (6, 2, len(packet) - 14, 1, 0)


def test_towards_another_node(dp: Datapath) -> None:
    send(dp, "from_pod", Wire(4).sent("c", udp()))
    (e,) = dp.events()
    assert (e.reason, e.direction, e.endpoint) == (POINT["TRACE_TO_OVERLAY"], EGRESS, A_ID)
    assert (e.source, e.destination) == (A_IDENTITY, C_IDENTITY)


def test_icmp_shows_type_and_code(dp: Datapath) -> None:
    w = Wire(4)
    send(dp, "from_pod", w.sent("b", w.unreachable(w.ip("b", "a") / udp())))
    (e,) = dp.events()
    assert (e.sport, e.dport) == (3, 3)


def test_a_service_is_named(dp: Datapath) -> None:
    w = Wire(4)
    dp.service(7, w.addr("front"), 80, 6, [(w.addr("c"), 8080)])
    send(dp, "from_pod", w.sent("front", syn()))
    (e,) = dp.events()
    assert (e.service, e.daddr, e.dport) == (7, w.packed("c"), 8080)


def test_a_drop_names_packet_and_reason(dp: Datapath) -> None:
    w = Wire(4)
    send(dp, "from_pod", w.sent("b", udp(), src="c"))
    (e,) = dp.events()
    assert (e.type, e.reason, e.direction) == (EVENT_DROP, DROP["DROP_INVALID_SOURCE_IP"], EGRESS)
    assert (e.saddr, e.endpoint, e.source) == (w.packed("c"), A_ID, A_IDENTITY)


def test_events_that_find_no_room_are_counted(dp: Datapath) -> None:
    w = Wire(4)
    for _ in range(100):
        assert send(dp, "from_pod", w.sent("b", udp(), src="c"))[0] == SHOT
    seen = len(dp.events())
    assert 0 < seen < 100
    assert dp.metric(LOST, EGRESS) == 100 - seen
    assert dp.metric(DROP["DROP_INVALID_SOURCE_IP"], EGRESS) == 100


def test_what_is_forwarded_is_counted(dp: Datapath) -> None:
    w = Wire(6)
    for _ in range(3):
        send(dp, "from_pod", w.sent("b", udp()))
    assert (dp.metric(FORWARDED, EGRESS), dp.metric(FORWARDED, INGRESS)) == (3, 3)


def test_events_can_be_switched_off() -> None:
    quiet = Datapath({**OVERLAY, "cfg_events": False}, ("pod",))
    try:
        base_rows(quiet)
        send(quiet, "from_pod", Wire(4).sent("b", udp()))
        send(quiet, "from_pod", Wire(4).sent("b", udp(), src="c"))
        assert quiet.events() == []
        assert quiet.metric(DROP["DROP_INVALID_SOURCE_IP"], EGRESS) == 1
    finally:
        quiet.close()
