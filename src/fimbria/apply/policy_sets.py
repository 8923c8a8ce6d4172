"""Policy sets in the kernel: an outer map from a set's number to an inner map with its entries.

Rules
1. A large change is a new inner map that takes the old one's place in one step. New maps go in by one batch.
2. A small change is made in place, in an order in which nothing is allowed at any instant that is denied both before
   and after (`steps`).
3. What can't be written leaves what is enforced. A change that fails half-way in place is written whole; if that fails
   too, nothing is allowed that neither the old nor the new content allows.
"""

from __future__ import annotations

import itertools
import logging
import struct
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Final, TypeVar

from fimbria.apply.maps import BATCH, U32, ManyCodec
from fimbria.apply.outer import OPEN_AT_ONCE, put_all, remove_all
from fimbria.apply.rows import Delta
from fimbria.kernel.bpf import BpfError, Map, MapError, MapFlag, MapType, create_map
from fimbria.model.identity import SCOPE_CIDR
from fimbria.model.rows import PolicyEntry, PolicyKey

log = logging.getLogger(__name__)
SMALL: Final = 64
DENY: Final = 2  # enum policy_verdict

Content = Mapping[PolicyKey, PolicyEntry]
T = TypeVar("T")
_serials = itertools.count(1)


class SetContent(dict[PolicyKey, PolicyEntry]):
    """What a set should hold, and which keys may differ from what it held before.

    `changed` covers all differences from every content of this set whose serial is `since` or later. Never changed
    once it is made: a new content is derived from it.
    """

    __slots__ = ("changed", "serial", "since")

    def __init__(self, rows: Content) -> None:
        super().__init__(rows)
        self.serial = self.since = next(_serials)
        self.changed: frozenset[PolicyKey] = frozenset()

    def derive(self, upserts: Content, deletes: Iterable[PolicyKey]) -> SetContent:
        """The content after a change."""
        new = SetContent(self)
        new.update(upserts)
        for key in deletes:
            new.pop(key, None)
        step = frozenset(upserts) | frozenset(deletes)
        for since, changed in ((self.since, self.changed | step), (self.serial, step)):
            if len(changed) <= SMALL:
                new.since, new.changed = since, changed
                break
        return new


@dataclass(slots=True)
class Step:
    """Entries to write, then keys to remove."""

    upserts: dict[PolicyKey, PolicyEntry] = field(default_factory=dict)
    deletes: list[PolicyKey] = field(default_factory=list)


def steps(old: Content, new: Content, changed: Iterable[PolicyKey]) -> list[Step] | None:
    """The steps from `old` to `new`, which differ in keys of `changed` only; None if there is no safe order.

    A decision combines the longest entry of each of a packet's peers: its identity, its CIDR identity, and anyone (0).
    If only one of these votes can change, then denies in, allows in, allows out, denies out is safe. A query that both
    contents deny is denied by an entry D of the old and D' of the new, and all the while one of them is there. Nothing
    longer allows: no old entry is longer than D, no new one longer than D'; and an allow that takes the very place of a
    deny waits for the last step. What both allow stays allowed, since no content has an allow below a deny. If two
    votes of one packet may change (an identity's and anyone's), an allow of the new content may meet one of the old
    that nobody denies yet. CIDR entries vote by rules of their own. Those changes are swapped in whole.
    """
    changed = list(changed)
    peers = {key.peer for key in changed}
    if peers != {0} and not all(0 < peer < SCOPE_CIDR for peer in peers):
        return None
    denies_in, allows_in, allows_out, denies_out = Step(), Step(), Step(), Step()
    for key in changed:
        before, after = old.get(key), new.get(key)
        if before == after:
            continue
        denied = before is not None and before.verdict == DENY
        if after is None:
            (denies_out if denied else allows_out).deletes.append(key)
        elif after.verdict == DENY:
            denies_in.upserts[key] = after
        else:
            (denies_out if denied else allows_in).upserts[key] = after
    return [denies_in, allows_in, allows_out, denies_out]


@dataclass(frozen=True, slots=True)
class _Written:
    map_id: int
    room: int
    content: SetContent


class PolicySetsTarget:
    """Policy sets: number -> whole content. `swapped` and `amended` count sets written whole and in place."""

    name = "policy_sets"

    def __init__(self, outer: Map, keys: ManyCodec[PolicyKey], values: ManyCodec[PolicyEntry]) -> None:
        self._outer = outer
        self._keys = keys
        self._values = values
        # Of this process only: what a former one wrote is swapped at its first change.
        self._written: dict[int, _Written] = {}
        self.swapped = 0
        self.amended = 0

    def read(self) -> dict[int, Content]:
        """Content of every set."""
        numbers, ids = (U32().decode_many(part) for part in self._outer.dump())
        sets: dict[int, Content] = {}
        for number, map_id in zip(numbers, ids, strict=True):
            with suppress(BpfError), Map.by_id(map_id) as inner:
                keys, values = inner.dump()
                sets[number] = dict(zip(self._keys.decode_many(keys), self._values.decode_many(values), strict=True))
        return sets

    def write(self, delta: Delta[int, Content], *, order: str) -> Mapping[int, str]:
        """Change, swap in or remove sets."""
        failures: dict[int, str] = {}
        if order == "in":
            whole = [(n, c) for n, c in delta.upserts.items() if not self._amend(n, c)]
            for part in _parts(whole, OPEN_AT_ONCE):
                failures |= self._swap(part)
        if order == "out" and delta.deletes:
            failures |= self._remove(list(delta.deletes))
        return failures

    # --- in place ----------------------------------------------------------------------------------------------------

    def _amend(self, number: int, content: Content) -> bool:
        """False if the set must be swapped."""
        known = self._written.get(number)
        if known is None or not isinstance(content, SetContent) or not content.since <= known.content.serial:
            return False
        plan = steps(known.content, content, content.changed)
        added = sum(key not in known.content for key in content.changed if key in content)
        if plan is None or len(known.content) + added > known.room:
            return False
        try:
            # Somebody may have put another map there: its number would be another, and numbers aren't used again.
            if self._outer.lookup(struct.pack("=I", number)) != struct.pack("=I", known.map_id):
                return False
            with Map.by_id(known.map_id) as inner:
                for step in plan:
                    self._fill(inner, step.upserts)
                    inner.delete_batch(self._keys.encode_many(step.deletes), len(step.deletes))
        except BpfError as error:
            log.warning("policy set %d can't be changed in place, and is written whole: %s", number, error)
            del self._written[number]
            return False
        self._written[number] = _Written(known.map_id, known.room, content)
        self.amended += 1
        return True

    # --- whole -------------------------------------------------------------------------------------------------------

    def _swap(self, sets: Sequence[tuple[int, Content]]) -> dict[int, str]:
        failures: dict[int, str] = {}
        with ExitStack() as stack:
            made: dict[int, Map] = {}
            for number, content in sets:
                try:
                    inner = stack.enter_context(_inner_map(number, len(content)))
                    self._fill(inner, content)
                    made[number] = inner
                except MapError as error:
                    failures[number] = _explain(number, error)
            failures |= put_all(self._outer, made, _explain)
            for number, content in sets:
                if number not in failures:
                    self._note(number, content, made[number])
        return failures

    def _note(self, number: int, content: Content, inner: Map) -> None:
        self.swapped += 1
        if isinstance(content, SetContent):
            self._written[number] = _Written(inner.info.id, inner.max_entries, content)
        else:
            self._written.pop(number, None)

    def _remove(self, numbers: list[int]) -> dict[int, str]:
        for number in numbers:
            self._written.pop(number, None)
        return remove_all(self._outer, numbers, lambda number, error: f"policy set {number}: {error}")

    def _fill(self, inner: Map, content: Content) -> None:
        for part in _parts(list(content.items()), BATCH):
            keys = self._keys.encode_many([k for k, _ in part])
            inner.update_batch(keys, self._values.encode_many([v for _, v in part]), len(part))


def _explain(number: int, error: MapError) -> str:
    return f"policy set {number}: {error}; what was enforced before stays enforced"


def _inner_map(number: int, entries: int) -> Map:
    room = entries + entries // 4 + 16
    return create_map(MapType.LPM_TRIE, 12, 8, room, MapFlag.NO_PREALLOC, name=f"policy_{number}")


def _parts(rows: Sequence[T], size: int) -> Iterable[Sequence[T]]:
    return (rows[i : i + size] for i in range(0, len(rows), size))
