"""Keeps a table equal to what the API server has of one kind: list, then watch, for ever.

Rules
1. List in pages, then watch from the list's resourceVersion. Every event and bookmark moves the version on.
2. A stream that ends or breaks is opened again at the version reached; nothing is listed for that.
3. 410 Gone, in an answer or in the stream: list again. The table keeps serving the old rows until the new list is
   complete and then changes only where it differs, in one step. Whatever makes one version too old (a server that was
   started again, its history cut) does so for every node at once, so the list is put off by a random time that grows
   with what it costs: `RELIST_ROW` seconds a row, `RELIST_MOST` at most.
4. The same when the server refuses our version `REFUSALS` times in another way, or answers from before our version:
   its history isn't the one that we know (restored from a backup, or made anew).
5. Every error waits, longer each time with jitter; a stream that lived `STABLE` seconds starts the count anew. One
   that broke sooner but had brought something waits `HICCUP` seconds at most: else a bad line, or a proxy that cuts
   connections, would leave a node half a minute behind a server that answers.
6. An object that doesn't decode or that `transform` refuses is reported and stays out of everybody else's way. Its row
   of before stays unless `on_bad` says otherwise; the stream goes on.
7. An absent API server changes nothing in the table. `connected` and `error` say so.
"""

import asyncio
import enum
import logging
import random as _random
import re
import time
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, Literal, TypeVar

import msgspec

from fimbria.sources.k8s.client import ApiClient
from fimbria.sources.k8s.errors import ApiError, BadAnswer, Forbidden, Gone, NotFound, from_status
from fimbria.sources.k8s.pacing import Backoff
from fimbria.sources.k8s.resources import Resource
from fimbria.sources.k8s.types.meta import ApiObject, ObjectMeta
from fimbria.sources.k8s.watch import Bad, Event, EventDecoder, Failed, PageDecoder, StreamError, read_meta
from fimbria.tables.table import Table

T = TypeVar("T", bound=ApiObject)
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

STABLE = 5.0  # seconds a watch must live for the back-off to start anew
HICCUP = 1.0
RELIST_ROW = 1e-4
RELIST_MOST = 10.0
TELL_EVERY = 20  # attempts, which is about five minutes
REFUSALS = 3
REFUSED = (400, 422, 504)  # how servers say that a version is no version, or one that they haven't reached
_NUMBERS = re.compile(r"[0-9.]+")
_log = logging.getLogger("fimbria.k8s")


class Keep(enum.Enum):
    PREVIOUS = enum.auto()


KEEP = Keep.PREVIOUS
"""What `on_bad` returns to leave the row of before (or its absence) as it is."""


def object_key(meta: ObjectMeta) -> str:
    """`namespace/name`, or the name alone of a cluster-scoped object."""
    return f"{meta.namespace}/{meta.name}" if meta.namespace else meta.name


class Informer(Generic[T, K, V]):
    """Fills `table` with `key(metadata): transform(object)`; `None` from `transform` means: no row for this object.

    `transform` shrinks an object to what is worth keeping, so that raw objects are garbage at once; whatever it
    raises counts as a bad object. `on_bad(key, error, json)` is asked for the row of a bad object: KEEP, None for no
    row, or a row that says "broken" (policies need one to fail closed). Run it with `run()`, which returns only by
    cancellation. Counters are plain attributes, for the metrics and the status page to read.
    """

    def __init__(
        self,
        client: ApiClient,
        resource: Resource[T],
        table: Table[K, V],
        transform: Callable[[T], V | None],
        *,
        key: Callable[[ObjectMeta], K],
        namespace: str = "",
        labels: str = "",
        fields: str = "",
        on_bad: Callable[[K, str, bytes], V | Literal[Keep.PREVIOUS] | None] = lambda _key, _error, _json: KEEP,
        page_size: int = 0,
        watch_seconds: int = 300,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        random: Callable[[], float] = _random.random,
    ) -> None:
        self._client = client
        self._resource = resource
        self._table = table
        self._transform = transform
        self._key = key
        self._scope = namespace
        self._labels = labels
        self._fields = fields
        self._on_bad = on_bad
        self._page_size = page_size or resource.page
        self._watch_seconds = watch_seconds
        self._clock = clock
        self._sleep = sleep
        self._random = random
        self._backoff = Backoff(0.2, 30.0, random)
        self._hiccups = Backoff(0.2, HICCUP, random)
        self._away_since: float | None = None
        self._progress = False
        self._told = ""
        self._pages = PageDecoder(resource.type)
        self._version = ""
        self._refusals = 0
        self.connected = False
        """A watch is open, or has just ended as agreed and is being opened again."""
        self.error = ""
        """Why it isn't connected; empty when it is."""
        self.last_contact: float | None = None
        """Clock time at which the server last sent anything on this kind."""
        self.bad: dict[K, str] = {}
        """Objects that are there but unusable, with the reason."""
        self.lists = 0
        self.watches = 0
        self.events = 0
        self.missing = False
        """The server doesn't know the kind, or doesn't let us read it, when asked last."""
        self.errors = 0
        self.bad_total = 0
        self.tell: Callable[[ObjectMeta, str], None] | None = None
        """Asked to tell people, besides the log, about an object that is unusable, and why."""

    @property
    def table(self) -> Table[K, V]:
        return self._table

    @property
    def resource(self) -> Resource[T]:
        return self._resource

    @property
    def relists(self) -> int:
        """Lists after the first one."""
        return max(0, self.lists - 1)

    def lag(self) -> float:
        """Upper bound, in seconds, of how old the table's view is: 0 while connected, infinite before any contact."""
        if self.connected:
            return 0.0
        return float("inf") if self.last_contact is None else self._clock() - self.last_contact

    async def run(self) -> None:
        while True:
            try:
                if not self._version:
                    await self._list()
                await self._watch()
            except Gone as error:
                self._version = ""
                self._note_absence(error)
                spread = self._random() * min(len(self._table) * RELIST_ROW, RELIST_MOST)
                await self._pause(error, self._backoff.next() + spread)
            except (ApiError, StreamError) as error:
                self._note_absence(error)
                self._refusals += isinstance(error, ApiError) and error.status in REFUSED
                if self._refusals >= REFUSALS:
                    self._refusals, self._version = 0, ""
                if self._progress:
                    self._backoff.reset()
                await self._pause(error, (self._hiccups if self._progress else self._backoff).next())

    def _note_absence(self, error: Exception) -> None:
        """How long the server was away says nothing about how soon it can be asked when it answers again, whatever it
        answers: one that has just started may refuse everybody for a moment. One that comes and goes is spared."""
        if isinstance(error, ApiError) and error.status in (0, 503):
            if self._away_since is None:
                self._away_since = self._clock()
            return
        if self._away_since is not None and self._clock() - self._away_since >= STABLE:
            self._backoff.reset()
        self._away_since = None

    async def _pause(self, error: Exception, delay: float) -> None:
        self.connected = False
        self.error = str(error)
        self.errors += 1
        self.missing = isinstance(error, NotFound | Forbidden)
        # What stays wrong is said again from time to time: nobody reads yesterday's log for why a policy isn't known.
        kind, attempts = _NUMBERS.sub("", self.error), max(self._backoff.attempts, self._hiccups.attempts)
        level = logging.WARNING if kind != self._told or attempts % TELL_EVERY == 1 else logging.DEBUG
        self._told = kind
        _log.log(level, "%s; trying again in %.1f s", error, delay)
        await self._sleep(delay)

    # --- list --------------------------------------------------------------------------------------------------

    async def _list(self) -> None:
        self._progress = False
        try:
            rows, version = await self._collect(self._page_size)
        except Gone:
            # The list expired between two pages: a cluster that changes this fast is listed in one piece.
            rows, version = await self._collect(0)
        self._table.replace(rows)
        self._version = version
        self.lists += 1
        self._table.mark_synced()

    async def _collect(self, limit: int) -> tuple[dict[K, V], str]:
        rows: dict[K, V] = {}
        bad: dict[K, str] = {}
        token = ""
        while True:
            data = await self._client.list_page(
                self._resource, self._scope, labels=self._labels, fields=self._fields, limit=limit, token=token
            )
            page = self._pages.decode(data)
            self.last_contact = self._clock()
            for item in page.items:
                self._file(item, rows, bad)
            token = page.meta.continue_
            if not token:
                break
        if not page.meta.resource_version:
            what = f"list {self._resource.describe(self._scope)}"
            raise BadAnswer(what, 200, text="the answer has no resourceVersion to watch from")
        self.bad = bad
        return rows, page.meta.resource_version

    def _file(self, item: T | Bad, rows: dict[K, V], bad: dict[K, str]) -> None:
        if not item_meta(item).name:
            self._nameless(item)
            return
        key = self._key(item_meta(item))
        row = self._row(key, item, bad)
        old = self._table.get(key)
        if row is KEEP:
            row = old
        if row is not None:
            rows[key] = old if old is not None and old == row else row  # an equal old row saves memory

    # --- watch -------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        # Spread over half of the time again, so that a thousand agents don't come back at the same moment.
        seconds = int(self._watch_seconds * (1.0 + 0.5 * self._random()))
        opened = self._clock()
        self._progress = False
        try:
            async with self._client.watch(
                self._resource,
                self._scope,
                resource_version=self._version,
                labels=self._labels,
                fields=self._fields,
                seconds=seconds,
            ) as chunks:
                opened = self.last_contact = self._clock()
                self.connected, self.missing, self.error = True, False, ""
                self.watches += 1
                decoder = EventDecoder(self._resource.type)
                first = True
                async for chunk in chunks:
                    self.last_contact = self._clock()
                    for event in decoder.feed(chunk):
                        if first and not isinstance(event, Failed):
                            self._check_history(event)
                            first = False
                        self._apply(event)
                        self._progress = True
        finally:
            lived = self._clock() - opened
            if lived >= STABLE:
                self._backoff.reset()
                self._hiccups.reset()
                self._refusals = 0
        if lived < STABLE:
            raise StreamError(f"watch {self._resource.describe(self._scope)}: the server ended it after {lived:.1f} s")

    def _check_history(self, event: Event[T] | Bad) -> None:
        # Versions of one resource only grow, except that some servers send a deleted object as it was before.
        version = item_meta(item_of(event)).resource_version
        both = event.type != "DELETED" and version.isdecimal() and self._version.isdecimal()
        if both and int(version) < int(self._version):
            what = f"watch {self._resource.describe(self._scope)}"
            raise Gone(what, 410, text=f"the server is at version {version}, before our {self._version}")

    def _apply(self, event: Event[T] | Bad | Failed) -> None:
        if isinstance(event, Failed):
            raise from_status(f"watch {self._resource.describe(self._scope)}", event.status)
        item = item_of(event)
        meta = item_meta(item)
        if event.type == "BOOKMARK":
            self._version = meta.resource_version or self._version
            return
        self.events += 1
        if not meta.name:
            self._nameless(item)
            return
        key = self._key(meta)
        if event.type == "DELETED":
            self.bad.pop(key, None)
            self._table.delete(key)
        elif event.type in ("ADDED", "MODIFIED"):
            self._set(key, item)
        else:
            raise StreamError(f"watch {self._resource.label}: unknown event type {event.type!r}")
        # Only now: should a step above raise, the event is asked for again.
        self._version = meta.resource_version or self._version

    def _set(self, key: K, item: T | Bad) -> None:
        if self.bad:
            self.bad.pop(key, None)
        row = self._row(key, item, self.bad)
        if row is None:
            self._table.delete(key)
        elif row is not KEEP:
            self._table.upsert(key, row)

    # --- objects -----------------------------------------------------------------------------------------------

    def _row(self, key: K, item: T | Bad, bad: dict[K, str]) -> V | Literal[Keep.PREVIOUS] | None:
        if isinstance(item, Bad):
            return self._report(key, item.error, item.raw, bad)
        try:
            return self._transform(item)
        except Exception as error:
            # Whatever one object provokes in there must not stop the stream for all the others.
            return self._report(key, f"{type(error).__name__}: {error}", msgspec.json.encode(item), bad)

    def _report(self, key: K, error: str, raw: bytes, bad: dict[K, str]) -> V | Literal[Keep.PREVIOUS] | None:
        bad[key] = error
        self.bad_total += 1
        _log.warning('%s "%s" is unusable: %s', self._resource.kind, key, error)
        if self.tell is not None:
            self.tell(read_meta(raw), error)
        return self._on_bad(key, error, raw)

    def _nameless(self, item: T | Bad) -> None:
        self.bad_total += 1
        problem = item.error if isinstance(item, Bad) else "it has no name"
        _log.warning("a %s without a readable name was skipped: %s", self._resource.kind, problem)


def item_of(event: Event[T] | Bad) -> T | Bad:
    return event if isinstance(event, Bad) else event.object


def item_meta(item: ApiObject | Bad) -> ObjectMeta:
    return item.meta if isinstance(item, Bad) else item.metadata
