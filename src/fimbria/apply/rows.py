"""What the kernel should hold: desired rows of one target, and which of them have not been written yet.

Rules
- Compute writes desired rows with `put` and `drop`; nobody else does. Writing an equal row is not a change.
- `dirty` are the keys to bring to the kernel next; a key stays in `failed` with its reason until writing it worked.
- A row's `dirty` mark is taken off *before* it is written: a change that arrives meanwhile marks it again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Delta(Generic[K, V]):
    """What to write to one target."""

    upserts: Mapping[K, V] = field(default_factory=dict)
    deletes: frozenset[K] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.upserts or self.deletes)

    def __len__(self) -> int:
        return len(self.upserts) + len(self.deletes)


class Rows(Generic[K, V]):
    """Desired rows of one target."""

    __slots__ = ("desired", "dirty", "failed", "name", "on_change")

    def __init__(self, name: str) -> None:
        self.name = name
        self.desired: dict[K, V] = {}
        self.dirty: set[K] = set()
        self.failed: dict[K, str] = {}
        self.on_change: Callable[[], None] = _ignore

    def put(self, key: K, row: V) -> bool:
        """Want `row` under `key`; False if that is what was wanted already."""
        if self.desired.get(key) == row:
            return False
        self.desired[key] = row
        self._mark(key)
        return True

    def drop(self, key: K) -> bool:
        """Want nothing under `key`; False if nothing was wanted already."""
        if self.desired.pop(key, None) is None:
            return False
        self._mark(key)
        return True

    def put_many(self, rows: Mapping[K, V]) -> None:
        """`put` each."""
        desired = self.desired
        changed = [key for key, row in rows.items() if desired.get(key) != row]
        if changed:
            desired.update(rows)
            self.dirty.update(changed)
            self.on_change()

    def drop_many(self, keys: Iterable[K]) -> None:
        """`drop` each."""
        changed = [key for key in keys if self.desired.pop(key, None) is not None]
        if changed:
            self.dirty.update(changed)
            self.on_change()

    def touch_all(self) -> None:
        """Write all rows again although they did not change."""
        self.dirty.update(self.desired)
        self.on_change()

    def take(self) -> Delta[K, V]:
        """Hand over what is dirty; from now on new changes collect anew."""
        dirty, self.dirty = self.dirty, set()
        desired = self.desired
        upserts = {k: row for k in dirty if (row := desired.get(k)) is not None}
        deletes = frozenset(dirty - upserts.keys()) if len(upserts) < len(dirty) else frozenset[K]()
        return Delta(upserts, deletes)

    def take_keys(self) -> set[K]:
        """`take` for whoever compares all rows anyway: the keys alone."""
        dirty, self.dirty = self.dirty, set()
        return dirty

    def settle(self, delta: Delta[K, V], failures: Mapping[K, str]) -> None:
        """Record the outcome of writing a delta."""
        if self.failed:
            for key in (*delta.upserts, *delta.deletes):
                self.failed.pop(key, None)
        self.failed.update(failures)

    def _mark(self, key: K) -> None:
        self.dirty.add(key)
        self.on_change()


def compare(desired: Mapping[K, V], actual: Mapping[K, V]) -> Delta[K, V]:
    """What turns `actual` into `desired`: rows that are missing or differ, and orphans."""
    if not actual:
        return Delta(dict(desired), frozenset())
    upserts = {k: v for k, v in desired.items() if actual.get(k) != v} if actual else dict(desired)
    return Delta(upserts, frozenset(k for k in actual if k not in desired))


def _ignore() -> None:
    return None
