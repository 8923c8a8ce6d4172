"""Maps of arrays: their size is a setting, and a changed one is another map."""

import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fimbria.agent import datapath as dp
from fimbria.agent.config import AgentConfig
from fimbria.apply.programs import Datapath
from fimbria.apply.rows import Delta
from fimbria.kernel.bpf import Map
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
