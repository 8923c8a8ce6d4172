"""Objects in memory, mirrored to SQLite in the same step, with a bounded history of changes for watches.

Durable against kill -9: every change is one committed transaction of a WAL database. The history isn't persisted, but
the version of each resource's last change is: after a restart a watch from that version or a later one goes on, an
older one gets 410 Gone.
"""

from __future__ import annotations

import asyncio
import sqlite3
from bisect import bisect_right
from collections.abc import Callable, Iterable
from pathlib import Path

from fimbria.lab.apiserver.model import Entry, Event, Key, Obj, decode, encode

SCHEMA = """
CREATE TABLE IF NOT EXISTS objects (
  resource TEXT, namespace TEXT, name TEXT, raw BLOB NOT NULL, PRIMARY KEY (resource, namespace, name)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS changed (resource TEXT PRIMARY KEY, rv INTEGER NOT NULL) WITHOUT ROWID;
"""

Fields = Callable[[Obj], dict[str, str]]
"""What of an object a field selector may ask for."""


class Expired(Exception):
    """The history no longer reaches back to the version asked for."""


class Shelf:
    """The objects of one resource and their recent changes. Only Store writes to it."""

    def __init__(self, resource: str, last_rv: int, history: int):
        self.resource = resource
        self.entries: dict[Key, Entry] = {}
        self.last_rv = last_rv
        self.floor = last_rv
        self._limit = history
        self._events: list[Event] = []
        self._sorted: list[Key] | None = None
        self._wakers: set[asyncio.Event] = set()

    def sorted_keys(self) -> list[Key]:
        if self._sorted is None:
            self._sorted = sorted(self.entries)
        return self._sorted

    def events_after(self, rv: int) -> list[Event]:
        """Changes after a version, oldest first. Raises Expired."""
        if rv < self.floor:
            raise Expired
        return self._events[bisect_right(self._events, rv, key=lambda event: event.rv) :]

    def snapshot(self, rv: int) -> dict[Key, Entry]:
        """The objects as they were at a version: later changes are undone. Not to be changed. Raises Expired."""
        later = self.events_after(rv)
        if not later:
            return self.entries
        state = dict(self.entries)
        for event in reversed(later):
            if event.old is None:
                state.pop(event.key, None)
            else:
                state[event.key] = event.old
        return state

    def subscribe(self) -> asyncio.Event:
        waker = asyncio.Event()
        self._wakers.add(waker)
        return waker

    def unsubscribe(self, waker: asyncio.Event) -> None:
        self._wakers.discard(waker)

    def load(self, key: Key, entry: Entry) -> None:
        self.entries[key] = entry
        self._sorted = None

    def record(self, event: Event) -> None:
        if event.new is None:
            del self.entries[event.key]
            self._sorted = None
        else:
            if event.old is None:
                self._sorted = None
            self.entries[event.key] = event.new
        self.last_rv = event.rv
        self._events.append(event)
        if len(self._events) >= 2 * self._limit:
            self.floor = self._events[self._limit - 1].rv
            del self._events[: self._limit]
        for waker in self._wakers:
            waker.set()


class Store:
    """All shelves and the one version counter. Synchronous: a step of the event loop is a transaction."""

    def __init__(self, path: Path | str, history: int = 10_000):
        self._db = sqlite3.connect(str(path), isolation_level=None, timeout=1)
        # what is in memory here must be what is in the file: nobody else may write it
        self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
        self._db.execute("PRAGMA journal_mode=WAL")
        # NORMAL survives the death of this process; only a power cut may cost the last changes, which a lab can bear.
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.executescript(SCHEMA)
        self._history = history
        self._shelves: dict[str, Shelf] = {}
        self._changed: dict[str, int] = dict(self._db.execute("SELECT resource, rv FROM changed"))
        self.rv = max(self._changed.values(), default=1)

    def close(self) -> None:
        self._db.close()

    def shelf(self, resource: str, fields: Fields) -> Shelf:
        """The shelf of a resource, read from the database at first use."""
        shelf = self._shelves.get(resource)
        if shelf is None:
            shelf = self._shelves[resource] = Shelf(resource, self._changed.get(resource, 0), self._history)
            query = "SELECT namespace, name, raw FROM objects WHERE resource = ?"
            for namespace, name, raw in self._db.execute(query, (resource,)):
                shelf.load(Key(namespace, name), make_entry(raw, decode(raw), fields))
        return shelf

    def write(self, shelf: Shelf, key: Key, obj: Obj, fields: Fields) -> Entry:
        """Creates or replaces one object at the next version."""
        rv = self.rv + 1
        obj["metadata"]["resourceVersion"] = str(rv)
        raw = encode(obj)
        entry = make_entry(raw, obj, fields)
        sql = "INSERT OR REPLACE INTO objects VALUES (?, ?, ?, ?)"
        self._commit(shelf, rv, sql, (shelf.resource, key.namespace, key.name, raw))
        shelf.record(Event(rv, key, shelf.entries.get(key), entry))
        return entry

    def remove(self, shelf: Shelf, key: Key) -> None:
        rv = self.rv + 1
        sql = "DELETE FROM objects WHERE resource = ? AND namespace = ? AND name = ?"
        self._commit(shelf, rv, sql, (shelf.resource, key.namespace, key.name))
        shelf.record(Event(rv, key, shelf.entries[key], None))

    def _commit(self, shelf: Shelf, rv: int, sql: str, values: Iterable[object]) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._db.execute(sql, tuple(values))
            self._db.execute("INSERT OR REPLACE INTO changed VALUES (?, ?)", (shelf.resource, rv))
            self._db.execute("COMMIT")
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self.rv = rv


def make_entry(raw: bytes, obj: Obj, fields: Fields) -> Entry:
    meta = obj["metadata"]
    return Entry(raw, int(meta["resourceVersion"]), meta.get("labels") or {}, fields(obj))
