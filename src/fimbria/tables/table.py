"""The change feed: tables of frozen rows, and loops that wake up for the rows that changed.

Rules
- One writer per table. Everything runs on one event loop, so a step without `await` sees a consistent snapshot of
  *all* tables; there are no locks, versions or transactions. Threads get a copy made by such a step.
- A row is never changed in place. Writing an equal row is not a change.
- Nothing is remembered about how a row came to be: a subscriber learns which keys to look at again, and a key that
  was added, changed and deleted in between is named once. What it looks like now is asked of the table.
- `synced` says that the source has delivered everything it knew at least once. Only then may absence mean "gone".
"""

import asyncio
from collections.abc import Callable, Hashable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from collections.abc import Set as AbstractSet
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Signal:
    """A wake-up that many tables share; set by writers, cleared by the one loop that drains."""

    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def set(self) -> None:
        self._event.set()

    def clear(self) -> None:
        self._event.clear()

    @property
    def is_set(self) -> bool:
        return self._event.is_set()

    async def wait(self) -> None:
        await self._event.wait()


class Subscription(Generic[K]):
    """The keys of one table that changed since the last `drain()`. Whenever there are any, its signal is set."""

    __slots__ = ("_keys", "_owns_signal", "_unsubscribe", "signal")

    def __init__(self, signal: Signal | None, unsubscribe: Callable[["Subscription[K]"], None]) -> None:
        self._keys: set[K] = set()
        self._owns_signal = signal is None
        self._unsubscribe = unsubscribe
        self.signal = signal or Signal()

    def __len__(self) -> int:
        return len(self._keys)

    def drain(self) -> set[K]:
        """Hand over the changed keys and start collecting anew."""
        keys, self._keys = self._keys, set()
        if self._owns_signal:
            self.signal.clear()
        return keys

    async def wait(self) -> None:
        """Return once there is something to drain (or the table became synced)."""
        await self.signal.wait()

    def close(self) -> None:
        self._unsubscribe(self)


class _Index(Generic[K, V]):
    __slots__ = ("entries", "of")

    def __init__(self, of: Callable[[V], Iterable[Hashable]]) -> None:
        self.of = of
        self.entries: dict[Hashable, set[K]] = {}

    def move(self, key: K, old: frozenset[Hashable], new: frozenset[Hashable]) -> None:
        for entry in old - new:
            keys = self.entries[entry]
            keys.remove(key)
            if not keys:
                del self.entries[entry]
        for entry in new - old:
            self.entries.setdefault(entry, set()).add(key)


_NOTHING: frozenset[Any] = frozenset()


class Table(Generic[K, V]):
    """A named dict of frozen rows with a revision, subscriptions and secondary indexes. `None` is not a row.

    `revision` grows by one for every row that really changed; it orders states of this table within one process.
    """

    __slots__ = ("_indexes", "_rows", "_subscriptions", "_synced", "name", "revision")

    def __init__(self, name: str) -> None:
        self.name = name
        self.revision = 0
        self._rows: dict[K, V] = {}
        self._subscriptions: tuple[Subscription[K], ...] = ()
        self._indexes: dict[str, _Index[K, V]] = {}
        self._synced = asyncio.Event()

    def __repr__(self) -> str:
        state = "synced" if self.synced else "not synced"
        return f"<Table {self.name}: {len(self._rows)} rows, revision {self.revision}, {state}>"

    # --- reading -----------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: object) -> bool:
        return key in self._rows

    def __getitem__(self, key: K) -> V:
        return self._rows[key]

    def __iter__(self) -> Iterator[K]:
        return iter(self._rows)

    def get(self, key: K) -> V | None:
        return self._rows.get(key)

    def keys(self) -> KeysView[K]:
        return self._rows.keys()

    def values(self) -> ValuesView[V]:
        return self._rows.values()

    def items(self) -> ItemsView[K, V]:
        """A live view: don't `await` while iterating it (a write in between raises RuntimeError)."""
        return self._rows.items()

    def by(self, index: str, entry: Hashable) -> AbstractSet[K]:
        """Keys of the rows that `index` files under `entry`: live, read-only, valid until the next write.

        Raises KeyError for an index that was never added.
        """
        return self._indexes[index].entries.get(entry, _NOTHING)

    def entries(self, index: str) -> KeysView[Hashable]:
        """Everything that `index` files at least one row under."""
        return self._indexes[index].entries.keys()

    # --- writing -----------------------------------------------------------------------------------------------

    def upsert(self, key: K, value: V) -> bool:
        """Set a row; False if it already was equal. An index function that raises leaves the table as it was."""
        old = self._rows.get(key)
        if old is value or old == value:
            return False
        if self._indexes:
            self._reindex(key, old, value)
        self._rows[key] = value
        self._changed(key)
        return True

    def delete(self, key: K) -> bool:
        """Remove a row; False if there was none."""
        old = self._rows.get(key)
        if old is None:
            return False
        if self._indexes:
            self._reindex(key, old, None)
        del self._rows[key]
        self._changed(key)
        return True

    def replace(self, rows: Mapping[K, V]) -> int:
        """Make the table equal to `rows` in one step, touching only what differs; returns how many rows did."""
        before = self.revision
        for key in [key for key in self._rows if key not in rows]:
            self.delete(key)
        for key, value in rows.items():
            self.upsert(key, value)
        return self.revision - before

    def _changed(self, key: K) -> None:
        self.revision += 1
        for subscription in self._subscriptions:
            keys = subscription._keys
            if not keys:
                subscription.signal.set()
            keys.add(key)

    # --- indexes -----------------------------------------------------------------------------------------------

    def add_index(self, name: str, of: Callable[[V], Iterable[Hashable]]) -> None:
        """File every row, present and future, under each of `of(row)`. `of` must be pure.

        Raises ValueError when the name is taken.
        """
        if name in self._indexes:
            raise ValueError(f"table {self.name} already has an index named {name}")
        index = _Index[K, V](of)
        for key, value in self._rows.items():
            index.move(key, _NOTHING, frozenset(of(value)))
        self._indexes[name] = index

    def _reindex(self, key: K, old: V | None, new: V | None) -> None:
        # All index functions run before the first index moves, so that one that raises changes nothing.
        moves = [
            (
                index,
                _NOTHING if old is None else frozenset(index.of(old)),
                _NOTHING if new is None else frozenset(index.of(new)),
            )
            for index in self._indexes.values()
        ]
        for index, before, after in moves:
            if before != after:
                index.move(key, before, after)

    # --- following ---------------------------------------------------------------------------------------------

    def subscribe(self, signal: Signal | None = None, *, initial: bool = True) -> Subscription[K]:
        """Collect changed keys from now on; with `initial` the rows that are already there count as changed."""
        subscription = Subscription[K](signal, self._unsubscribe)
        self._subscriptions = (*self._subscriptions, subscription)
        if initial and self._rows:
            subscription._keys.update(self._rows)
            subscription.signal.set()
        return subscription

    def _unsubscribe(self, subscription: Subscription[K]) -> None:
        self._subscriptions = tuple(s for s in self._subscriptions if s is not subscription)

    @property
    def synced(self) -> bool:
        return self._synced.is_set()

    def mark_synced(self) -> None:
        """The source has delivered everything once. Wakes subscribers: becoming complete is a change as well."""
        if not self.synced:
            self._synced.set()
            for subscription in self._subscriptions:
                subscription.signal.set()

    async def wait_synced(self) -> None:
        await self._synced.wait()


class Changes:
    """One loop's view of many tables: wait for any of them, then drain all of them in one step.

    Raises ValueError when two tables share a name, for `drain()` answers by name.
    """

    __slots__ = ("_subscriptions", "_tables", "signal")

    def __init__(self, tables: Iterable[Table[Any, Any]], *, initial: bool = True) -> None:
        self.signal = Signal()
        self._tables: tuple[Table[Any, Any], ...] = tuple(tables)
        names = [table.name for table in self._tables]
        if len(set(names)) != len(names):
            raise ValueError(f"tables with the same name can't be told apart: {', '.join(sorted(names))}")
        self._subscriptions = {table.name: table.subscribe(self.signal, initial=initial) for table in self._tables}

    async def wait(self) -> None:
        """Return once any table has a change to drain or became synced. May wake up for nothing; never too late."""
        await self.signal.wait()

    def drain(self) -> dict[str, set[Any]]:
        """Changed keys by table name (only tables with any). No await: all tables are seen at the same instant."""
        self.signal.clear()
        return {name: s.drain() for name, s in self._subscriptions.items() if len(s)}

    @property
    def synced(self) -> bool:
        return all(table.synced for table in self._tables)

    async def wait_synced(self) -> None:
        for table in self._tables:
            await table.wait_synced()

    def close(self) -> None:
        for subscription in self._subscriptions.values():
            subscription.close()
