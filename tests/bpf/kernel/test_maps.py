"""Maps of every kind: single operations, batches, dumps, and how they fail."""

from __future__ import annotations

import errno
import os
import struct

import pytest

from fimbria.kernel.bpf import (
    BpfError,
    BpfObject,
    Map,
    MapBtf,
    MapError,
    MapFlag,
    MapFull,
    MapType,
    UpdateFlag,
    create_map,
    possible_cpus,
    prog_test_run,
)


def u32(*numbers: int) -> bytes:
    return struct.pack(f"={len(numbers)}I", *numbers)


def test_single_operations() -> None:
    with create_map(MapType.HASH, 4, 4, 8, name="fim_single") as m:
        assert m.lookup(u32(1)) is None
        m.update(u32(1), u32(10))
        assert m.lookup(u32(1)) == u32(10)
        with pytest.raises(MapError, match="update map fim_single key 01000000") as caught:
            m.update(u32(1), u32(11), UpdateFlag.NOEXIST)
        assert caught.value.errno == errno.EEXIST
        assert m.delete(u32(1)) and not m.delete(u32(1))
        assert (m.info.type, m.info.max_entries, m.info.name) == (MapType.HASH, 8, "fim_single")


@pytest.mark.parametrize("operation", ["lookup", "delete"])
def test_keys_of_the_wrong_size_never_reach_the_kernel(operation: str) -> None:
    with (
        create_map(MapType.HASH, 4, 4, 8, name="fim_size") as m,
        pytest.raises(MapError, match="key of 3 bytes, not 4"),
    ):
        getattr(m, operation)(b"abc")


def test_batches_of_the_wrong_size_never_reach_the_kernel() -> None:
    with create_map(MapType.HASH, 4, 4, 8) as m:
        with pytest.raises(MapError, match="not 2 x 4"):
            m.update_batch(u32(1), u32(1, 2), 2)
        with pytest.raises(MapError, match="not 2 x 4"):
            m.delete_batch(u32(1), 2)
        m.update_batch(b"", b"", 0)
        assert m.delete_batch(b"", 0) == 0


@pytest.mark.parametrize("kind", [MapType.HASH, MapType.LRU_HASH, MapType.ARRAY])
@pytest.mark.parametrize("n", [1, 63, 64, 4096, 10_000])
def test_batches_and_dumps(kind: MapType, n: int) -> None:
    # An LRU map starts to evict well before it is full.
    with create_map(kind, 4, 8, n * 4 if kind == MapType.LRU_HASH else n) as m:
        keys, values = u32(*range(n)), struct.pack(f"={n}Q", *(i * 3 for i in range(n)))
        m.update_batch(keys, values, n)
        found_keys, found_values = m.dump()
        found = dict(zip(struct.unpack(f"={n}I", found_keys), struct.unpack(f"={n}Q", found_values), strict=True))
        assert found == {i: i * 3 for i in range(n)}
        if kind != MapType.ARRAY:
            assert m.delete_batch(keys, n) == n
            assert m.dump() == (b"", b"")


def test_lpm_trie() -> None:
    n = 5000
    rows = [(struct.pack("=I", 32) + struct.pack("!I", i), struct.pack("=I", i)) for i in range(n)]
    with create_map(MapType.LPM_TRIE, 8, 4, n + 1, MapFlag.NO_PREALLOC, "fim_lpm") as m:
        m.update_batch(b"".join(k for k, _ in rows), b"".join(v for _, v in rows), n)
        m.update(bytes(8), b"any!")
        assert dict(m.items()) == {**dict(rows), bytes(8): b"any!"}
        assert m.lookup(struct.pack("=I", 32) + b"\xff\xff\xff\xff") == b"any!"
        with pytest.raises(MapFull, match="the map is full"):
            m.update(struct.pack("=I", 24) + b"\x09\x09\x09\0", b"more")
        assert m.delete_batch(b"".join(k for k, _ in rows), n) == n
        assert list(m.items()) == [(bytes(8), b"any!")]


def test_per_cpu_values(loaded: BpfObject) -> None:
    with loaded.map("m_percpu") as m, loaded.program("cls_second") as program:
        assert m.slot_size == 8 * possible_cpus()
        prog_test_run(program.fd, bytes(12) + b"\x08\x00" + bytes(50), repeat=5)
        slot = m.lookup(u32(1))
        assert slot is not None
        assert sum(struct.unpack("=Q", v)[0] for v in m.split_percpu(slot)) == 5
        keys, values = m.dump()
        assert keys == u32(0, 1, 2, 3) and values[m.slot_size : 2 * m.slot_size] == slot


def test_per_cpu_hash_batches() -> None:
    with create_map(MapType.PERCPU_HASH, 4, 3, 16) as m:
        assert m.slot_size == 8 * possible_cpus()
        slot = b"".join(bytes([cpu] * 3) + bytes(5) for cpu in range(possible_cpus()))
        m.update_batch(u32(*range(10)), slot * 10, 10)
        assert dict(m.items())[u32(7)] == slot
        assert m.split_percpu(slot) == tuple(bytes([cpu] * 3) for cpu in range(possible_cpus()))


def test_a_full_map_says_so_and_how_far_it_got() -> None:
    with create_map(MapType.HASH, 4, 4, 100, name="fim_full") as m:
        with pytest.raises(MapFull) as caught:
            m.update_batch(u32(*range(150)), u32(*range(150)), 150)
        assert caught.value.done == 100
        assert caught.value.key == u32(100)
        assert "update_batch map fim_full key 64000000: the map is full" in str(caught.value)
        m.update(u32(5), u32(6))


def test_an_index_out_of_range_is_not_a_full_map() -> None:
    with create_map(MapType.ARRAY, 4, 4, 4) as m, pytest.raises(MapError) as caught:
        m.update(u32(4), u32(0))
    assert not isinstance(caught.value, MapFull)


def test_deleting_what_is_not_there() -> None:
    with create_map(MapType.HASH, 4, 4, 100) as m:
        m.update_batch(u32(1, 3, 5, 7), u32(0, 0, 0, 0), 4)
        assert m.delete_batch(u32(0, 1, 2, 3, 4), 5) == 2
        with pytest.raises(MapError) as caught:
            m.delete_batch(u32(5, 6, 7), 3, missing_ok=False)
        assert (caught.value.errno, caught.value.done, caught.value.key) == (errno.ENOENT, 1, u32(6))
        assert dict(m.items()) == {u32(7): u32(0)}


def test_deletion_one_by_one_where_there_are_no_batches() -> None:
    # Array maps of programs have no batch operations at all.
    with create_map(MapType.CGROUP_ARRAY, 4, 4, 4) as m:
        assert m.delete_batch(u32(0, 1), 2) == 0


def test_a_crowded_hash_is_dumped_whole() -> None:
    n = 200_000
    with create_map(MapType.HASH, 4, 4, n, MapFlag.NO_PREALLOC) as m:
        m.update_batch(u32(*range(n)), u32(*range(n)), n)
        keys, values = m.dump()
        assert keys == values and sorted(struct.unpack(f"={n}I", keys)) == list(range(n))


def test_maps_of_maps(loaded: BpfObject) -> None:
    with loaded.map("m_outer") as outer, loaded.program("cls_inner") as program:
        assert prog_test_run(program.fd, bytes(64)).retval == -1
        with create_map(MapType.HASH, 4, 4, 16, name="fim_inner") as inner:
            inner.update(u32(7), u32(1234))
            outer.update(u32(7), u32(inner.fd))
            inner_id = inner.info.id
        assert prog_test_run(program.fd, bytes(64)).retval == 1234
        assert list(outer.items()) == [(u32(7), u32(inner_id))]
        with Map.by_id(inner_id) as again:
            assert dict(again.items()) == {u32(7): u32(1234)}
        assert outer.delete(u32(7))


def test_an_outer_map_of_our_own() -> None:
    with (
        create_map(MapType.HASH, 4, 4, 16) as template,
        create_map(MapType.HASH_OF_MAPS, 4, 4, 4, inner=template) as outer,
        create_map(MapType.ARRAY, 4, 4, 16) as wrong,
    ):
        outer.update_batch(u32(1, 2), u32(template.fd, template.fd), 2)
        assert dict(outer.items()) == {u32(1): u32(template.info.id), u32(2): u32(template.info.id)}
        with pytest.raises(MapError) as caught:
            outer.update(u32(3), u32(wrong.fd))
        assert caught.value.errno == errno.EINVAL


def test_a_map_made_like_another_keeps_its_types(loaded: BpfObject) -> None:
    with loaded.map("m_hash") as like, MapBtf(like) as btf, create_map(MapType.HASH, 8, 8, 4, btf=btf) as m:
        assert m.info.btf_id == like.info.btf_id != 0
        assert m.info.btf_value_type_id == like.info.btf_value_type_id != 0
    with create_map(MapType.HASH, 8, 8, 4, name="fim_plain") as plain, pytest.raises(BpfError, match="BTF of map"):
        MapBtf(plain)


def test_a_frozen_map_stays_as_it_is() -> None:
    with create_map(MapType.ARRAY, 4, 4, 1) as m:
        m.freeze()
        with pytest.raises(MapError) as caught:
            m.update(u32(0), u32(1))
        assert caught.value.errno == errno.EPERM


def test_creation_that_fails_leaks_nothing() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(MapError, match="create map fim_bad"):
        create_map(MapType.HASH, 0, 4, 16, name="fim_bad")
    with pytest.raises(OSError, match="map info"), open("/dev/null", "rb") as f:
        Map(os.dup(f.fileno()))
    assert len(os.listdir("/proc/self/fd")) == before
