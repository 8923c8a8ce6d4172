"""Which frontend and which backend lib/service.h answers, row by row."""

import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from compiling import compile_object
from datapath import addr
from selection import (
    ASK,
    INSIDE,
    NOBODY,
    OTHER_NODE,
    POD_ADDRESS,
    SOCKET,
    SOURCE,
    TABLE_SIZE,
    TCP,
    THIS_NODE,
    UDP,
    Result,
    Selection,
    node_address,
)  # fmt: skip

from fimbria.kernel.bpf import BpfObject, MapType, create_map
from fimbria.model import rows

VIP = {4: "10.96.0.1", 6: "fd96::1"}
ANY = {4: "0.0.0.0", 6: "::"}
NODE = {4: "192.168.1.2", 6: "fd01:1::2"}
OTHER = {4: "192.168.2.2", 6: "fd01:2::2"}
CLIENT = {4: "203.0.113.9", 6: "fd99::9"}
POD = {4: "10.1.0.10", 6: "fd10:1::10"}
BACKENDS = {
    4: {n: (f"10.0.0.{n}", 8080) for n in range(1, 6)},
    6: {n: (f"fd00::{n}", 8080) for n in range(1, 6)},
}
ONE = {family: {1: of[1]} for family, of in BACKENDS.items()}
TWO = {family: {2: of[2]} for family, of in BACKENDS.items()}
NONE, FOUND, REFUSE, SILENT, DENIED = Result
both = pytest.mark.parametrize("family", [4, 6])


@pytest.fixture(scope="module")
def object_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_object(SOURCE, tmp_path_factory.mktemp("bpf"))


@pytest.fixture(scope="module")
def loaded(object_file: Path) -> Iterator[Selection]:
    with BpfObject(object_file) as obj:
        yield Selection(obj)


@pytest.fixture
def s(loaded: Selection) -> Iterator[Selection]:
    yield loaded
    loaded.clear()


def spread(ask: Callable[[int], int], n: int = 1000) -> Counter[int]:
    return Counter(ask(i) for i in range(n))


def assert_even(hits: Counter[int], backends: int) -> None:
    """Within seven standard deviations: fails by chance once in 10^11 runs."""
    n, mean = hits.total(), hits.total() / backends
    assert len(hits) == backends
    assert all(abs(h - mean) < 7 * (n * (1 / backends) * (1 - 1 / backends)) ** 0.5 for h in hits.values()), hits


# -- frontends


@both
def test_a_frontend_is_address_port_and_protocol(s: Selection, family: int) -> None:
    s.service(7, (VIP[family], 80), ONE[family])
    found = s.ask((VIP[family], 80), CLIENT[family])
    assert (found.result, found.service, found.backend, found.to) == (FOUND, 7, 1, BACKENDS[family][1])
    assert s.ask((VIP[family], 81), CLIENT[family]).result == NONE
    assert s.ask((VIP[family], 80), CLIENT[family], proto=UDP).result == NONE
    assert s.ask((CLIENT[family], 80), CLIENT[family]).result == NONE


@both
@pytest.mark.parametrize("flags", [0, INSIDE], ids=["outside", "inside"])
def test_a_node_port_is_every_address_of_this_node(s: Selection, family: int, flags: int) -> None:
    s.service(7, (ANY[family], 30080), ONE[family], "NODE_PORT")
    node_address(s, NODE[family], own=True)
    at = (NODE[family], 30080)
    assert s.ask(at, CLIENT[family], flags=flags, owner=THIS_NODE).backend == 1
    assert s.ask(at, CLIENT[family], flags=flags, owner=ASK).backend == 1
    assert s.ask(at, CLIENT[family], flags=flags, owner=ASK, proto=UDP).result == NONE
    for owner in (NOBODY, POD_ADDRESS):
        assert s.ask((CLIENT[family], 30080), POD[family], flags=flags, owner=owner).result == NONE
    assert s.ask((CLIENT[family], 30080), POD[family], flags=flags, owner=ASK).result == NONE


@both
def test_a_node_port_of_one_family_is_not_the_others(s: Selection, family: int) -> None:
    s.service(7, (ANY[10 - family], 30080), ONE[10 - family], "NODE_PORT")
    assert s.ask((NODE[family], 30080), CLIENT[family], owner=THIS_NODE).result == NONE


@both
def test_the_unspecified_address_itself_is_no_frontend(s: Selection, family: int) -> None:
    s.service(7, (ANY[family], 30080), ONE[family], "NODE_PORT")
    assert s.ask((ANY[family], 30080), POD[family], flags=INSIDE, owner=POD_ADDRESS).result == NONE
    assert s.ask((ANY[family], 30080), POD[family], flags=INSIDE, owner=THIS_NODE).result == FOUND


@both
def test_only_ports_in_the_range_are_node_ports(s: Selection, family: int) -> None:
    for port, result in ((29999, NONE), (30000, FOUND), (32767, FOUND), (32768, NONE)):
        s.service(7, (ANY[family], port), ONE[family], "NODE_PORT")
        assert s.ask((NODE[family], port), CLIENT[family], owner=THIS_NODE).result == result


@both
def test_another_nodes_node_port_is_translated_for_clients_inside(s: Selection, family: int) -> None:
    s.service(7, (ANY[family], 30080), ONE[family], "NODE_PORT")
    node_address(s, OTHER[family], own=False)
    at = (OTHER[family], 30080)
    assert s.ask(at, POD[family], flags=INSIDE, owner=OTHER_NODE).result == FOUND
    assert s.ask(at, POD[family], flags=INSIDE, owner=ASK).result == FOUND
    assert s.ask(at, CLIENT[family], owner=OTHER_NODE).result == NONE


@both
def test_what_another_node_serves_from_its_own_endpoints_is_left_to_it(s: Selection, family: int) -> None:
    s.service(7, (ANY[family], 30080), ONE[family], "NODE_PORT TWO_SCOPES")
    s.service(8, (ANY[family], 30080), TWO[family], "NODE_PORT TWO_SCOPES", scope=1)
    at = 30080
    assert s.ask((OTHER[family], at), POD[family], flags=INSIDE, owner=OTHER_NODE).result == NONE
    assert s.ask((NODE[family], at), POD[family], flags=INSIDE, owner=THIS_NODE).backend == 2
    assert s.ask((NODE[family], at), CLIENT[family], owner=THIS_NODE).backend == 1


@both
def test_two_scopes(s: Selection, family: int) -> None:
    at = (VIP[family], 80)
    s.service(7, at, {}, "TWO_SCOPES SILENT")
    # Between two writes of the agent.
    assert s.ask(at, POD[family], flags=INSIDE).result == SILENT
    s.service(8, at, TWO[family], "TWO_SCOPES", scope=1)
    assert s.ask(at, CLIENT[family]).result == SILENT
    inside = s.ask(at, POD[family], flags=INSIDE)
    assert (inside.service, inside.backend) == (8, 2)


@both
def test_cluster_ips_are_not_for_clients_outside(s: Selection, object_file: Path, family: int) -> None:
    at = (VIP[family], 80)
    s.service(7, at, ONE[family], "CLUSTER_IP")
    assert s.ask(at, CLIENT[family]).result == NONE
    assert s.ask(at, POD[family], flags=INSIDE).result == FOUND
    with BpfObject(object_file) as obj:
        opened = Selection(obj, cfg_external_cluster_ip=True)
        opened.service(7, at, ONE[family], "CLUSTER_IP")
        assert opened.ask(at, CLIENT[family]).result == FOUND


@both
def test_an_address_of_services_refuses_what_it_does_not_serve(s: Selection, family: int) -> None:
    s.service(0, (VIP[family], 0), flags="ADDRESS", proto=0)
    s.service(7, (VIP[family], 80), ONE[family])
    for flags in (0, INSIDE):
        assert s.ask((VIP[family], 80), CLIENT[family], flags=flags).result == FOUND
        assert s.ask((VIP[family], 81), CLIENT[family], flags=flags).result == REFUSE
        assert s.ask((VIP[family], 81), CLIENT[family], flags=flags, proto=UDP).result == REFUSE
        assert s.ask((VIP[family], 81), CLIENT[family], flags=flags, owner=ASK).result == REFUSE
    # A node's or pod's address that is an external IP too keeps its other ports.
    for owner in (THIS_NODE, OTHER_NODE, POD_ADDRESS):
        assert s.ask((VIP[family], 81), CLIENT[family], owner=owner).result == NONE
    node_address(s, VIP[family], own=True)
    assert s.ask((VIP[family], 81), CLIENT[family], owner=ASK).result == NONE


@both
def test_an_address_of_cluster_ips_alone_refuses_nobody_outside(s: Selection, family: int) -> None:
    s.service(0, (VIP[family], 0), flags="ADDRESS CLUSTER_IP", proto=0)
    assert s.ask((VIP[family], 81), CLIENT[family]).result == NONE
    assert s.ask((VIP[family], 81), CLIENT[family], flags=INSIDE).result == REFUSE


@both
def test_nobody_there_is_refused_or_silent(s: Selection, family: int) -> None:
    s.service(7, (VIP[family], 80))
    s.service(8, (VIP[family], 81), flags="SILENT")
    assert s.ask((VIP[family], 80), CLIENT[family]).result == REFUSE
    assert s.ask((VIP[family], 81), CLIENT[family]).result == SILENT


# -- who may


@both
@pytest.mark.parametrize("deny", [False, True], ids=["allow", "deny"])
def test_source_ranges(s: Selection, family: int, deny: bool) -> None:
    at, length = (VIP[family], 80), 32 + (96 + 24 if family == 4 else 64)
    s.service(7, at, ONE[family], "SOURCE_RANGES" + " SOURCE_DENY" * deny)
    s.service(8, (VIP[family], 81), ONE[family], "SOURCE_RANGES" + " SOURCE_DENY" * deny)
    s.put("source_ranges", rows.SourceKey(length, 7, addr(CLIENT[family])))
    near, far = {4: ("203.0.113.77", "203.0.114.1"), 6: ("fd99::77", "fd99:0:0:1::1")}[family]
    inside, outside = (DENIED, FOUND) if deny else (FOUND, DENIED)
    assert s.ask(at, near).result == inside
    assert s.ask(at, far).result == outside
    # Another service's ranges, and clients that have none.
    assert s.ask((VIP[family], 81), near).result == outside
    # Pods are held to them, too.
    assert s.ask(at, near, flags=INSIDE).result == inside
    assert s.ask(at, far, flags=INSIDE).result == outside


def test_the_other_family_is_in_no_range(s: Selection) -> None:
    """IPv4 addresses are mapped: ::/0 contains them, 0.0.0.0/0 no IPv6 address."""
    s.service(7, (VIP[6], 80), ONE[6], "SOURCE_RANGES")
    s.put("source_ranges", rows.SourceKey(32 + 96, 7, addr("0.0.0.0")))
    assert s.ask((VIP[6], 80), CLIENT[6]).result == DENIED


@both
def test_exempt_clients_see_the_address_as_it_is(s: Selection, family: int) -> None:
    cookie = 0x1122334455667788
    client = struct.pack("=QQ", cookie, 0)
    s.service(7, (VIP[family], 80), ONE[family], "EXEMPT")
    s.service(8, (VIP[family], 81), ONE[family])
    s.put("service_exempt", rows.ExemptKey(cookie, 7, 0))
    s.put("service_exempt", rows.ExemptKey(42, 7, 1))
    s.put("service_exempt", rows.ExemptKey(42, 8, 1))
    here, socket = (VIP[family], 80), INSIDE | SOCKET
    assert s.ask(here, client, flags=socket).result == NONE
    assert s.ask(here, struct.pack("=QQ", cookie + (1 << 32), 0), flags=socket).result == FOUND
    assert s.ask(here, POD[family], flags=INSIDE, endpoint=42).result == NONE
    assert s.ask(here, POD[family], flags=INSIDE, endpoint=43).result == FOUND
    assert s.ask(here, CLIENT[family], endpoint=42).result == FOUND
    # Without the flag nobody is exempt, apart from whole namespaces.
    assert s.ask((VIP[family], 81), POD[family], flags=INSIDE, endpoint=42).result == FOUND
    assert s.ask((VIP[family], 81), client, flags=socket).result == FOUND
    s.put("service_exempt", rows.ExemptKey(cookie, 0, 0))
    assert s.ask((VIP[family], 81), client, flags=socket).result == NONE


# -- backends


@both
def test_slots_are_chosen_evenly(s: Selection, family: int) -> None:
    s.service(7, (VIP[family], 80), BACKENDS[family])
    hits = spread(lambda _: s.ask((VIP[family], 80), CLIENT[family]).backend)
    assert_even(hits, 5)


@both
def test_a_lost_backend_costs_no_connection_while_others_are_there(s: Selection, family: int) -> None:
    s.service(7, (VIP[family], 80), BACKENDS[family])
    s.delete("backends", 3)
    answers = [s.ask((VIP[family], 80), CLIENT[family]) for _ in range(300)]
    # One of five is gone, four tries: 1 in 625 is refused. 300 ask; 12 refusals happen once in 10^13 runs.
    assert sum(a.result == REFUSE for a in answers) < 12
    assert {a.backend for a in answers if a.result == FOUND} == {1, 2, 4, 5}
    for n in (1, 2, 4, 5):
        s.delete("backends", n)
    assert s.ask((VIP[family], 80), CLIENT[family]).result == REFUSE


@both
def test_a_table_at_random(s: Selection, family: int) -> None:
    s.service(7, (VIP[family], 80), BACKENDS[family], "TABLE")
    s.table(7, [1, 1, 1, 2])
    hits = spread(lambda _: s.ask((VIP[family], 80), CLIENT[family]).backend)
    assert 3 * 1000 / 4 - 96 < hits[1] < 3 * 1000 / 4 + 96 and hits.keys() == {1, 2}  # seven deviations of 13.7


@both
def test_a_hashed_table_sends_a_connection_to_one_backend_and_connections_to_all(s: Selection, family: int) -> None:
    at = (VIP[family], 80)
    s.service(7, at, BACKENDS[family], "TABLE HASH")
    s.table(7, BACKENDS[family])

    def reached(port: int, client: str = CLIENT[family], flags: int = 0) -> int:
        return s.ask(at, client, client_port=port, flags=flags).backend

    first = [reached(port) for port in range(1000, 2000)]
    assert [reached(port) for port in range(1000, 2000)] == first
    assert_even(Counter(first), 5)
    near, base = {4: ("203.0.113.{}", 0), 6: ("fd99::{:x}", 0)}[family]
    assert_even(spread(lambda i: reached(40000, near.format(base + i)), 250), 5)
    # A socket has no port yet: it takes any.
    assert len({reached(40000, flags=INSIDE | SOCKET) for _ in range(100)}) == 5


@both
def test_all_nodes_of_a_cluster_hash_alike_and_clusters_do_not(s: Selection, object_file: Path, family: int) -> None:
    at = (VIP[family], 80)

    def slots(of: Selection) -> list[int]:
        of.service(7, at, BACKENDS[family], "TABLE HASH")
        of.table(7, BACKENDS[family])
        return [of.ask(at, CLIENT[family], client_port=port).slot for port in range(1000, 1100)]

    with BpfObject(object_file) as one, BpfObject(object_file) as two:
        assert slots(Selection(one)) == slots(s)
        assert sum(a == b for a, b in zip(slots(Selection(two, cfg_service_seed=5)), slots(s), strict=True)) < 5


@both
def test_the_hash_is_the_one_of_the_design(s: Selection, family: int) -> None:
    """Restated: what the nodes of a cluster must agree on, also between versions."""
    at, port = (VIP[family], 80), 40000
    s.service(7, at, BACKENDS[family], "TABLE HASH")
    s.table(7, BACKENDS[family])
    mask = (1 << 64) - 1
    ports = struct.pack(">HH", port, 80) + struct.pack("=I", TCP)
    state = 0
    for (word,) in struct.iter_unpack("<Q", addr(CLIENT[family]) + addr(VIP[family]) + ports):
        state = (state ^ word) * 0x9E3779B97F4A7C15 & mask
        state ^= state >> 32
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        state = (state ^ state >> 33) * factor & mask
    state = (state ^ state >> 33) & 0xFFFFFFFF
    assert s.ask(at, CLIENT[family], client_port=port).slot == state * TABLE_SIZE >> 32


@both
def test_a_table_that_lags_behind_is_followed_by_slots(s: Selection, family: int) -> None:
    at = (VIP[family], 80)
    s.service(7, at, ONE[family], "TABLE HASH")
    s.table(7, [99])
    assert {s.ask(at, CLIENT[family], client_port=p).backend for p in range(1000, 1050)} == {1}
    s.delete("service_tables", 7)
    assert s.ask(at, CLIENT[family]).backend == 1


@both
def test_a_kept_backend_holds_for_as_long_as_it_has_its_place(s: Selection, family: int) -> None:
    at = (VIP[family], 80)
    s.service(7, at, BACKENDS[family])
    kept = s.ask(at, CLIENT[family], kept=(3, 2))
    assert (kept.result, kept.to) == (FOUND, BACKENDS[family][3])
    assert s.ask(at, CLIENT[family], kept=(3, 1)).result == NONE
    s.service(7, at, ONE[family] | TWO[family])
    assert s.ask(at, CLIENT[family], kept=(3, 2)).result == NONE
    s.service(7, at, BACKENDS[family], "TABLE")
    s.table(7, [1, 2, 3, 4])
    assert s.ask(at, CLIENT[family], kept=(4, 1003)).result == FOUND
    assert s.ask(at, CLIENT[family], kept=(4, 1004)).result == NONE
    assert s.ask(at, CLIENT[family], kept=(4, TABLE_SIZE)).result == NONE
    s.delete("backends", 4)
    assert s.ask(at, CLIENT[family], kept=(4, 1003)).result == NONE


# -- affinity


@both
@pytest.mark.parametrize("flags", ["AFFINITY", "AFFINITY TABLE", "AFFINITY TABLE HASH"])
def test_a_client_keeps_its_backend(s: Selection, family: int, flags: str) -> None:
    at = (VIP[family], 80)
    s.service(7, at, BACKENDS[family], flags, affinity=3600)
    s.table(7, BACKENDS[family])
    near = {4: "203.0.113.{}", 6: "fd99::{:x}"}[family]

    def reached(i: int) -> int:
        (backend,) = {s.ask(at, near.format(i), client_port=p).backend for p in range(1000, 1005)}
        return backend

    assert_even(spread(reached, 200), 5)


@both
def test_affinity_ends_with_the_backend_and_with_time(s: Selection, family: int) -> None:
    at, client = (VIP[family], 80), CLIENT[family]
    s.service(7, at, BACKENDS[family], "AFFINITY", affinity=8)
    kept = s.ask(at, client).backend
    assert {s.ask(at, client).backend for _ in range(50)} == {kept}
    key = rows.AffinityKey(addr(client), 7, 0)
    other = kept % 5 + 1
    now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    # Another one is remembered, within and after its time.
    s.put("affinity", key, rows.Affinity(now - 2 * 10**9, other))
    assert {s.ask(at, client).backend for _ in range(50)} == {other}
    s.put("affinity", key, rows.Affinity(now - 9 * 10**9, other))
    anew = s.ask(at, client).backend
    assert {s.ask(at, client).backend for _ in range(50)} == {anew}
    # It doesn't take new connections any more, though its row is still there.
    s.delete("service_members", rows.MemberKey(7, anew))
    s.service(7, at, {n: b for n, b in BACKENDS[family].items() if n != anew}, "AFFINITY", affinity=8)
    last = s.ask(at, client).backend
    assert last != anew
    s.delete("backends", last)
    assert s.ask(at, client).backend != last


@both
def test_affinity_is_refreshed_but_not_for_every_packet(s: Selection, family: int) -> None:
    at, key = (VIP[family], 80), rows.AffinityKey(addr(CLIENT[family]), 7, 0)
    s.service(7, at, ONE[family], "AFFINITY", affinity=60)

    def used_after(age: float) -> float:
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        s.put("affinity", key, rows.Affinity(now - int(age * 1e9), 1))
        s.ask(at, CLIENT[family])
        (row,) = (v for _, v in s.maps["affinity"].items())
        return (now - int.from_bytes(row[:8], "little")) / 1e9

    assert used_after(0.5) == pytest.approx(0.5)
    assert used_after(5) == pytest.approx(0, abs=2)


@both
def test_sockets_have_the_affinity_of_their_namespace(s: Selection, family: int) -> None:
    at = (VIP[family], 80)
    s.service(7, at, BACKENDS[family], "AFFINITY", affinity=60)
    for cookie in range(1, 20):
        client = struct.pack("=QQ", cookie, 0)
        assert len({s.ask(at, client, flags=INSIDE | SOCKET).backend for _ in range(10)}) == 1
    assert all(int.from_bytes(k[20:24], "little") == 1 for k, _ in s.maps["affinity"].items())


def test_an_inner_table_of_another_size_is_not_taken(s: Selection) -> None:
    """All tables have the size that the programs were told."""
    with create_map(MapType.ARRAY, 4, 4, 251, 0, "service_table") as inner, pytest.raises(OSError):
        s.maps["service_tables"].update(struct.pack("=I", 7), struct.pack("=i", inner.fd))
