"""Maglev tables in the kernel: an outer map from a service's number to an array of backend ids.

Rules
1. A connection reads one entry, and each entry is written in one piece. So a table that is there is changed in place,
   entry by entry, and only where it differs: every connection sees the old backend or the new one, both of which exist
   (new backends are written before, old ones removed after).
2. A table that isn't there is filled before it goes into the outer map, all new ones by one batch.
3. What a table holds is compared with what was written by a digest; nobody keeps the entries. After a restart every
   table is computed once and compared with the kernel's.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from fimbria.apply.maps import U32
from fimbria.apply.outer import OPEN_AT_ONCE, put_all, remove_all
from fimbria.apply.rows import Delta
from fimbria.compute.maglev import TableMember, in_order
from fimbria.kernel import maglev
from fimbria.kernel.bpf import BpfError, Map, MapError, MapFlag, MapType, array_map, array_memory
from fimbria.model.rows import Backend
from fimbria.model.service import TableContent


@dataclass(frozen=True, slots=True)
class ForeignTable:
    """A table that isn't known to be what was wanted."""

    digest: str


@dataclass(frozen=True, slots=True)
class _Written:
    content: TableContent
    digest: bytes


class ServiceTablesTarget:
    """Tables by service id. `created` counts tables, `amended` entries written in place.

    `backend(id)` gives the row of a backend that is wanted. A member without one is left out: its service is about to
    change, and its table with it.
    """

    name = "service_tables"

    def __init__(self, outer: Map, size: int, backend: Callable[[int], Backend | None]) -> None:
        """`size`: entries of every table, one of `compute.maglev.TABLE_SIZES`."""
        self._outer = outer
        self._size = size
        self._backend = backend
        self._written: dict[int, _Written] = {}
        self.created = 0
        self.amended = 0

    def read(self) -> dict[int, TableContent | ForeignTable]:
        """What each table was made from, as far as it is still what this process wrote."""
        found: dict[int, TableContent | ForeignTable] = {}
        for number, map_id in self._inner_ids().items():
            with suppress(BpfError), Map.by_id(map_id) as inner:
                with array_memory(inner) as numbers:
                    digest = _digest(numbers.tobytes())
                known = self._written.get(number)
                found[number] = known.content if known and known.digest == digest else ForeignTable(digest.hex())
        return found

    def entries(self) -> dict[int, list[int]]:
        """The backend ids of every table, as they are in the kernel."""
        found: dict[int, list[int]] = {}
        for number, map_id in self._inner_ids().items():
            with suppress(BpfError), Map.by_id(map_id) as inner, array_memory(inner) as numbers:
                found[number] = numbers.tolist()
        return found

    def write(self, delta: Delta[int, TableContent], *, order: str) -> Mapping[int, str]:
        """Create, change or remove tables."""
        if order == "in":
            return self._upsert(list(delta.upserts.items()))
        if order == "out" and delta.deletes:
            return self._remove(list(delta.deletes))
        return {}

    def _upsert(self, rows: Sequence[tuple[int, TableContent]]) -> dict[int, str]:
        failures: dict[int, str] = {}
        there = self._inner_ids(n for n, _ in rows)
        new = []
        for number, content in rows:
            if number not in there or not self._amend(number, there[number], content):
                new.append((number, content))
        for at in range(0, len(new), OPEN_AT_ONCE):
            failures |= self._create(new[at : at + OPEN_AT_ONCE])
        return failures

    def _inner_ids(self, wanted: Iterable[int] | None = None) -> dict[int, int]:
        if wanted is None:
            return dict(zip(*map(U32().decode_many, self._outer.dump()), strict=True))
        found = ((n, self._outer.lookup(struct.pack("=I", n))) for n in wanted)
        return {n: int.from_bytes(raw, sys.byteorder) for n, raw in found if raw is not None}

    def _table(self, content: TableContent) -> bytes:
        rows = ((number, weight, self._backend(number)) for number, weight in content.backends)
        members = [TableMember(n, weight, row.addr, row.port, row.proto) for n, weight, row in rows if row is not None]
        return maglev.fill(in_order(members), self._size)

    # --- in place ----------------------------------------------------------------------------------------------------

    def _amend(self, number: int, map_id: int, content: TableContent) -> bool:
        """False if there is no table of the right kind to change, or it can't be changed."""
        table = self._table(content)
        try:
            with Map.by_id(map_id) as inner:
                if inner.info.layout != (MapType.ARRAY, 4, 4, self._size, MapFlag.MMAPABLE):
                    return False
                with array_memory(inner) as numbers:
                    changed = _change(numbers, table)
        except BpfError:
            return False
        self.amended += changed
        self._written[number] = _Written(content, _digest(table))
        return True

    # --- whole -------------------------------------------------------------------------------------------------------

    def _create(self, rows: Sequence[tuple[int, TableContent]]) -> dict[int, str]:
        failures: dict[int, str] = {}
        with ExitStack() as stack:
            made: dict[int, Map] = {}
            written: dict[int, _Written] = {}
            for number, content in rows:
                table = self._table(content)
                try:
                    inner = stack.enter_context(array_map(self._size, f"table_{number}"))
                    with array_memory(inner) as entries:
                        entries[:] = memoryview(table).cast("I")
                    made[number], written[number] = inner, _Written(content, _digest(table))
                except MapError as error:
                    failures[number] = _explain(number, error)
            failures |= put_all(self._outer, made, _explain)
        there = written.keys() - failures.keys()
        self._written.update((number, written[number]) for number in there)
        self.created += len(there)
        return failures

    def _remove(self, numbers: list[int]) -> dict[int, str]:
        for number in numbers:
            self._written.pop(number, None)
        return remove_all(self._outer, numbers, _explain)


def _change(numbers: memoryview, table: bytes) -> int:
    """Write the entries that differ; returns how many."""
    if numbers.tobytes() == table:
        return 0
    now = numbers.tolist()
    changed = [
        (i, new) for i, (old, new) in enumerate(zip(now, memoryview(table).cast("I"), strict=True)) if old != new
    ]
    for index, new in changed:
        numbers[index] = new
    return len(changed)


def _digest(table: bytes) -> bytes:
    return hashlib.blake2b(table, digest_size=16).digest()


def _explain(number: int, error: MapError) -> str:
    return f"Maglev table of service {number}: {error}; connections go by the table before, if there is one"
