"""How large the tables are that traffic fills: a share of the machine's memory. Pure.

All are LRU tables of one list, which take their memory when they are made. Their sizes keep the same ratio to each
other on every machine, and grow in steps, so that a little more or less memory at the next boot makes no other tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple


class Table(NamedTuple):
    """Entries for each unit, and what one costs: key, value, and 64 of the kernel's own."""

    weight: int
    entry_bytes: int


TABLES: Final[Mapping[str, Table]] = {
    "conntrack": Table(8, 168),
    "nat": Table(4, 160),
    "affinity": Table(4, 104),
    "sock_revnat": Table(4, 120),
    "sock_choices": Table(1, 88),
}
STEP: Final = 4096
# The smallest node has 131,072 connections, the largest 16 million.
LEAST: Final = 16384
MOST: Final = 1 << 21
_UNIT_BYTES: Final = sum(t.weight * t.entry_bytes for t in TABLES.values())


def by_memory(memory: int, ratio: float) -> dict[str, int]:
    """Entries by table, for a machine with `memory` bytes of which they get the share `ratio`."""
    units = int(memory * ratio / _UNIT_BYTES) // STEP * STEP
    units = min(max(units, LEAST), MOST)
    return {name: table.weight * units for name, table in TABLES.items()}


def entries(wanted: Mapping[str, int], memory: int, ratio: float, existing: Mapping[str, int]) -> dict[str, int]:
    """Entries by table. `wanted` has explicit numbers, 0 for none: what is said counts, even if it is less.

    Otherwise memory decides, but a table that exists isn't made smaller: what it holds would not fit.
    """
    sized = by_memory(memory, ratio)
    return {name: wanted.get(name) or max(sized[name], existing.get(name, 0)) for name in TABLES}
