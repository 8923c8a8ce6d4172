"""Which CiliumEndpointSlice holds which endpoint, and what to write next. Pure: the caller does the requests, tells
what came of them, and says what time it is (monotonic seconds). An endpoint's value is opaque here.

Rules
1. Every endpoint has one home, a slice of its namespace, from the moment it is known. A new one goes into the first
   slice (by age here) that has room for it; without one a slice is made. It stays where it is until rule 7.
2. Nothing is decided before all endpoints and all slices have been seen once (`start`). Whoever is in a slice then has
   its home there; of several, in the fullest. So a new leader goes on where the former one stopped.
3. What a slice should hold are those whose home it is, and of those that it holds already whoever has a home elsewhere
   but isn't there yet. So a move writes the new home first, and no endpoint is in no slice while it moves.
4. A slice is written only if it differs from what is known to be stored, as a whole, with the resourceVersion of that
   as a precondition: what others wrote in between is never overwritten unseen. Who is refused tells what is stored
   now (`on_slice`), and it is judged again. Foreign edits and deletions are thus put right, whole foreign slices taken
   over and emptied, slices without endpoints deleted.
5. The first change of a slice that was at rest waits `settle` seconds for others, then a slice is written once in
   `interval`; slices of namespaces with priority come first. One write of a slice at a time.
6. A write that failed is tried again later and later, up to `RETRY_MAX` seconds.
7. Two slices of a namespace that together hold `merge` endpoints or fewer become one, every `MERGE_EVERY` seconds at
   most, and only slices at rest: so that a namespace of n endpoints at rest has fewer than 2n/merge + 2 of them.

Each change of an endpoint makes at most one slice differ; a merge makes two. So there are never more writes than
changes of endpoints and of others' making, failures, and two for each merge.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Generic, Literal, TypeVar

V = TypeVar("V")
Key = tuple[str, str]

RETRY: Final = 0.5
RETRY_MAX: Final = 30.0
MERGE_EVERY: Final = 10.0
MERGES: Final = 10


@dataclass(frozen=True, slots=True)
class Stored(Generic[V]):
    """A slice as the API server holds it: its values by endpoint's name; `version` is its resourceVersion."""

    namespace: str
    endpoints: Mapping[str, V]
    version: str


@dataclass(frozen=True, slots=True)
class Write(Generic[V]):
    """Create, replace or delete a slice. `version` is the precondition, "" for create."""

    kind: Literal["create", "update", "delete"]
    name: str
    namespace: str
    endpoints: Mapping[str, V]
    version: str


@dataclass(slots=True, eq=False)
class _Slice(Generic[V]):
    name: str
    namespace: str
    order: int
    members: dict[str, V] = field(default_factory=dict)
    shared: bool = False
    """`members` is also what is stored, or being written: copied before it changes."""
    stored: Stored[V] | None = None
    since: float | None = None
    """When it began to differ, as far as known."""
    written: float = float("-inf")
    retry_at: float = float("-inf")
    failures: int = 0
    busy: bool = False
    news: tuple[Stored[V] | None] | None = None
    """What the watch said while it was being written."""
    draining: bool = False
    waiting: set[str] = field(default_factory=set)
    """Slices that keep an endpoint until it is stored here."""


class EndpointSlices(Generic[V]):
    """Ask `next` until it has nothing, carry out what it says, report by `done`, and feed it what the watches say."""

    def __init__(
        self,
        new_name: Callable[[], str],
        random: Callable[[], float],
        *,
        max_size: int = 100,
        merge: int = 75,
        settle: float = 0.05,
        interval: float = 0.5,
    ) -> None:
        self._new_name = new_name
        self._random = random
        self._max, self._merge_at = max_size, merge
        self._settle, self._interval = settle, interval
        self._slices: dict[str, _Slice[V]] = {}
        self._of: dict[str, set[str]] = {}
        self._open: dict[str, list[tuple[int, str]]] = {}
        """By namespace: slices that were seen to have room, oldest first; checked when used."""
        self._home: dict[Key, _Slice[V]] = {}
        self._due: tuple[list[tuple[float, str]], list[tuple[float, str]]] = ([], [])
        self._priority: set[str] = set()
        self._sparse: dict[str, float] = {}
        self._uncovered: set[Key] = set()
        self._orders = 0
        self.merges = 0

    # --- what is ------------------------------------------------------------------------------------------------

    def start(self, slices: Mapping[str, Stored[V]], endpoints: Mapping[Key, V], now: float) -> None:
        """Everything there is; once, before anything else."""
        for name, stored in sorted(slices.items(), key=lambda item: (-len(item[1].endpoints), item[0])):
            self._adopt(name, stored, endpoints)
        for key, value in endpoints.items():
            if key not in self._home:
                self._uncovered.add(key)
                self._place(key, value, now)
        for one in self._slices.values():
            self._touch(one, now)
            self._sparse.setdefault(one.namespace, now + MERGE_EVERY)

    @property
    def covered(self) -> bool:
        """Whether every endpoint that was there at the start has been in a stored slice since, or is gone."""
        return not self._uncovered

    def on_endpoint(self, key: Key, value: V | None, now: float) -> None:
        """An endpoint appeared, changed or went."""
        home = self._home.get(key)
        if value is None:
            if home is not None:
                self._remove(key, home, now)
        elif home is None:
            self._place(key, value, now)
        elif home.members[key[1]] != value:
            self._own(home)[key[1]] = value
            self._touch(home, now)

    def on_slice(self, name: str, stored: Stored[V] | None, now: float) -> None:
        """What the watch, or a fresh read, says of a slice; None: it doesn't exist."""
        one = self._slices.get(name)
        if one is None:
            if stored is not None:
                one = self._adopt(name, stored, {})
                self._touch(one, now)
        elif one.busy:
            one.news = (stored,)
        elif stored is None or one.stored is None or _newer(stored.version, one.stored.version):
            self._store(one, stored, now)

    def set_priority(self, namespace: str, priority: bool) -> None:
        """Whether a namespace's slices are written before others'."""
        if priority == (namespace in self._priority):
            return
        (self._priority.add if priority else self._priority.discard)(namespace)
        for name in self._of.get(namespace, ()):
            self._schedule(self._slices[name])

    def __len__(self) -> int:
        return len(self._slices)

    def home(self, key: Key) -> str | None:
        """The slice of an endpoint."""
        found = self._home.get(key)
        return found.name if found is not None else None

    # --- what to do ---------------------------------------------------------------------------------------------

    def next(self, now: float) -> Write[V] | None:
        """The write that is due first; the slice counts as being written until `done`."""
        for queue in self._due:
            while queue and queue[0][0] <= now:
                due, name = heapq.heappop(queue)
                one = self._slices.get(name)
                if one is None or one.busy or one.since is None or self._due_at(one) > due:
                    continue  # scheduled anew, or nothing to do any more
                write = self._write(one)
                if write is not None:
                    return write
        return None

    def wait(self) -> float | None:
        """The time at which `next` may have something; None if only a change can bring it."""
        times = [queue[0][0] for queue in self._due if queue]
        times += self._sparse.values()
        return min(times, default=None)

    def done(self, write: Write[V], version: str | None, now: float) -> None:
        """A write succeeded with this resourceVersion (any text for a deletion), or failed (None)."""
        one = self._slices[write.name]
        one.busy = False
        if version is None:
            one.retry_at = now + min(RETRY_MAX, RETRY * 2.0 ** min(one.failures, 16)) * (0.5 + 0.5 * self._random())
            one.failures += 1
            self._touch(one, now)
        else:
            one.failures, one.written, one.retry_at = 0, now, float("-inf")
            self._store(one, None if write.kind == "delete" else Stored(write.namespace, write.endpoints, version), now)
        news, one.news = one.news, None
        if news is not None and self._slices.get(one.name) is one:
            self.on_slice(one.name, news[0], now)
        if one.since is not None:
            self._schedule(one)

    def refused(self, write: Write[V], stored: Stored[V] | None, now: float) -> None:
        """A write was refused because the slice isn't what we thought; `stored` is what it is, freshly read."""
        one = self._slices[write.name]
        one.busy, one.news = False, None
        one.written = now
        self._store(one, stored, now)
        if one.since is not None:
            self._schedule(one)

    def tidy(self, now: float) -> None:
        """Merge sparse slices where it is time. Call it now and then, before `next`."""
        for namespace in [n for n, at in self._sparse.items() if at <= now]:
            del self._sparse[namespace]
            self._merge(namespace, now)

    # --- inside -------------------------------------------------------------------------------------------------

    def _adopt(self, name: str, stored: Stored[V], endpoints: Mapping[Key, V]) -> _Slice[V]:
        one = self._add(name, stored.namespace)
        one.stored = stored
        for endpoint in stored.endpoints:
            key = (stored.namespace, endpoint)
            if key in endpoints and key not in self._home and len(one.members) < self._max:
                one.members[endpoint] = endpoints[key]
                self._home[key] = one
        if one.members == stored.endpoints:
            one.stored = Stored(stored.namespace, one.members, stored.version)
            one.shared = True
        return one

    def _add(self, name: str, namespace: str) -> _Slice[V]:
        self._orders += 1
        one = self._slices[name] = _Slice(name, namespace, self._orders)
        self._of.setdefault(namespace, set()).add(name)
        self._has_room(one)
        return one

    def _forget(self, one: _Slice[V]) -> None:
        del self._slices[one.name]
        names = self._of[one.namespace]
        names.discard(one.name)
        if not names:
            del self._of[one.namespace]
            self._open.pop(one.namespace, None)
            self._sparse.pop(one.namespace, None)

    def _place(self, key: Key, value: V, now: float) -> None:
        home = self._with_room(key[0])
        self._own(home)[key[1]] = value
        self._home[key] = home
        self._touch(home, now)

    def _with_room(self, namespace: str) -> _Slice[V]:
        found = self._open.get(namespace, [])
        while found:
            one = self._slices.get(found[0][1])
            if one is not None and not one.draining and len(one.members) < self._max:
                return one
            del found[0]
        name = self._new_name()
        while name in self._slices:
            name = self._new_name()
        return self._add(name, namespace)

    def _has_room(self, one: _Slice[V]) -> None:
        names, entry = self._open.setdefault(one.namespace, []), (one.order, one.name)
        at = bisect_left(names, entry)
        if names[at : at + 1] != [entry]:
            names.insert(at, entry)

    def _remove(self, key: Key, home: _Slice[V], now: float) -> None:
        if len(home.members) == self._max:
            self._has_room(home)
        del self._own(home)[key[1]]
        del self._home[key]
        self._uncovered.discard(key)
        self._sparse.setdefault(key[0], now + MERGE_EVERY)
        self._touch(home, now)
        self._poke(home, now)

    def _own(self, one: _Slice[V]) -> dict[str, V]:
        if one.shared:
            one.members, one.shared = dict(one.members), False
        return one.members

    def _store(self, one: _Slice[V], stored: Stored[V] | None, now: float) -> None:
        """What is stored of a slice is this, for sure."""
        one.stored = stored
        if stored is not None and self._uncovered:
            self._uncovered.difference_update((stored.namespace, name) for name in stored.endpoints)
        self._poke(one, now)
        if stored is None and not one.members:
            self._forget(one)
        elif not self._right(one):
            self._touch(one, now)

    def _right(self, one: _Slice[V]) -> bool:
        s = one.stored
        return s is not None and s.namespace == one.namespace and s.endpoints == one.members and bool(one.members)

    def _poke(self, one: _Slice[V], now: float) -> None:
        waiting, one.waiting = one.waiting, set()
        for name in waiting:
            if name in self._slices:
                self._touch(self._slices[name], now)

    def _touch(self, one: _Slice[V], now: float) -> None:
        if one.since is None:
            one.since = now
            self._schedule(one)

    def _due_at(self, one: _Slice[V]) -> float:
        assert one.since is not None
        return max(one.since + self._settle, one.written + self._interval, one.retry_at)

    def _schedule(self, one: _Slice[V]) -> None:
        if one.since is not None and not one.busy:
            heapq.heappush(self._due[one.namespace not in self._priority], (self._due_at(one), one.name))

    def _write(self, one: _Slice[V]) -> Write[V] | None:
        """The write that makes what is stored right, if any can now."""
        one.since = None
        stored, wanted = one.stored, self._wanted(one)
        if not wanted:
            if stored is None:
                self._forget(one)
                return None
            one.busy = True
            return Write("delete", one.name, one.namespace, {}, stored.version)
        if stored is not None and stored.namespace == one.namespace and stored.endpoints == wanted:
            return None
        one.busy = True
        one.shared = one.shared or wanted is one.members
        if stored is None:
            return Write("create", one.name, one.namespace, wanted, "")
        return Write("update", one.name, one.namespace, wanted, stored.version)

    def _wanted(self, one: _Slice[V]) -> Mapping[str, V]:
        """Rule 3."""
        kept: dict[str, V] = {}
        s = one.stored
        for name in s.endpoints if s is not None and s.namespace == one.namespace else ():
            home = self._home.get((one.namespace, name)) if name not in one.members else None
            if home is not None and not _holds(home, name):
                kept[name] = home.members[name]
                home.waiting.add(one.name)
        return one.members if not kept else {**one.members, **kept}

    def _merge(self, namespace: str, now: float) -> None:
        """Rule 7, for up to MERGES slices."""
        every = (self._slices[name] for name in self._of.get(namespace, ()))
        rest = sorted((s for s in every if not s.draining), key=lambda s: (len(s.members), -s.order))
        idle = [s for s in rest if s.since is None and not s.busy]
        merged = 0
        while len(idle) > 1 and merged < MERGES:
            small = idle.pop(0)
            # The fullest that it fits into.
            fits = [s for s in idle if len(s.members) + len(small.members) <= self._merge_at]
            if not fits:
                break
            self._move_all(small, fits[-1], now)
            idle.sort(key=lambda s: (len(s.members), -s.order))
            merged += 1
        self.merges += merged
        sizes = [len(s.members) for s in rest if not s.draining][:2]
        if merged or (len(sizes) == 2 and sum(sizes) <= self._merge_at):
            self._sparse[namespace] = now + MERGE_EVERY

    def _move_all(self, source: _Slice[V], target: _Slice[V], now: float) -> None:
        members = self._own(target)
        for name, value in source.members.items():
            members[name] = value
            self._home[source.namespace, name] = target
        source.members, source.shared, source.draining = {}, False, True
        self._touch(target, now)
        self._touch(source, now)


def _holds(one: _Slice[V], name: str) -> bool:
    s = one.stored
    return s is not None and s.namespace == one.namespace and name in s.endpoints


def _newer(version: str, than: str) -> bool:
    # Versions of one kind only grow; a server whose versions are no numbers is believed.
    if version.isdecimal() and than.isdecimal():
        return int(version) > int(than)
    return version != than
