"""Which label sets each selector matches, kept up to date.

Rules
- A selector is added and removed as often as somebody uses it; equal selectors are one.
- Adding a label set looks only at selectors that could match it: each selector waits in the bucket of one label (or
  key) that it requires, the least crowded one. Only selectors without any positive requirement are looked at always.
- What is in here depends on what was added and is still there, never on the order.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Set
from typing import Generic, TypeVar

from fimbria.model.labels import Labels
from fimbria.model.policy import Operator, Requirement, Selector

K = TypeVar("K", bound=Hashable)
Bucket = tuple[str, str | None]  # a label, or a key with any value

_NOBODY: frozenset[Selector] = frozenset()


class SelectorCache(Generic[K]):
    """Selectors on one side, owners of labels (identity numbers, pods) on the other."""

    __slots__ = ("_always", "_by_label", "_labels", "_matched", "_members", "_uses", "_waiting", "_waits_in")

    def __init__(self) -> None:
        self._uses: dict[Selector, int] = {}
        self._members: dict[Selector, set[K]] = {}
        self._waits_in: dict[Selector, tuple[Bucket, ...]] = {}
        self._waiting: dict[Bucket, set[Selector]] = {}
        self._always: set[Selector] = set()
        self._labels: dict[K, Labels] = {}
        self._matched: dict[K, frozenset[Selector]] = {}
        self._by_label: dict[Bucket, set[K]] = {}

    # --- questions ---

    def members(self, selector: Selector) -> Set[K]:
        """Owners that a selector in use matches. Raises KeyError if it isn't in use. Don't change the answer."""
        return self._members[selector]

    def matching(self, owner: K) -> frozenset[Selector]:
        """Selectors in use that match an owner; none for an unknown one."""
        return self._matched.get(owner, _NOBODY)

    def labels(self, owner: K) -> Labels | None:
        return self._labels.get(owner)

    def owners(self) -> Set[K]:
        return self._labels.keys()

    # --- selectors ---

    def add_selector(self, selector: Selector) -> None:
        self._uses[selector] = self._uses.get(selector, 0) + 1
        if self._uses[selector] > 1:
            return
        members = {owner for owner in self._candidates(selector) if selector.matches(self._labels[owner])}
        self._members[selector] = members
        for owner in members:
            self._matched[owner] |= {selector}
        buckets = self._least_crowded(selector)
        self._waits_in[selector] = buckets or ()
        if buckets is None:
            self._always.add(selector)
            return
        for bucket in buckets:
            self._waiting.setdefault(bucket, set()).add(selector)

    def remove_selector(self, selector: Selector) -> None:
        """Raises KeyError if it isn't in use."""
        self._uses[selector] -= 1
        if self._uses[selector]:
            return
        del self._uses[selector]
        for owner in self._members.pop(selector):
            self._matched[owner] -= {selector}
        self._always.discard(selector)
        for bucket in self._waits_in.pop(selector):
            _discard(self._waiting, bucket, selector)

    # --- owners ---

    def set(self, owner: K, labels: Labels) -> frozenset[Selector]:
        """Add or change an owner. Returns the selectors that match it now but didn't before, or the reverse."""
        before = self._matched.get(owner, _NOBODY)
        old = self._labels.get(owner)
        if old == labels:
            return _NOBODY
        if old is not None:
            self._unindex(owner, old)
        self._labels[owner] = labels
        for bucket in _buckets_of(labels):
            self._by_label.setdefault(bucket, set()).add(owner)
        after = frozenset(s for s in self._waiting_for(labels) if s.matches(labels))
        self._matched[owner] = after
        changed = before ^ after
        for selector in changed:
            (self._members[selector].add if selector in after else self._members[selector].discard)(owner)
        return changed

    def delete(self, owner: K) -> frozenset[Selector]:
        """Forget an owner, known or not. Returns the selectors that matched it."""
        labels = self._labels.pop(owner, None)
        if labels is None:
            return _NOBODY
        self._unindex(owner, labels)
        before = self._matched.pop(owner)
        for selector in before:
            self._members[selector].discard(owner)
        return before

    # --- inside ---

    def _unindex(self, owner: K, labels: Labels) -> None:
        for bucket in _buckets_of(labels):
            _discard(self._by_label, bucket, owner)

    def _waiting_for(self, labels: Labels) -> Iterator[Selector]:
        seen: set[Selector] = set(self._always)
        for bucket in _buckets_of(labels):
            if bucket in self._waiting:
                seen |= self._waiting[bucket]
        return iter(seen)

    def _candidates(self, selector: Selector) -> Iterable[K]:
        """Owners that could match: those of the requirement that the fewest owners meet."""
        best: Iterable[K] = self._labels
        size = len(self._labels)
        for buckets in _positive(selector):
            count = sum(len(self._by_label.get(bucket, ())) for bucket in buckets)
            if count < size:
                best, size = [owner for bucket in buckets for owner in self._by_label.get(bucket, ())], count
        return best

    def _least_crowded(self, selector: Selector) -> tuple[Bucket, ...] | None:
        choices = list(_positive(selector))
        if not choices:
            return None
        return min(choices, key=lambda buckets: sum(len(self._waiting.get(bucket, ())) + 1 for bucket in buckets))


def _positive(selector: Selector) -> Iterator[tuple[Bucket, ...]]:
    """For each requirement that some label must meet: the buckets in one of which that label is."""
    for requirement in selector.requirements:
        if requirement.operator in (Operator.IN, Operator.EXISTS):
            yield tuple(_buckets(requirement))


def _buckets(requirement: Requirement) -> Iterator[Bucket]:
    for key in requirement.keys:
        if requirement.operator is Operator.EXISTS:
            yield key, None
        else:
            yield from ((key, value) for value in requirement.values)


def _buckets_of(labels: Labels) -> Iterator[Bucket]:
    for item in labels.items():
        yield item
        yield item[0], None


B = TypeVar("B", bound=Hashable)
V = TypeVar("V", bound=Hashable)


def _discard(index: dict[B, set[V]], bucket: B, value: V) -> None:
    values = index[bucket]
    values.discard(value)
    if not values:
        del index[bucket]
