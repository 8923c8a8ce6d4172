"""Sizes of the tables that traffic fills."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from fimbria.agent import datapath as dp
from fimbria.agent.config import AgentConfig
from fimbria.learned.sizing import TABLES, by_memory, entries

GIB = 1 << 30
RATIO = 0.0025
LEAST: Mapping[str, int] = {
    "conntrack": 131072, "nat": 65536, "affinity": 65536, "sock_revnat": 65536, "sock_choices": 16384,
}  # fmt: skip


@pytest.mark.parametrize(("gib", "conntrack"), [(0.5, 131072), (24, 163840), (64, 458752), (512, 3702784)])
def test_memory_decides_within_limits(gib: float, conntrack: int) -> None:
    sized = by_memory(int(gib * GIB), RATIO)
    assert sized["conntrack"] == conntrack
    assert {name: n * LEAST["conntrack"] // conntrack for name, n in sized.items()} == LEAST


def test_they_stay_within_their_share_of_memory() -> None:
    for gib in (64, 100, 1000):
        used = sum(TABLES[name].entry_bytes * n for name, n in by_memory(gib * GIB, RATIO).items())
        assert 0.85 * RATIO < used / (gib * GIB) <= RATIO


def test_the_largest_machine_has_sixteen_million_connections() -> None:
    assert by_memory(64 << 40, RATIO)["conntrack"] == 1 << 24


def test_a_little_memory_more_or_less_makes_no_other_tables() -> None:
    assert by_memory(64 * GIB, RATIO) == by_memory(64 * GIB - (300 << 20), RATIO)


def test_what_exists_is_not_made_smaller_unless_told() -> None:
    existing = {"conntrack": 500000, "nat": 70}
    assert entries({}, 16 * GIB, RATIO, existing) == LEAST | {"conntrack": 500000}
    assert entries({"conntrack": 1000}, 16 * GIB, RATIO, existing) == LEAST | {"conntrack": 1000}


def test_settings_reach_the_maps() -> None:
    sized = dp.sizes(AgentConfig(nat_entries=4000, socket_entries=800), 16 * GIB, {"affinity": 90000})
    assert (sized["nat"], sized["sock_revnat"], sized["sock_choices"]) == (4000, 800, 200)
    assert (sized["affinity"], sized["conntrack"]) == (90000, 131072)


def test_existing_sizes_come_from_the_pins(tmp_path: Path) -> None:
    maps = tmp_path / "fimbria" / "maps"
    maps.mkdir(parents=True)
    for name in ("conntrack-0123456789ab-131072", "conntrack-aaaaaaaaaaaa-262144", "nat-0123456789ab-65536", "odd"):
        (maps / name).touch()
    assert dp.existing_entries(tmp_path) == {"conntrack": 262144, "nat": 65536}
    assert dp.existing_entries(tmp_path / "none") == {}
