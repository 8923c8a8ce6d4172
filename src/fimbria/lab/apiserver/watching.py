"""Watches: a cursor into the shelf's history for each watcher, and nothing buffered.

A watcher that falls behind the history gets an ERROR event with 410 Gone and is cut off, as kube-apiserver does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from fimbria.lab.apiserver import errors
from fimbria.lab.apiserver.listing import Predicate, parsed, partial, table
from fimbria.lab.apiserver.model import Entry, Event, Obj, Resource, decode, encode, watch_line
from fimbria.lab.apiserver.registry import served_raw
from fimbria.lab.apiserver.store import Expired, Shelf, Store

BATCH = 500
BOOKMARK_SECONDS = 60.0
Send = Callable[[bytes], Awaitable[None]]


@dataclass
class Watch:
    """One watch: what it selects, in which shape, and from which version (None: the state now comes first)."""

    res: Resource
    wanted: Predicate | None
    transform: str
    include: str
    bookmarks: bool
    start: int | None
    initial_bookmark: bool = False
    _header: bool = True

    def classify(self, event: Event) -> str:
        """ADDED, MODIFIED or DELETED as this watcher sees a change; empty if it doesn't concern it."""
        was = event.old is not None and (self.wanted is None or self.wanted(event.key, event.old))
        now = event.new is not None and (self.wanted is None or self.wanted(event.key, event.new))
        if now:
            return "MODIFIED" if was else "ADDED"
        return "DELETED" if was else ""

    def line(self, event: Event) -> bytes:
        kind = self.classify(event)
        if not kind:
            return b""
        if self.res.from_stored is None and not self.transform:
            return event.encoded(kind)
        obj: Obj = decode(event.raw(kind))
        return self._shaped(kind, self.res.from_stored(obj) if self.res.from_stored else obj)

    def initial(self, entry: Entry) -> bytes:
        if self.transform:
            return self._shaped("ADDED", parsed(self.res, entry))
        return watch_line("ADDED", served_raw(self.res, entry))

    def bookmark(self, rv: int, initial_end: bool = False) -> bytes:
        meta: Obj = {"resourceVersion": str(rv), "creationTimestamp": None}
        if initial_end:
            meta["annotations"] = {"k8s.io/initial-events-end": "true"}
        obj: Obj = {"kind": self.res.kind, "apiVersion": self.res.api_version, "metadata": meta}
        if self.transform == "Table":
            obj = table(self.res, [], {"resourceVersion": str(rv)}, self.include, header=False)
            obj["rows"] = [{"cells": [None] * len(self.res.columns), "object": {
                "kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": meta}}]  # fmt: skip
        elif self.transform:
            obj |= {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1"}
        return watch_line("BOOKMARK", encode(obj))

    def _shaped(self, kind: str, obj: Obj) -> bytes:
        if self.transform == "Table":
            rv = {"resourceVersion": obj["metadata"]["resourceVersion"]}
            obj = table(self.res, [obj], rv, self.include, self._header)
            self._header = False
        elif self.transform:
            obj = partial(obj)
        return watch_line(kind, encode(obj))


async def run(watch: Watch, store: Store, shelf: Shelf, seconds: float, send: Send) -> None:
    """Sends lines for so many seconds, or until the watcher has fallen out of the history."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    waker = shelf.subscribe()
    try:
        cursor = await _begin(watch, store, shelf, send)
        next_bookmark = loop.time() + BOOKMARK_SECONDS
        while (now := loop.time()) < deadline:
            waker.clear()
            events = shelf.events_after(cursor)[:BATCH]
            if events:
                cursor = events[-1].rv
                if lines := b"".join(watch.line(event) for event in events):
                    await send(lines)
                continue
            # nothing is pending, so the version of the whole store is one that this watch has seen
            cursor = max(cursor, store.rv)
            if watch.bookmarks and now >= next_bookmark:
                next_bookmark = now + BOOKMARK_SECONDS
                await send(watch.bookmark(cursor))
            await _wait(waker, min(deadline, next_bookmark) - loop.time())
        if watch.bookmarks:
            await send(watch.bookmark(cursor))
    except Expired:
        gone = errors.expired(f"too old resource version: {watch.start or 0} ({shelf.floor})")
        await send(watch_line("ERROR", encode(gone.status())))
    finally:
        shelf.unsubscribe(waker)


async def _begin(watch: Watch, store: Store, shelf: Shelf, send: Send) -> int:
    if watch.start is not None:
        return watch.start
    cursor = store.rv
    pairs = [(key, shelf.entries[key]) for key in shelf.sorted_keys()]
    entries = [entry for key, entry in pairs if watch.wanted is None or watch.wanted(key, entry)]
    for at in range(0, len(entries), BATCH):
        await send(b"".join(watch.initial(entry) for entry in entries[at : at + BATCH]))
    if watch.initial_bookmark:
        await send(watch.bookmark(cursor, initial_end=True))
    return cursor


async def _wait(waker: asyncio.Event, seconds: float) -> None:
    try:
        await asyncio.wait_for(waker.wait(), max(seconds, 0.001))
    except TimeoutError:
        return
