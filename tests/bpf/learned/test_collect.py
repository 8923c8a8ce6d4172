"""Collection on real maps with the datapath's own layouts: what goes, what stays, what is counted, and the races."""

import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from fimbria.agent.datapath import Layouts, objects_folder
from fimbria.kernel.btf import Btf
from fimbria.kernel.maps import Map, MapType, create_map
from fimbria.kernel.sweep import Sweep, count
from fimbria.learned.collect import (
    AFFINITY_GRACE,
    CT_GRACE,
    NAT_LONELY,
    NAT_RECENT,
    SECOND,
    AffinityCollector,
    ConntrackCollector,
    NatCollector,
)
from fimbria.learned.pace import Pace
from fimbria.model.address import pack
from fimbria.model.rows import NO_ADDR, Affinity, AffinityKey, CtEntry, CtKey, NatEntry, NatKey

NOW = 10**15
TCP, UDP, ICMP = 6, 17, 1
POD, REMOTE, NODE = pack("10.0.0.5"), pack("192.0.2.1"), pack("172.16.0.1")
CLIENT, FRONTEND, BACKEND = pack("198.51.100.7"), pack("172.16.0.1"), pack("10.1.0.9")
IN, OUT = 0, 1
OF_SERVICE = 1
LAYOUTS = Layouts()
NAMES = {
    CtKey: "ct_key", CtEntry: "ct_entry", NatKey: "nat_key", NatEntry: "nat_entry", AffinityKey: "affinity_key",
    Affinity: "affinity",
}  # fmt: skip
BTF = Btf.from_elf((objects_folder() / "layout.bpf.o").read_bytes())


def lru(key: str, value: str, entries: int = 4096) -> Map:
    return create_map(MapType.LRU_HASH, LAYOUTS[key].size, LAYOUTS[value].size, entries, 0, "fimcollect")


@pytest.fixture
def conntrack() -> Iterator[Map]:
    with lru("ct_key", "ct_entry") as found:
        yield found


@pytest.fixture
def nat() -> Iterator[Map]:
    with lru("nat_key", "nat_entry") as found:
        yield found


@pytest.fixture
def affinity() -> Iterator[Map]:
    with lru("affinity_key", "affinity") as found:
        yield found


def put(bpf_map: Map, *rows: tuple[Any, Any]) -> None:
    for key, value in rows:
        bpf_map.update(LAYOUTS[NAMES[type(key)]].encode(key), LAYOUTS[NAMES[type(value)]].encode(value))


def keys(bpf_map: Map, codec: str) -> set[object]:
    return set(LAYOUTS[codec].decode_many(bpf_map.dump()[0]))


def connection(expires: int, port: int = 1000, *, local: bytes = POD, remote: bytes = REMOTE, remote_port: int = 53,
               proto: int = UDP, scope: int = 0) -> tuple[CtKey, CtEntry]:  # fmt: skip
    key = CtKey(local, remote, port, remote_port, proto, scope)
    return key, CtEntry(expires, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, NO_ADDR)


def binding(used: int, port: int = 1000, *, node_port: int = 0, proto: int = UDP) -> list[tuple[NatKey, NatEntry]]:
    """Both rows of a masqueraded connection from POD:port to REMOTE:53."""
    taken = node_port or port
    return [
        (NatKey(REMOTE, NODE, 53, taken, proto, IN), NatEntry(POD, port, 0, 0, used)),
        (NatKey(POD, REMOTE, port, 53, proto, OUT), NatEntry(NODE, taken, 0, 0, used)),
    ]


def service_binding(used: int, port: int, *, backend: bytes = BACKEND) -> list[tuple[NatKey, NatEntry]]:
    """Both rows of a client's connection from CLIENT:port to FRONTEND:80, sent on to a backend elsewhere."""
    return [
        (NatKey(backend, NODE, 8080, port, TCP, IN), NatEntry(CLIENT, port, OF_SERVICE, 5, used, FRONTEND, 80)),
        (NatKey(CLIENT, FRONTEND, port, 80, TCP, OUT), NatEntry(NODE, port, OF_SERVICE, 5, used, FRONTEND, 80)),
    ]  # fmt: skip


def walk(collector: ConntrackCollector | NatCollector | AffinityCollector) -> int:
    before = collector.figures.removed
    while not collector.step():
        pass
    return collector.figures.removed - before


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> int:
        return self.now


# --- connections ---------------------------------------------------------------------------------------------------


def test_only_connections_expired_for_a_while_go(conntrack: Map) -> None:
    long_gone, just_gone, alive = (
        connection(NOW - CT_GRACE - 1, 1), connection(NOW - CT_GRACE + SECOND, 2), connection(NOW + SECOND, 3),
    )  # fmt: skip
    put(conntrack, long_gone, just_gone, alive)
    collector = ConntrackCollector(conntrack, BTF, clock=Clock())
    assert walk(collector) == 1
    assert keys(conntrack, "ct_key") == {just_gone[0], alive[0]}
    assert collector.figures.entries == 2


def test_a_walk_sees_every_entry_in_bounded_steps(conntrack: Map) -> None:
    put(conntrack, *(connection(NOW + (SECOND if port % 2 else -CT_GRACE - 1), port) for port in range(1, 3001)))
    collector = ConntrackCollector(conntrack, BTF, clock=Clock())
    collector._sweep = Sweep(conntrack, 256)
    steps = 1
    while not collector.step():
        steps += 1
    assert 3000 / 256 <= steps <= 40
    assert (collector.figures.removed, collector.figures.entries) == (1500, 1500)
    assert walk(collector) == 0
    assert len(keys(conntrack, "ct_key")) == 1500


def test_counting_takes_every_entry_once(conntrack: Map) -> None:
    assert count(conntrack) == 0
    put(conntrack, *(connection(NOW, port) for port in range(1, 3001)))
    assert count(conntrack) == 3000


def test_what_is_renewed_between_look_up_and_removal_stays(conntrack: Map) -> None:
    dead, reborn = connection(NOW - CT_GRACE - 1, 1), connection(NOW - CT_GRACE - 1, 2)
    put(conntrack, dead, reborn)
    sweep = Sweep(conntrack)
    sweep.step()
    assert sweep.keep_expired(0, NOW - CT_GRACE) == 2
    put(conntrack, (reborn[0], replace(reborn[1], expires=NOW + 60 * SECOND)))
    assert sweep.remove() == (1, 1)
    assert keys(conntrack, "ct_key") == {reborn[0]}


def test_renewing_all_the_time_never_loses_an_entry(conntrack: Map) -> None:
    """Writers renew while a collector removes: after a renewal the entry is there, or is put back within a moment."""
    codec, key = LAYOUTS["ct_entry"], LAYOUTS["ct_key"].encode(connection(0)[0])
    dead, alive = codec.encode(connection(1)[1]), codec.encode(connection(NOW * 2)[1])
    stop = threading.Event()
    sweep = Sweep(conntrack)

    def collect() -> None:
        while not stop.is_set():
            while not sweep.step():
                pass
            sweep.keep_expired(0, NOW)
            sweep.remove()

    thread = threading.Thread(target=collect)
    thread.start()
    try:
        for _ in range(3000):
            conntrack.update(key, dead)
            conntrack.update(key, alive)
            deadline = time.monotonic() + 10
            while conntrack.lookup(key) != alive:
                assert time.monotonic() < deadline, "a renewed entry was lost"
    finally:
        stop.set()
        thread.join()


def test_what_the_kernel_forgets_is_estimated(conntrack: Map) -> None:
    clock = Clock()
    collector = ConntrackCollector(conntrack, BTF, pace=Pace(period=1), clock=clock)
    put(conntrack, *(connection(NOW + 3600 * SECOND, port) for port in range(1, 1001)))
    walk(collector)
    walk(collector)
    assert collector.figures.evicted == 0
    for port in range(1, 501):
        conntrack.delete(LAYOUTS["ct_key"].encode(connection(0, port)[0]))
    walk(collector)
    assert 100 <= collector.figures.evicted <= 900


def test_a_table_that_fills_up_is_told_once(conntrack: Map, caplog: pytest.LogCaptureFixture) -> None:
    collector = ConntrackCollector(conntrack, BTF, clock=Clock())
    for port in range(1, 3601):
        put(conntrack, connection(NOW + 9 * SECOND, port))
    with caplog.at_level(logging.WARNING):
        walk(collector)
        walk(collector)
    assert [r.message for r in caplog.records if "nearly full" in r.message] == [
        f"table {conntrack.name} is nearly full: {collector.figures.entries} of 4096 entries"
    ]


# --- bindings ------------------------------------------------------------------------------------------------------


def test_a_binding_goes_with_its_connection_both_halves(nat: Map, conntrack: Map) -> None:
    idle = NOW - NAT_RECENT - SECOND
    over, going_on = binding(idle, 1), binding(idle, 2)
    put(nat, *over, *going_on)
    put(conntrack, connection(NOW - SECOND, 1), connection(NOW + SECOND, 2))
    collector = NatCollector(nat, conntrack, BTF, 1000, clock=Clock())
    walk(collector)
    walk(collector)
    assert keys(nat, "nat_key") == {k for k, _ in going_on}


def test_hours_of_silence_do_not_end_a_binding_whose_connection_lives(nat: Map, conntrack: Map) -> None:
    rows = binding(NOW - 7 * 3600 * SECOND, 1, proto=TCP)
    put(nat, *rows)
    put(conntrack, connection(NOW + 3600 * SECOND, 1, proto=TCP))
    collector = NatCollector(nat, conntrack, BTF, 1000, clock=Clock())
    assert walk(collector) + walk(collector) == 0


def test_without_a_known_connection_a_binding_is_kept_for_a_while(nat: Map, conntrack: Map) -> None:
    fresh, old = binding(NOW - NAT_LONELY + SECOND, 1), binding(NOW - NAT_LONELY - SECOND, 2)
    put(nat, *fresh, *old)
    collector = NatCollector(nat, conntrack, BTF, 1000, clock=Clock())
    walk(collector)
    walk(collector)
    assert keys(nat, "nat_key") == {k for k, _ in fresh}


def test_recent_use_is_enough(nat: Map, conntrack: Map) -> None:
    rows = binding(NOW - NAT_RECENT + SECOND, 1)
    put(nat, *rows)
    put(conntrack, connection(NOW - SECOND, 1))
    assert walk(NatCollector(nat, conntrack, BTF, 1000, clock=Clock())) == 0


@pytest.mark.parametrize("half", [0, 1])
def test_half_a_binding_stays_as_long_as_its_connection(nat: Map, conntrack: Map, half: int) -> None:
    """By what is left programs find the port again, however long the connection was silent."""
    idle = NOW - 3600 * SECOND
    going_on, over = binding(idle, 1)[half], binding(idle, 2)[half]
    put(nat, going_on, over)
    put(conntrack, connection(NOW + SECOND, 1), connection(NOW - SECOND, 2))
    assert walk(NatCollector(nat, conntrack, BTF, 1000, clock=Clock())) == 1
    assert keys(nat, "nat_key") == {going_on[0]}


def test_a_clients_binding_goes_with_its_connection_to_the_service(nat: Map, conntrack: Map) -> None:
    idle = NOW - NAT_RECENT - SECOND
    over, going_on, half = service_binding(idle, 1), service_binding(idle, 2), service_binding(idle, 3)[0]
    lonely, silent = service_binding(NOW - NAT_LONELY - SECOND, 4), service_binding(idle, 5)
    put(nat, *over, *going_on, half, *lonely, *silent)
    for port, expires in {1: NOW - SECOND, 2: NOW + SECOND, 3: NOW + SECOND}.items():
        put(conntrack, connection(expires, port, local=CLIENT, remote=FRONTEND, remote_port=80, proto=TCP, scope=1))
    collector = NatCollector(nat, conntrack, BTF, 1000, clock=Clock())
    walk(collector)
    walk(collector)
    assert keys(nat, "nat_key") == {k for k, _ in [*going_on, *silent, half]}


def test_ports_towards_the_fullest_destination_are_counted_and_told(
    nat: Map, conntrack: Map, caplog: pytest.LogCaptureFixture
) -> None:
    for port in range(1, 91):
        put(nat, *binding(NOW, port))
        put(nat, *[(replace(k, saddr=BACKEND) if k.direction == IN else replace(k, daddr=BACKEND), v)
                   for k, v in binding(NOW, port)][: 2 * (port <= 30)])  # fmt: skip
    collector = NatCollector(
        nat, conntrack, BTF, 100, lambda k: str(LAYOUTS["nat_key"].decode(k).saddr[12]), clock=Clock()
    )
    with caplog.at_level(logging.WARNING):
        walk(collector)
    assert (collector.ports_used, collector.fullest) == (90, "192")
    assert collector.load() == 0.9
    assert [r.message for r in caplog.records] == ["nearly out of source ports towards 192: 90 of 100 in use"]


# --- affinity ------------------------------------------------------------------------------------------------------


def test_affinity_ends_after_what_its_service_asks_for(affinity: Map) -> None:
    def row(service: int, age: int) -> tuple[AffinityKey, Affinity]:
        return AffinityKey(CLIENT, service, 0), Affinity(NOW - age, 1)

    short, long, gone = row(7, 100 * SECOND), row(9, 100 * SECOND), row(8, AFFINITY_GRACE + SECOND)
    put(affinity, short, long, gone, row(10, SECOND))
    collector = AffinityCollector(affinity, BTF, lambda: {9: 10800, 7: 50}, clock=Clock())
    assert walk(collector) == 2
    assert keys(affinity, "affinity_key") == {long[0], row(10, 0)[0]}
