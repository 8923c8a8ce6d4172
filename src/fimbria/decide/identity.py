"""Which number a set of labels gets, cluster-wide, without anybody in the middle. Pure: the callers do the requests.

A CiliumIdentity's name is its number and its labels never change. The order in which a set of labels tries the numbers
(its *probes*) is a function of the labels alone, so it is the same on every node.

Rules for a node (`IdentityAllocator`)
1. Labels that are known to have a number keep it; of several, the lowest.
2. Otherwise create at the first probe. A conflict (409) is fresh proof that the number is taken: look who holds it. The
   same labels: use it. Others: go on to the next probe. What only a cache says is never a reason to skip a probe.
3. A holder marked for collection that is about to be used, or skipped, is unmarked first (`Keep`). If it is gone by
   then, start again at the first probe.
4. Steps of one walk older than `window` seconds prove nothing any more: start again.
   No namespace gets more than half of the numbers, by what is known: who may label pods in one can't leave none to the
   others. That only refuses creations, so it has no part in what follows.

Rules for the operator (`IdentityCollector`)
5. An identity is marked once it is seen to be unused and displaces nobody: no other identity sits at a later one of its
   own probes than this number. Whoever is displaced is collected first.
6. It is deleted once it has been marked, unused and displacing nobody for `grace` seconds by the collector's own clock,
   with its resourceVersion as a precondition, so that an unmarking in between wins. `grace` must be well above `window`
   plus the time a request can take, plus the time a CiliumEndpoint needs to appear.

Why two nodes that ask for the same labels L at the same instant always get the same number: at any time at most one
identity has labels L, and if it sits at probe k, probes 0..k-1 are held by others. Creations keep that: who creates L
at probe k got a conflict from each earlier probe within `window`, each held by others and unmarked (or unmarked by
rule 3) at that time. None of them has been deleted since, for a deletion comes at least `grace` after a mark that
itself came after that. So L is at no probe before k; it is at no probe after k either, for then k would be held, and
the creation would conflict. Deletions keep it: rule 5 holds at the moment of deletion as well, and a creation that is
still under way and skipped the number has unmarked it, or ends within the grace and is seen. Of two nodes at the same
probe, the API server lets one create; the other gets the conflict and rule 2 leads it to the same number.

An identity that a person deletes is created again by the nodes that use it (`on_gone`).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from math import gcd
from typing import Final

from fimbria.model.identity import MAX_ALLOCATED, MIN_ALLOCATED
from fimbria.model.labels import NAMESPACE, Labels

SIZE: Final = MAX_ALLOCATED - MIN_ALLOCATED + 1
NEARLY: Final = 0.8


class IdentitiesExhausted(Exception):
    """All numbers, or all that a namespace may have, are held by other labels."""


def probe(labels: Labels, size: int = SIZE) -> Iterator[int]:
    """All allocatable numbers, each once, in the order that these labels try them.

    Double hashing with SHA-256 over the canonical labels: a start, and a step that has no factor in common with `size`.
    """
    digest = hashlib.sha256(labels.canonical()).digest()
    start, step = int.from_bytes(digest[:8]) % size, int.from_bytes(digest[8:16]) % size
    while gcd(step, size) != 1:
        step += 1
    return (MIN_ALLOCATED + (start + n * step) % size for n in range(size))


@dataclass(frozen=True, slots=True)
class Use:
    """The labels have this number."""

    number: int


@dataclass(frozen=True, slots=True)
class Create:
    """Create the identity with this number; then report `on_seen`, or the holder by `on_conflict`."""

    number: int


@dataclass(frozen=True, slots=True)
class Keep:
    """Remove the mark from this identity; then report `on_seen` unmarked, or `on_gone` if it doesn't exist any more."""

    number: int


Decision = Use | Create | Keep


@dataclass(slots=True)
class _Walk:
    """One search for a free number."""

    probes: Iterator[int]
    number: int
    since: float


class IdentityAllocator:
    """A node's view of the identities and its searches for numbers. Times are monotonic seconds, given by the caller.

    Ask `want`, do what it says, report what came of it, and ask again until the answer is `Use`.
    """

    __slots__ = ("_by_labels", "_in_namespace", "_labels", "_marked", "_size", "_walks", "_window")

    def __init__(self, window: float = 60.0, size: int = SIZE) -> None:
        self._window = window
        self._size = size
        self._labels: dict[int, Labels] = {}
        self._marked: set[int] = set()
        self._by_labels: dict[Labels, set[int]] = {}
        self._in_namespace: Counter[str] = Counter()
        self._walks: dict[Labels, _Walk] = {}

    def want(self, labels: Labels, now: float) -> Decision:
        """The next step to a number. Raises IdentitiesExhausted."""
        held = self._by_labels.get(labels)
        if held:
            self._walks.pop(labels, None)
            number = min(held)
            return Keep(number) if number in self._marked else Use(number)
        self._check_namespace(labels)
        walk = self._walks.get(labels)
        if walk is None or now - walk.since > self._window:
            walk = self._start(labels, now)
        # A marked number counts as taken only once it is kept.
        return Keep(walk.number) if walk.number in self._marked else Create(walk.number)

    def on_conflict(self, labels: Labels, number: int, holder: Labels, marked: bool, now: float) -> None:
        """Creating `number` for `labels` failed: as just read from the API server, it has the labels `holder`."""
        self.on_seen(number, holder, marked)
        walk = self._walks.get(labels)
        if holder != labels and walk is not None and walk.number == number and not marked:
            self._advance(labels, walk)

    def on_kept(self, labels: Labels, number: int) -> None:
        """The mark of `number` was removed (or it had none) at the request of the walk for `labels`."""
        self._marked.discard(number)
        walk = self._walks.get(labels)
        if walk is not None and walk.number == number and self._labels.get(number, labels) != labels:
            self._advance(labels, walk)

    def on_seen(self, number: int, labels: Labels, marked: bool = False) -> None:
        """The identity exists: created by us, read, or delivered by the watch."""
        old = self._labels.get(number)
        if old is not None and old != labels:
            self._forget(number)
        if old != labels:
            self._in_namespace[labels.get(NAMESPACE, "")] += 1
        self._labels[number] = labels
        self._by_labels.setdefault(labels, set()).add(number)
        (self._marked.add if marked else self._marked.discard)(number)

    def on_gone(self, number: int) -> Labels | None:
        """The identity doesn't exist any more. Returns its labels: whoever uses them must `want` them again."""
        labels = self._labels.get(number)
        if labels is not None:
            self._forget(number)
        for wanted in [wanted for wanted, walk in self._walks.items() if walk.number == number]:
            del self._walks[wanted]
        return labels

    def number(self, labels: Labels) -> int | None:
        """The number of labels as far as known."""
        held = self._by_labels.get(labels)
        return min(held) if held else None

    def labels(self, number: int) -> Labels | None:
        return self._labels.get(number)

    def _check_namespace(self, labels: Labels) -> None:
        namespace = labels.get(NAMESPACE, "")
        if namespace and self._in_namespace[namespace] >= self._size // 2:
            self._walks.pop(labels, None)
            raise IdentitiesExhausted(
                f"namespace {namespace} has {self._in_namespace[namespace]} identities, and none may have more than "
                f"half of the {self._size}: its pods have too many different sets of labels"
            )

    def _start(self, labels: Labels, now: float) -> _Walk:
        probes = probe(labels, self._size)
        walk = self._walks[labels] = _Walk(probes, next(probes), now)
        return walk

    def _advance(self, labels: Labels, walk: _Walk) -> None:
        try:
            walk.number = next(walk.probes)
        except StopIteration:
            del self._walks[labels]
            raise IdentitiesExhausted(
                f"all {self._size} identity numbers are in use, none is left for {labels}"
            ) from None

    def _forget(self, number: int) -> None:
        labels = self._labels.pop(number)
        namespace = labels.get(NAMESPACE, "")
        self._in_namespace[namespace] -= 1
        if not self._in_namespace[namespace]:
            del self._in_namespace[namespace]
        self._marked.discard(number)
        held = self._by_labels[labels]
        held.discard(number)
        if not held:
            del self._by_labels[labels]


@dataclass(frozen=True, slots=True)
class Existing:
    """A CiliumIdentity as listed afresh from the API server; `version` is its resourceVersion."""

    labels: Labels
    marked: bool = False
    version: str = ""


@dataclass(frozen=True, slots=True)
class Collection:
    """Identities to mark, to unmark, and to delete (each with the resourceVersion of the list as a precondition)."""

    mark: frozenset[int]
    unmark: frozenset[int]
    delete: frozenset[int]


class IdentityCollector:
    """The operator's rules 5 and 6. Remembers only since when it has seen each mark; a new leader waits anew."""

    __slots__ = ("_grace", "_since", "_size")

    def __init__(self, grace: float = 900.0, size: int = SIZE) -> None:
        self._grace = grace
        self._size = size
        self._since: dict[tuple[int, str], float] = {}

    def collect(self, existing: Mapping[int, Existing], used: Set[int], now: float) -> Collection:
        """`existing` and `used` (by CiliumEndpoints) must both be fresh reads, `used` read last."""
        allocated = {n: one for n, one in existing.items() if MIN_ALLOCATED <= n < MIN_ALLOCATED + self._size}
        idle = allocated.keys() - used - displacing(allocated, self._size)
        marked = {number for number, one in allocated.items() if one.marked}
        # By version: one that was unmarked and marked again in between waits anew.
        seen = ((number, allocated[number].version) for number in marked & idle)
        self._since = {key: self._since.get(key, now) for key in seen}
        due = frozenset(number for (number, _), since in self._since.items() if now - since >= self._grace)
        return Collection(frozenset(idle - marked), frozenset(marked - idle), due)


def displacing(existing: Mapping[int, Existing], size: int = SIZE) -> set[int]:
    """The identities that another one had to make way for: they hold an earlier one of its probes."""
    blocking: set[int] = set()
    for number, one in existing.items():
        for earlier in probe(one.labels, size):
            # Behind a free one it sits by somebody else's choice (a former plugin's, say): nothing rests on the rest.
            if earlier == number or earlier not in existing:
                break
            blocking.add(earlier)
    return blocking


def nearly_exhausted(held: Iterable[Labels], size: int = SIZE) -> str:
    """Whether most numbers are held, and by whom: a sentence, "" while there is room."""
    spaces = Counter(labels.get(NAMESPACE, "") for labels in held)
    used = spaces.total()
    if used < NEARLY * size:
        return ""
    most = ", ".join(f"{name or 'no namespace'} ({count})" for name, count in spaces.most_common(3))
    return (
        f"{used * 100 // size} % of the {size} identities are in use, when none is left new pods can't start; "
        f"most are in {most}: labels that differ from pod to pod should be left out by --label-filter"
    )
