"""The endpoints of a service port, and the groups of frontends that lead to the same of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final

from fimbria.compute.service_choice import Choice, Standing, choose
from fimbria.compute.service_frontends import Want
from fimbria.model.address import Prefix
from fimbria.model.rows import FrontendKey
from fimbria.model.service import DEFAULT_WEIGHT, ServicePort, TableContent

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
