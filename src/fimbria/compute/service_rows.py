"""The maps of Services, and changes of their rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

BACKENDS: Final = "backends"
MEMBERS: Final = "service_members"
RANGES: Final = "source_ranges"
TABLES: Final = "service_tables"
SLOTS: Final = "service_slots"
FRONTENDS: Final = "frontends"
MAPS: Final = (BACKENDS, MEMBERS, RANGES, TABLES, SLOTS, FRONTENDS)
"""References first: the order in which rows are written. Rows of service_tables are TableContent, not what the kernel
holds."""

BackendKey = tuple[bytes, int, int]  # address, port, protocol


def no_rows() -> dict[str, dict[Any, Any]]:
    """All maps, empty."""
    return {name: {} for name in MAPS}


def _no_keys() -> dict[str, set[Any]]:
    return {name: set() for name in MAPS}


@dataclass(slots=True)
class Delta:
    """Changed rows by map name. No key is both in `upserts` and in `deletes` of a map."""

    upserts: dict[str, dict[Any, Any]] = field(default_factory=no_rows)
    deletes: dict[str, set[Any]] = field(default_factory=_no_keys)

    def __bool__(self) -> bool:
        return any(self.upserts.values()) or any(self.deletes.values())

    def __len__(self) -> int:
        return sum(map(len, self.upserts.values())) + sum(map(len, self.deletes.values()))

    def put(self, name: str, key: Any, row: Any) -> None:
        """Want a row."""
        self.upserts[name][key] = row
        self.deletes[name].discard(key)

    def drop(self, name: str, key: Any) -> None:
        """Want none."""
        self.deletes[name].add(key)
        self.upserts[name].pop(key, None)

    def merge(self, later: Delta) -> None:
        """Add what changed after this."""
        for name, rows in later.upserts.items():
            self.upserts[name].update(rows)
            self.deletes[name] -= rows.keys()
        for name, keys in later.deletes.items():
            self.deletes[name] |= keys
            for key in keys:
                self.upserts[name].pop(key, None)
