"""Rows of whole addresses: those that belong to Services alone, and refuse the ports that no service has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from fimbria.compute import service_frontends as front
from fimbria.compute.service_rows import FRONTENDS, Delta
from fimbria.model.rows import Frontend, FrontendKey


class ServiceAddresses:
    """How many services have an address, as cluster IP and as another one. Shares the rows of frontends."""

    def __init__(self, frontends: dict[FrontendKey, Frontend]) -> None:
        self._frontends = frontends
        self._counts: dict[bytes, list[int]] = {}
        self._nodes: dict[str, frozenset[bytes]] = {}
        self._of_nodes: Counter[bytes] = Counter()
        self._touched: set[bytes] = set()

    def exchange(self, before: Mapping[bytes, int], after: Mapping[bytes, int]) -> None:
        """A service has other addresses now; each with CLUSTER_IP, if that is what it is."""
        if before == after:
            return
        for addresses, step in ((before, -1), (after, 1)):
            for addr, flags in addresses.items():
                self._counts.setdefault(addr, [0, 0])[0 if flags else 1] += step
        for addr in {**before, **after}:
            if not any(self._counts[addr]):
                del self._counts[addr]
            self._touched.add(addr)

    def set_node(self, name: str, addrs: Iterable[bytes]) -> None:
        """The addresses of a node: they belong to it, whatever Services say. None if it is gone."""
        before, now = self._nodes.pop(name, frozenset()), frozenset(addrs)
        if now:
            self._nodes[name] = now
        for addr in before ^ now:
            self._of_nodes[addr] += 1 if addr in now else -1
            if not self._of_nodes[addr]:
                del self._of_nodes[addr]
            if addr in self._counts:
                self._touched.add(addr)

    def settle(self, delta: Delta) -> None:
        """The rows of what changed: once, for an address may be one's and the other's within one change."""
        for addr in self._touched:
            self._row(addr, delta)
        self._touched.clear()

    def _row(self, addr: bytes, delta: Delta) -> None:
        counts = None if addr in self._of_nodes else self._counts.get(addr)
        key = FrontendKey(addr, 0, 0)
        if counts is None:
            if self._frontends.pop(key, None) is not None:
                delta.drop(FRONTENDS, key)
            return
        row = Frontend(0, 0, front.ADDRESS | (0 if counts[1] else front.CLUSTER_IP))
        if self._frontends.get(key) != row:
            self._frontends[key] = row
            delta.put(FRONTENDS, key, row)
