"""Maglev tables in real maps: created, changed in place, taken over, and when the kernel refuses."""

import struct
from collections.abc import Iterator

import pytest

from fimbria.apply.rows import Delta, compare
from fimbria.apply.service_tables import ForeignTable, ServiceTablesTarget
from fimbria.compute import maglev
from fimbria.kernel.bpf import Map, MapFlag, MapType, create_map
from fimbria.model.address import pack
from fimbria.model.rows import Backend
from fimbria.model.service import TableContent

SIZE = 1021
SERVICES = 3
BACKENDS = {n: Backend(pack(f"10.0.0.{n}"), 80, 6) for n in range(1, 50)}


@pytest.fixture
def outer() -> Iterator[Map]:
    with create_map(MapType.ARRAY, 4, 4, SIZE, MapFlag.MMAPABLE) as template:
        found = create_map(MapType.HASH_OF_MAPS, 4, 4, SERVICES, MapFlag.NO_PREALLOC, "tables", inner=template)
    yield found
    found.close()


@pytest.fixture
def target(outer: Map) -> ServiceTablesTarget:
    return ServiceTablesTarget(outer, SIZE, BACKENDS.get)


def content(*backends: int, weight: int = 1) -> TableContent:
    return TableContent(tuple((b, weight) for b in backends))


def write(target: ServiceTablesTarget, rows: dict[int, TableContent]) -> dict[int, str]:
    return dict(target.write(Delta(rows), order="in"))


def inner_id(outer: Map, service: int) -> int:
    raw = outer.lookup(struct.pack("=I", service))
    assert raw is not None
    return int(struct.unpack("=I", raw)[0])


def entries(outer: Map, service: int) -> list[int]:
    with Map.by_id(inner_id(outer, service)) as inner:
        return [struct.unpack("=I", inner.lookup(struct.pack("=I", i)) or b"")[0] for i in range(SIZE)]


def expected(row: TableContent) -> list[int]:
    known = [(b, w, BACKENDS[b]) for b, w in row.backends if b in BACKENDS]
    return maglev.fill([maglev.TableMember(b, w, r.addr, r.port, r.proto) for b, w, r in known], SIZE)


def test_what_is_written_is_the_reference_table_and_is_read_back(target: ServiceTablesTarget, outer: Map) -> None:
    want = {1: content(1, 2, 3), 7: TableContent(((4, 3), (5, 1)))}
    assert write(target, want) == {}
    assert target.read() == want
    assert entries(outer, 1) == expected(want[1])
    assert entries(outer, 7) == expected(want[7])
    assert target.write(Delta(deletes=frozenset((1, 99))), order="out") == {}
    assert target.read() == {7: want[7]}


def test_a_change_is_made_in_place_and_only_where_it_differs(target: ServiceTablesTarget, outer: Map) -> None:
    write(target, {1: content(*range(1, 11))})
    before, table = inner_id(outer, 1), entries(outer, 1)
    assert write(target, {1: content(*range(1, 10))}) == {}
    assert inner_id(outer, 1) == before
    assert entries(outer, 1) == expected(content(*range(1, 10)))
    assert target.amended == sum(a != b for a, b in zip(table, entries(outer, 1), strict=True)) < SIZE // 5
    assert target.read() == {1: content(*range(1, 10))}


def test_a_restarted_agent_finds_its_tables_right_and_writes_nothing(target: ServiceTablesTarget, outer: Map) -> None:
    want = {1: content(1, 2), 2: content(3)}
    write(target, want)
    again = ServiceTablesTarget(outer, SIZE, BACKENDS.get)
    ids = [inner_id(outer, s) for s in (1, 2)]
    assert write(again, dict(compare(want, again.read()).upserts)) == {}
    assert (again.created, again.amended) == (0, 0)
    assert [inner_id(outer, s) for s in (1, 2)] == ids
    assert compare(want, again.read()) == Delta()


def test_what_others_change_is_found_and_repaired(target: ServiceTablesTarget, outer: Map) -> None:
    want = {1: content(1, 2), 2: content(3)}
    write(target, want)
    with Map.by_id(inner_id(outer, 1)) as inner:
        inner.update(struct.pack("=I", 5), struct.pack("=I", 49))  # programs see memory and map as one
    found = target.read()
    assert isinstance(found[1], ForeignTable)
    assert found[2] == want[2]
    assert write(target, {1: want[1]}) == {}
    assert target.amended == 1
    assert target.read() == want


def test_a_full_map_names_the_service_and_serves_the_others(target: ServiceTablesTarget) -> None:
    failures = write(target, {n: content(1) for n in range(1, SERVICES + 2)})
    assert len(failures) == 1
    number, reason = failures.popitem()
    assert f"service {number}" in reason
    assert "full" in reason
    assert len(target.read()) == SERVICES


def test_a_member_without_a_row_is_left_out(target: ServiceTablesTarget, outer: Map) -> None:
    assert write(target, {1: content(1, 1000)}) == {}
    assert set(entries(outer, 1)) == {1}


def test_many_tables_go_in_by_batches(outer: Map) -> None:
    with create_map(MapType.ARRAY, 4, 4, SIZE, MapFlag.MMAPABLE) as template:
        large = create_map(MapType.HASH_OF_MAPS, 4, 4, 600, MapFlag.NO_PREALLOC, "tables", inner=template)
    with large:
        target = ServiceTablesTarget(large, SIZE, BACKENDS.get)
        want = {n: content(1 + n % 40, 41) for n in range(1, 601)}
        assert write(target, want) == {}
        assert target.read() == want
