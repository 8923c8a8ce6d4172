"""Maps of arrays: their size is a setting, and a changed one is another map."""

import struct
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from fimbria.agent import datapath as dp
from fimbria.agent.config import AgentConfig
from fimbria.apply import programs
from fimbria.apply.programs import Datapath
from fimbria.apply.rows import Delta
from fimbria.kernel.bpf import Map, MapError
from fimbria.model.address import pack
from fimbria.model.network import DeviceSet
from fimbria.model.rows import NO_ADDR, Backend
from fimbria.model.service import TableContent

SMALL = {"frontends": 16, "service_slots": 16, "backends": 16, "ipcache": 16}


@pytest.fixture
def bpffs(tmp_path: Path) -> Iterator[Path]:
    found = tmp_path / "bpffs"
    found.mkdir()
    subprocess.run(["mount", "-t", "bpf", "bpf", str(found)], check=True)
    yield found
    subprocess.run(["umount", "-l", str(found)], check=True)


def loaded(bpffs: Path, size: int) -> tuple[Datapath, AgentConfig]:
    config = AgentConfig(node_name="n", maglev_table_size=size)
    devices = DeviceSet(0, bytes(6), 0, (), 1500, 1450)
    datapath = Datapath(bpffs, dp.objects_folder(), SMALL, dp.Layouts().of_map, dp.arrays(config), names=("socket",))
    datapath.load(dp.constants(config, devices, (NO_ADDR,) * 2, (NO_ADDR,) * 2))
    return datapath, config


def tables(bpffs: Path) -> list[str]:
    return sorted(p.name for p in (bpffs / "fimbria/maps").glob("service_tables-*"))


def test_another_table_size_is_another_map_next_to_the_old_one(bpffs: Path) -> None:
    row = TableContent(((1, 1),))
    for size in (1021, 251):
        datapath, config = loaded(bpffs, size)
        target = dp.tables_target(datapath, config, {1: Backend(pack("10.0.0.1"), 80, 6)}.get)
        assert target.read() == {}
        assert target.write(Delta({7: row}), order="in") == {}
        assert target.read() == {7: row}
        raw = datapath.maps["service_tables"].lookup(struct.pack("=I", 7))
        assert raw is not None
        with Map.by_id(int.from_bytes(raw, "little")) as inner:
            assert inner.max_entries == size
        again, _ = loaded(bpffs, size)
        assert again.maps["service_tables"].info.id == datapath.maps["service_tables"].info.id
    assert len(tables(bpffs)) == 2
    datapath.sweep()
    assert len(tables(bpffs)) == 1


def version(bpffs: Path, entries: int, expires: Mapping[str, int] | None = None) -> Datapath:
    """As an agent with this size of its tables of connections loads it."""
    config = AgentConfig(node_name="n")
    sizes = {**SMALL, "conntrack": entries, "nat": entries, "affinity": entries}
    datapath = Datapath(
        bpffs, dp.objects_folder(), sizes, LAYOUTS.of_map, dp.arrays(config), names=("pod",), expires=expires
    )
    datapath.load(dp.constants(config, DeviceSet(0, bytes(6), 0, (), 1500, 1450), (NO_ADDR,) * 2, (NO_ADDR,) * 2))
    return datapath


LAYOUTS = dp.Layouts()
TABLES = ("conntrack", "nat", "affinity")


def looked_into(datapath: Datapath, name: str = "conntrack") -> list[int]:
    """The tables in which programs of all versions look for what theirs lacks."""
    array = datapath.maps[f"{name}_other"]
    found = [array.lookup(struct.pack("=I", place)) for place in range(array.max_entries)]
    return [int.from_bytes(raw, "little") for raw in found if raw]


def learn(datapath: Datapath, number: int, value: int, names: tuple[str, ...] = TABLES) -> None:
    for name in names:
        table = datapath.maps[name]
        table.update(number.to_bytes(table.key_size, "little"), value.to_bytes(table.value_size, "little"))


def learned(datapath: Datapath, name: str) -> dict[int, int]:
    items = datapath.maps[name].items()
    return {int.from_bytes(k, "little"): int.from_bytes(v, "little") for k, v in items}


def test_versions_with_other_sizes_look_into_each_others_tables_until_the_sweep(bpffs: Path) -> None:
    former = version(bpffs, 1024)
    assert looked_into(former) == looked_into(former, "nat") == []
    new = version(bpffs, 2048)
    assert new.maps["conntrack_other"].info.id == former.maps["conntrack_other"].info.id
    for name in ("conntrack", "nat"):
        assert looked_into(former, name) == [former.maps[name].info.id, new.maps[name].info.id]
    new.sweep()
    assert looked_into(new) == looked_into(new, "nat") == []
    assert len(list((bpffs / "fimbria/maps").glob("conntrack-*"))) == 1
    assert looked_into(version(bpffs, 2048)) == []


def test_what_an_agent_left_that_died_in_between(bpffs: Path) -> None:
    first, died = version(bpffs, 1024), version(bpffs, 2048)
    third = version(bpffs, 4096)
    ids = [v.maps["conntrack"].info.id for v in (died, first, third)]
    assert looked_into(third) == ids, "the newest first"
    back = version(bpffs, 1024)
    assert back.maps["conntrack"].info.id == ids[1]
    assert looked_into(back) == [ids[2], ids[0], ids[1]]
    back.sweep()
    assert looked_into(back) == looked_into(first) == []


def test_learned_tables_are_carried_over_and_the_younger_row_stays(bpffs: Path) -> None:
    former = version(bpffs, 1024)
    learn(former, 1, 10)
    new = version(bpffs, 2048)
    new.carry_over()
    assert learned(new, "affinity") == {1: 10}
    assert learned(new, "conntrack") == learned(new, "nat") == {}, "found in the former one, and may still change there"
    learn(new, 1, 11)
    learn(former, 2, 20)
    new.carry_over()
    assert learned(new, "affinity") == {1: 11, 2: 20}
    # By a program that was in the middle of its work when it was replaced.
    learn(former, 3, 30)
    new.sweep()
    assert {n: learned(new, n) for n in TABLES} == {n: {1: 11, 2: 20, 3: 30} for n in TABLES}


def test_without_places_tables_are_carried_over_at_once(bpffs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(array: Map, *_: object) -> None:
        raise MapError(12, "update", array.name)

    former = version(bpffs, 1024)
    learn(former, 1, 10)
    monkeypatch.setattr(programs, "_set_place", refuse)
    new = version(bpffs, 2048)
    new.carry_over()
    assert {n: learned(new, n) for n in TABLES} == {n: {1: 10} for n in TABLES}


def test_what_is_over_stays_behind(bpffs: Path) -> None:
    """The stamp of these rows is their number."""
    now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    former = version(bpffs, 4096)
    for number, stamp in ((1, 10), (2, now + 3600 * 10**9), (3, now - 1)):
        learn(former, number, stamp, ("conntrack",))
    new = version(bpffs, 2048, expires={"conntrack": 0})
    learn(new, 4, 40, ("conntrack",))
    new.sweep()
    assert set(learned(new, "conntrack")) == {2, 4}


def test_more_rows_than_one_step_takes_are_carried_over(bpffs: Path) -> None:
    former = version(bpffs, 65536)
    table = former.maps["conntrack"]
    keys = b"".join(n.to_bytes(table.key_size, "little") for n in range(20_000))
    table.update_batch(keys, bytes(20_000 * table.value_size), 20_000)
    new = version(bpffs, 131072)
    learn(new, 5, 55, ("conntrack",))
    new.sweep()
    assert learned(new, "conntrack") == dict.fromkeys(range(20_000), 0) | {5: 55}
