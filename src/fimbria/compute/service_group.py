"""The endpoints of a service port, and the groups of frontends that lead to the same of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Final

from fimbria.compute.service_choice import Choice, Standing, choose
from fimbria.compute.service_frontends import Want, source_key
from fimbria.compute.service_rows import MEMBERS, RANGES, SLOTS, TABLES, Delta
from fimbria.model.address import Prefix
from fimbria.model.rows import FrontendKey, MemberKey, SlotKey
from fimbria.model.service import DEFAULT_WEIGHT, ServicePort, TableContent

_new: Final = tuple.__new__  # a NamedTuple's own is three times as slow
_NOTHING: Final[frozenset[Standing]] = frozenset()


class Group:
    """Frontends that lead to the same endpoints: one service id, and its slots, which `order` names by position.

    Backends are named by their ids. `serves` are the standings that the slots were filled with.
    """

    __slots__ = ("affinity", "fresh", "frontends", "index", "key", "number", "order", "ranges", "serves", "table")

    def __init__(self, key: object, number: int, order: Iterable[int]) -> None:
        self.key = key
        self.number = number
        self.order = list(dict.fromkeys(order))
        self.index = {backend: slot for slot, backend in enumerate(self.order)}
        self.serves = _NOTHING
        self.frontends: dict[FrontendKey, Want] = {}
        self.affinity = 0
        self.ranges: frozenset[Prefix] = frozenset()
        self.table: TableContent | None = None
        self.fresh = True  # no row of it was asked for yet

    def arrange(
        self, standings: Mapping[int, Standing], serves: frozenset[Standing], touched: Iterable[int], delta: Delta
    ) -> None:
        """Let those of `touched` have slots that serve, and the others not: new ones in the place of those that go, and
        the last ones in the holes that are left."""
        self.serves = serves
        order, index = self.order, self.index
        if self.fresh and not order:
            order += [b for b in touched if standings[b] in serves]
            index.update(zip(order, range(len(order)), strict=True))
            self._show(delta)
            return
        touched = dict.fromkeys(touched)
        gone = sorted(index[b] for b in touched if b in index and standings.get(b) not in serves)
        come = [b for b in touched if b not in index and standings.get(b) in serves]
        both = min(len(gone), len(come))
        for slot, backend in zip(gone[:both], come[:both], strict=True):
            self._leave(order[slot], delta)
            self._place(slot, backend, delta)
        for slot in reversed(gone[both:]):
            self._leave(order[slot], delta)
            last = order.pop()
            if slot < len(order):
                order[slot] = last
                index[last] = slot
                if not self.fresh:
                    delta.put(SLOTS, SlotKey(self.number, slot), last)
            if not self.fresh:
                delta.drop(SLOTS, SlotKey(self.number, len(order)))
        for backend in come[both:]:
            order.append(backend)
            self._place(len(order) - 1, backend, delta)
        if self.fresh:
            self._show(delta)

    def admit(self, ranges: frozenset[Prefix], delta: Delta) -> None:
        """The source ranges of its frontends."""
        if ranges != self.ranges:
            for prefix in self.ranges - ranges:
                delta.drop(RANGES, source_key(self.number, prefix))
            for prefix in ranges - self.ranges:
                delta.put(RANGES, source_key(self.number, prefix), 1)
            self.ranges = ranges

    def set_affinity(self, seconds: int, delta: Delta) -> None:
        """How long a client keeps its backend. `arrange` keeps the rows of a group that has affinity."""
        if bool(seconds) != bool(self.affinity):
            for backend in self.order:
                key = MemberKey(self.number, backend)
                if seconds:
                    delta.put(MEMBERS, key, 1)
                else:
                    delta.drop(MEMBERS, key)
        self.affinity = seconds

    def set_table(self, weights: Mapping[int, int] | None, delta: Delta) -> None:
        """A table of the backends in slots, with the weights that aren't the default; None: no table."""
        if weights is not None:
            table = TableContent(tuple((b, weights.get(b, DEFAULT_WEIGHT)) for b in sorted(self.order)))
            if self.table != table:
                delta.put(TABLES, self.number, table)
            self.table = table
        elif self.table is not None:
            delta.drop(TABLES, self.number)
            self.table = None

    def dissolve(self, delta: Delta) -> None:
        """None of its rows is wanted any more."""
        for slot in range(len(self.order)):
            delta.drop(SLOTS, SlotKey(self.number, slot))
        self.admit(frozenset(), delta)
        self.set_affinity(0, delta)
        self.set_table(None, delta)

    def add_rows(self, rows: dict[str, dict[Any, Any]]) -> None:
        """All its rows, but for the frontends."""
        number = self.number
        rows[SLOTS].update((SlotKey(number, slot), backend) for slot, backend in enumerate(self.order))
        if self.affinity:
            rows[MEMBERS].update((MemberKey(number, backend), 1) for backend in self.order)
        rows[RANGES].update((source_key(number, prefix), 1) for prefix in self.ranges)
        if self.table is not None:
            rows[TABLES][number] = self.table

    def _show(self, delta: Delta) -> None:
        """All slots of a new group. Restored ones are news to whoever collects the deltas."""
        number = self.number
        delta.upserts[SLOTS].update((_new(SlotKey, (number, slot)), b) for slot, b in enumerate(self.order))
        self.fresh = False

    def _place(self, slot: int, backend: int, delta: Delta) -> None:
        self.order[slot] = backend
        self.index[backend] = slot
        if not self.fresh:
            delta.put(SLOTS, SlotKey(self.number, slot), backend)
        if self.affinity:
            delta.put(MEMBERS, MemberKey(self.number, backend), 1)

    def _leave(self, backend: int, delta: Delta) -> None:
        del self.index[backend]
        if self.affinity:
            delta.drop(MEMBERS, MemberKey(self.number, backend))


class Members:
    """All endpoints of a service port in one family, serving or not, by backend id."""

    __slots__ = ("choice", "counts", "groups", "more", "port", "present", "standings", "weights")

    def __init__(self, port: ServicePort) -> None:
        self.port = port
        self.standings: dict[int, Standing] = {}
        self.more: dict[int, list[Standing]] = {}  # of those that several slices list, each listing
        self.weights: dict[int, int] = {}  # other than the default, and not 0
        self.counts: dict[Standing, int] = {}
        self.present = _NOTHING
        self.choice: Choice = choose(_NOTHING)
        self.groups: dict[bool, Group] = {}  # by whether it is of this node's endpoints only

    def clear(self) -> dict[int, Standing]:
        """Forget every listing, to fill `standings` anew; `recount` completes that."""
        self.standings, self.more, self.weights = {}, {}, {}
        return self.standings

    def recount(self, weights: dict[int, int]) -> None:
        """All listings are there, of these weights (a backend that isn't named has the default)."""
        self.counts = dict(Counter(self.standings.values()))
        self.weights = {b: weight for b, weight in weights.items() if weight not in (0, DEFAULT_WEIGHT)}

    def add(self, backend: int, standing: Standing) -> bool:
        """One more listing. True if it is the backend's first."""
        former = self.standings.get(backend)
        if former is None:
            self._stand(backend, None, standing)
            return True
        self.more.setdefault(backend, [former]).append(standing)
        if standing > former:
            self._stand(backend, former, standing)
        return False

    def remove(self, backend: int, standing: Standing) -> bool:
        """One listing less. True if it was the backend's last."""
        former = self.standings[backend]
        listings = self.more.get(backend)
        if listings is None:
            self._count(former, -1)
            del self.standings[backend]
            return True
        listings.remove(standing)
        if len(listings) == 1:
            del self.more[backend]
        highest = max(listings)
        if highest != former:
            self._stand(backend, former, highest)
        return False

    def decide(self) -> frozenset[Standing]:
        """Choose again; returns the standings that there were before and still are."""
        before = self.present
        if before != self.counts.keys():
            self.present = frozenset(self.counts)
            self.choice = choose(self.present)
        return before & self.present

    def wanted(self, local: bool) -> frozenset[Standing]:
        """The standings that serve."""
        return self.choice.local if local else self.choice.everywhere

    def _stand(self, backend: int, former: Standing | None, standing: Standing) -> None:
        self.standings[backend] = standing
        self._count(standing, 1)
        if former is not None:
            self._count(former, -1)

    def _count(self, standing: Standing, step: int) -> None:
        count = self.counts.get(standing, 0) + step
        if count:
            self.counts[standing] = count
        else:
            del self.counts[standing]
